"""The family of methods: each is a row of values over one engine.

A `Method` says in which order a stage works (``ahead``, ``backward_first``, ``flush``, ``forward_all``,
``split_backward``, ``leads``, ``orders``), whether all stages learn from one loss or each from its own (``local``),
what a stage keeps between the two passes of a micro-batch (``keep``), at which weights those passes run
(``backward_at``, ``predict``), and how updates are shrunk with the distance ``d = K-1-k`` to the last
stage (``grad_shrink``, ``lr_shrink``). `get_method` gives the row of a name with any of the values
changed; a combination that means nothing is refused.

Letters in the docstrings: stage k of K counts from 0; w_k(n) the weights of stage k after n updates;
b a mini-batch, with one micro-batch unless said otherwise; h the stage's input; g the gradient of its
output; eta the learning rate. The delay is that of the steady state, in updates.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

from .schedule import lead
from .validation import is_number, is_whole, unknown, whole

Keep = Literal["graph", "input"]
# The predictors by name, and the copies of the weights that each of them holds beside the predicted ones.
PREDICTIONS = {"linear": 0, "rollout": 0, "informed": 0, "last": 1, "scaled": 2, "auto": 2}


@dataclass(frozen=True)
class Method:
    """One method of training in a pipeline of stages.

    Args:
        name: what it is called in tables and errors.
        ahead: forwards a stage runs ahead of its first backward, per stage after it: ``lead =
            ceil(ahead * d)``. At least 1; at least 0.5 with ``split_backward``.
        backward_first: in a slot, B then F (else F then B); the last stage always runs F then B.
        keep: what a stage keeps from F to B: the ``"graph"``, or the ``"input"``, to recompute the graph.
        backward_at: B at the weights its forward read (``"stashed"``) or at the ``"current"`` ones.
        predict: the weights F reads: ``None``, those of now; ``"linear"``, ``"rollout"``, ``"informed"``, ``"last"``,
            ``"scaled"``, ``"auto"`` or an object as in `dtrp.predict`, those predicted for the time of B.
        grad_shrink: every stage multiplies the gradient it receives by this: ``grad_shrink**d`` in all.
        lr_shrink: stage k trains with ``lr * lr_shrink**d``.
        flush: run every backward of a mini-batch before the next mini-batch (a synchronous method).
        forward_all: run all forwards of a mini-batch before its backwards (GPipe).
        local: every stage learns from a local loss, that of an auxiliary network on its output; no gradient is passed
            between stages, so B follows F at once.
        split_backward: B in two parts: I, the gradient of the stage's input, which is sent on at once, and W, the
            gradients of its weights, for which nobody waits. With ``flush`` a W waits until the stage would hold more
            graphs than there are stages (ZB-H1), unless ``orders`` say otherwise.
        leads: the forwards ahead of each stage's first backward; None: from ``ahead``.
        orders: each stage's order, a cycle of one slot or several, as ``"RFIW"`` (`dtrp.schedule`; ``"FB"`` of whole
            backwards); a single string is that of all stages; None: from ``ahead`` and ``backward_first``.

    Raises:
        ValueError: a value out of range, or a combination that means nothing, with the reason.
    """

    name: str
    ahead: float
    backward_first: bool
    keep: Keep
    backward_at: Literal["stashed", "current"]
    predict: Any = None
    grad_shrink: float = 1.0
    lr_shrink: float = 1.0
    flush: bool = False
    forward_all: bool = False
    local: bool = False
    split_backward: bool = False
    leads: tuple[int, ...] | None = None
    orders: tuple[str, ...] | str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.predict, str) and self.predict == "none":
            object.__setattr__(self, "predict", None)
        if not self.name or any(letter.isspace() for letter in self.name):
            raise ValueError(f"name={self.name!r}: a method's name is one word")
        for field, choices in (("keep", ("graph", "input")), ("backward_at", ("stashed", "current"))):
            if getattr(self, field) not in choices:
                raise ValueError(f"{field}={getattr(self, field)!r}: choose one of {', '.join(map(repr, choices))}")
        for field in ("backward_first", "flush", "forward_all", "local", "split_backward"):
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"{field}={getattr(self, field)!r}: pass True or False")
        if not is_number(self.ahead, 0.5 if self.split_backward else 1):
            raise ValueError(
                f"ahead={self.ahead!r}: a gradient takes at least one slot a stage to come back; pass a number >= 1, or with "
                "split_backward=True, where it takes half of one, >= 0.5"
            )
        for field in ("grad_shrink", "lr_shrink"):
            value = getattr(self, field)
            if not (is_number(value) and 0 < value <= 1):
                raise ValueError(
                    f"{field}={value!r}: a shrinking factor lies above 0 and is at most 1 (1: no shrinking)"
                )
        if isinstance(self.predict, str) and self.predict not in PREDICTIONS:
            raise ValueError(
                f"predict={self.predict!r}: choose 'linear', 'rollout', 'informed', 'none', 'last', 'scaled' or 'auto', or pass "
                "a predictor object"
            )
        if self.predict is not None and not isinstance(self.predict, str) and not callable(self.predict):
            raise ValueError(
                f"predict={self.predict!r} cannot be called; a predictor is called as predictor(parameters, "
                "optimizer, horizon, out, *, stage, microbatch, version)"
            )
        if self.local:
            for field, (idle, why) in _IDLE_IF_LOCAL.items():
                if (value := getattr(self, field)) != idle:
                    raise ValueError(
                        f"{field}={value!r} with local=True: every stage has a loss of its own, and its B right after its F, so "
                        f"{why}; leave it at {idle!r}"
                    )
        if self.keep == "graph" and self.backward_at == "current" and not self.flush:
            raise ValueError(
                "keep='graph' with backward_at='current': a kept graph holds the activations of its forward's weights, "
                "so its gradient is theirs; pass backward_at='stashed', or keep='input' to recompute at the current ones"
            )
        if self.flush and self.predict is not None:
            raise ValueError(
                f"predict={self.predict!r} with flush=True: a method that flushes every mini-batch has no delay to "
                "predict over; pass predict=None, or flush=False"
            )
        if self.forward_all and not self.flush:
            raise ValueError(
                "forward_all=True with flush=False: all forwards of a mini-batch before its backwards is a synchronous "
                "order; pass flush=True"
            )
        if self.forward_all and (self.ahead != 1 or self.backward_first):
            raise ValueError(
                "forward_all=True runs every forward before any backward, so neither ahead nor backward_first has a "
                "meaning; leave them at ahead=1, backward_first=False"
            )
        self._check_orders()

    def _check_orders(self) -> None:
        """Refuse leads and orders that mean nothing; whether the stages' orders fit together is another question."""
        if self.forward_all and (self.split_backward or self.leads is not None or self.orders is not None):
            raise ValueError(
                "forward_all=True runs every forward before any backward, so split_backward, leads and orders have no meaning; "
                "leave them at False, None and None"
            )
        if self.leads is not None:
            leads = tuple(self.leads) if isinstance(self.leads, Iterable) else ()
            if not leads or not all(is_whole(value, 0) for value in leads) or leads[-1] != 0:
                raise ValueError(
                    f"leads={self.leads!r}: pass a whole number for each stage, the forwards ahead of its first backward; the "
                    "last has 0"
                )
            object.__setattr__(self, "leads", leads)
        if self.orders is None:
            return
        orders = tuple(self.orders) if isinstance(self.orders, Iterable) else (self.orders,)
        if not isinstance(self.orders, str):
            object.__setattr__(self, "orders", orders)
        for letters in [self.orders] if isinstance(self.orders, str) else orders:
            if reason := _broken_cycle(letters, "IW" if self.split_backward else "B", flushes=self.flush):
                raise ValueError(f"orders={self.orders!r}: {reason}")

    def keeping(self, keep: Keep) -> Method:
        """The row of a stage that keeps something else than this method says, in the same order of work.

        A graph that is kept holds the weights its forward read, predicted or not, so its backward is at those
        (``stashed``); an input is recomputed where the method says.
        """
        if keep == self.keep:
            return self
        at = "stashed" if keep == "graph" and not self.flush else self.backward_at
        return dataclasses.replace(self, keep=keep, backward_at=at)

    @property
    def predictor_copies(self) -> int:
        """Copies of a stage's weights that its predictor holds beside the predicted ones."""
        return PREDICTIONS[self.predict] if isinstance(self.predict, str) else int(getattr(self.predict, "copies", 0))

    def recomputes(self, num_stages: int, stage: int) -> bool:
        """Whether ``stage`` runs its forward a second time at B (the last stage has its graph at hand)."""
        return self.keep == "input" and (self.forward_all or lead(self, num_stages, stage) > 0)


class _Documentation:
    """``__doc__`` of `Method`, and of a row: the documentation of the method that it is called by."""

    def __init__(self, of_class: str | None) -> None:
        self._of_class = of_class

    def __get__(self, row: Method | None, owner: type[Method]) -> str | None:
        return self._of_class if row is None or row.name not in _ROWS else inspect.getdoc(_ROWS[row.name])


Method.__doc__ = _Documentation(Method.__doc__)  # type: ignore[assignment]

# What has no meaning where every stage has a loss of its own: the value that says nothing, and why.
_IDLE_IF_LOCAL: dict[str, tuple[Any, str]] = {
    "ahead": (1, "no forward runs ahead"),
    "backward_first": (False, "there is no earlier backward to come first"),
    "predict": (None, "there is no delay to predict over"),
    "grad_shrink": (1.0, "no gradient is received to be shrunk"),
    "flush": (False, "nothing is ever left to flush"),
    "forward_all": (False, "forwards do not wait for others"),
    "split_backward": (False, "no stage waits for a gradient"),
    "leads": (None, "no forward runs ahead"),
    "orders": (None, "there is one order"),
}


def _broken_cycle(letters: Any, parts: str, *, flushes: bool) -> str | None:
    """Why the letters are no cycle of slots; ``parts``: the letters of a backward that each slot has."""
    whole_or_not = "F, I and W, and R or none" if parts == "IW" else "F and B"
    counts = Counter(letters) if isinstance(letters, str) else Counter()
    again = counts.pop("R", 0) if parts == "IW" else 0
    if set(counts) != {"F", *parts} or len(set(counts.values())) != 1 or again not in (0, counts["F"]):
        return f"{letters!r} is no cycle of slots, which have one each of {whole_or_not}"
    done = Counter[str]()
    for letter in letters:
        ends = {"R": done["R"] > done["I"], "I": again and done["R"] <= done["I"], "W": done["W"] >= done["I"]}
        if ends.get(letter):
            return (
                f"in {letters!r} {'an I comes before the next R' if letter == 'R' else f'its {letter} comes too early'}"
            )
        if letter in "RI" and not flushes and done["W"] < done["I"]:
            return f"in {letters!r} a W, and the update that may follow it, comes after the next backward has begun"
        if letter in "BI" and done[letter] > done["F"]:
            return f"in {letters!r} a backward is more than one slot ahead of its forward; make the lead smaller"
        done[letter] += 1
    return None


# -- the rows: a function each, whose docstring is the method's documentation ---------------------------


def bp() -> Method:
    """Backpropagation, pipelined: 1F1B with a flush after every mini-batch.

    Update: ``w_k(b+1) = w_k(b) - eta * grad f_b(w(b))``, exactly that of one worker.
    Delay: 0. Memory: the graphs of min(A, d+1) micro-batches.
    Time: the bubble of a flush, (A+K-1)/A times the work.
    Source: PipeDream-Flush in Narayanan et al., Memory-efficient pipeline-parallel DNN training,
    arXiv:2006.09503.
    Differences: none known; gradients of unequal micro-batches are weighted by their samples.
    """
    return Method("bp", 1, False, "graph", "current", flush=True)


def gpipe() -> Method:
    """GPipe: all forwards of a mini-batch, then all its backwards, then the update.

    Update and delay: as bp. Memory: the graphs of all A micro-batches.
    Source: Huang et al., GPipe, arXiv:1811.06965.
    Differences: the paper recomputes inside every stage; here that is ``keep="input"``.
    """
    return Method("gpipe", 1, False, "graph", "current", flush=True, forward_all=True)


def ddg() -> Method:
    """Decoupled parallel backpropagation with delayed gradients.

    Update: ``w_k(b+1) = w_k(b) - eta * grad_k f_b`` at the weights ``w_k(b-d)`` that the forward read.
    Delay: d. Memory: d+1 graphs and as many copies of the weights.
    Source: Huo et al., Decoupled parallel backpropagation with convergence guarantee, arXiv:1804.10574.
    Differences: the forward is not locked (1F1B order; every micro-batch meets the same versions as
    in the paper). Their code keeps graphs across updates and so mixes old activations with new
    weights; here the gradient is exactly that of the forward's weights.
    """
    return Method("ddg", 1, False, "graph", "stashed")


def fr() -> Method:
    """Features replay: store the inputs, recompute at the current weights.

    Update: ``w_k(b+1) = w_k(b) - eta * (d out(h; w_k(b)) / d w_k)^T g``, h computed by the stages
    before at ``w_j(b-(K-1-j))``.
    Delay: d. Memory: d+1 inputs and one graph.
    Source: Huo et al., Training neural networks using features replay, arXiv:1807.04511.
    Differences: the forward is not locked; buffers, like BatchNorm statistics, are updated once per batch (twice in their code);
    no doubled learning rate at the first stage, which their code has and their paper does not.
    """
    return Method("fr", 1, False, "input", "current")


def fdg() -> Method:
    """Fully decoupled training with delayed gradients.

    Update: ``w_k(b+1) = w_k(b) - eta * beta**d * grad_k f_b`` at the weights the forward read.
    Delay: 2d, or 2d-1 with ``backward_first=True``. Memory: 2d+1 (2d) graphs, and a copy of the
    weights for each.
    ``grad_shrink`` is the paper's beta: every stage multiplies the gradient it receives, and passes the
    shrunk one on.
    Source: Zhuang et al., Fully decoupled neural network learning using delayed gradients, arXiv:1906.09108.
    Differences: exact gradients at the stashed weights (see ddg).
    """
    return Method("fdg", 2, False, "graph", "stashed")


def adl() -> Method:
    """Accumulated decoupled learning: fdg with the gradients of A micro-batches in one update.

    Update: ``w_k(b+1) = w_k(b) - eta * mean_j grad_k f_(b,j)``, each at the weights its forward read.
    Delay: ``ceil((2d - j) / A)`` for the j-th micro-batch (2d-1-j with ``backward_first=True``).
    Memory: 2d+1 (2d) graphs of micro-batches, a copy of the weights per version.
    Meant for ``num_microbatches > 1``; with one it is fdg.
    Source: Zhuang et al., Accumulated decoupled learning with gradient staleness mitigation for
    convolutional neural networks, ICML 2021; arXiv:2012.03747.
    Differences: gradients are averaged (their code sums them, which scales the learning rate with A).
    """
    return Method("adl", 2, False, "graph", "stashed")


def dtr() -> Method:
    """Decoupled training with re-computation: dtrp without its prediction.

    Update: ``w_k(b+1) = w_k(b) - eta * (d out(h; w_k(b)) / d w_k)^T g``.
    Delay: 2d-1 between the two forward passes. Memory: 2d inputs and one graph.
    Source: Peng et al., PLoS ONE 18(2): e0276427, 2023 (its Fig 1: re-computation, and backward
    before forward except at the last module, are stated there; the delay follows from that order).
    Differences: see dtrp.
    """
    return Method("dtr", 2, True, "input", "current")


def dtrp() -> Method:
    """Decoupled training with re-computation and weight prediction, the method this library is named for.

    Update: F(b) reads ``w'_k``, the weights predicted for version b from those of now; B(b) recomputes
    at the true ``w_k(b)``: ``w_k(b+1) = w_k(b) - eta * gamma**d * (d out(h; w_k(b)) / d w_k)^T g``.
    If the prediction were exact this would be backpropagation, bit for bit.
    Delay: 2d-1, predicted over. Memory: 2d inputs, one graph, one predicted copy of the weights.
    ``lr_shrink`` is gamma.
    Source: Peng et al., Decoupled neural network training with re-computation and weight prediction,
    PLoS ONE 18(2): e0276427, 2023.
    Stated there (abstract, captions): re-computation, weight prediction, batch compensation, the order,
    gamma as a factor that shrinks the learning rate. Our reading: the horizon 2d-1, the form of the
    predictor (``"rollout"``; ``"linear"`` by option), and ``gamma**d``. Their "delay regulator" is not known.
    """
    return Method("dtrp", 2, True, "input", "current", "rollout")


def dtrp_1f1b() -> Method:
    """dtrp at half the delay, in the 1F1B order, for fast links (fr with weight prediction).

    Update: as dtrp. Delay: d, predicted over. Memory: d+1 inputs, one graph, one predicted copy.
    A message that takes a noticeable part of a slot is not hidden (dtrp hides a whole slot).
    Source: ours.
    """
    return Method("dtrp-1f1b", 1, False, "input", "current", "rollout")


def pipedream() -> Method:
    """PipeDream: asynchronous 1F1B with weight stashing.

    Update: ``w_k(b+1) = w_k(b) - eta * grad_k f_b`` at the stashed ``w_k(b-d)``.
    Delay: d. Memory: d+1 graphs and versions of the weights; ``keep="input"`` keeps inputs and
    recomputes at the stashed version.
    Source: Narayanan et al., PipeDream, SOSP 2019; arXiv:1806.03377.
    Differences: no vertical sync (optional in the paper); buffers belong to no version.
    """
    return Method("pipedream", 1, False, "graph", "stashed")


def spectrain() -> Method:
    """SpecTrain: predicted weights in the forward, whose graph is kept.

    Update: ``w_k(b+1) = w_k(b) - eta * grad_k f_b`` at the predicted ``w'_k`` that the forward read.
    Delay: d, predicted over. Memory: d+1 graphs, each at its own copy of predicted weights.
    Source: Chen et al., Efficient and robust parallel DNN training through model parallelism on
    multi-GPU platform, arXiv:1809.02839.
    Differences: the forward predicts over the delay counted from the run, and the backward stays at
    those weights (the paper predicts both passes to a common version; its authors' code does as here).
    """
    return Method("spectrain", 1, False, "graph", "stashed", "linear")


def dgl() -> Method:
    """Decoupled greedy learning: every stage learns from a loss of its own, of an auxiliary network on its output.

    Update: ``w_k(b+1) = w_k(b) - eta * grad_{w_k} l(aux_k(out_k), y)``, ``out_k = out(h; w_k(b))`` passed on without a
    gradient; the weights of the auxiliary network likewise, by the same optimizer. The last stage has the model's loss.
    Delay: 0, at every stage. It is another objective than backpropagation's, whose loss no stage but the last sees.
    Memory: one graph, the auxiliary network's in it, and that network with its optimizer state. No gradient travels
    back; the targets travel with the activations.
    ``Pipeline(aux=...)`` gives the networks; `dtrp.models.auxiliary` makes the paper's: features averaged to a quarter of
    their height and width, three 1x1 convolutions, averaged to 2x2, and an MLP of three hidden layers (MLP-SR).
    Source: Belilovsky et al., Decoupled greedy learning of CNNs, ICML 2020; arXiv:1901.08164.
    Differences: this is the paper's synchronous algorithm, in which every stage sees every mini-batch once, in order.
    Its asynchronous one has a replay buffer between stages, from which a stage draws what an earlier one made, old or
    several times over; here a stage waits for its input, and one that is faster than the next waits for room. The model
    is judged by its last layer (their code also averages it with auxiliary networks).
    """
    return Method("dgl", 1, False, "graph", "stashed", local=True)


def dtrp_split() -> Method:
    """dtrp with backwards in two parts: half the delay of dtrp-1f1b in the same slot, for fast links.

    Update: as dtrp.
    Delay: ``ceil(d/2)``, predicted over. A stage sends the gradient of its input before it computes those of its
    weights, so that a gradient is back from d stages in half the time.
    Memory: ``ceil(d/2) + 1`` inputs, one graph, one predicted copy, and of one micro-batch what its weight gradients
    are made from, about a graph.
    A message is hidden only as far as the parts of the backward leave room: a link that takes more than a twentieth of a
    forward costs time (dtrp hides a whole slot).
    Source: ours; the division of a backward is that of bp-zb's paper.
    """
    return Method("dtrp-split", 0.5, False, "input", "current", "rollout", split_backward=True)


def spectrain_split() -> Method:
    """spectrain with backwards in two parts, which hides messages of up to half a forward.

    Update and delay: as spectrain. Memory: as spectrain, and of one micro-batch what its weight gradients are made from.
    Source: Chen et al., arXiv:1809.02839 (see spectrain); the division is ours.
    """
    return Method("spectrain-split", 1, False, "graph", "stashed", "linear", split_backward=True)


def bp_zb() -> Method:
    """Backpropagation, pipelined with hardly a bubble: ZB-H1, whose second parts of backwards fill it.

    Update: as bp, bit for bit.
    Delay: 0. Memory: the graphs of min(A, K) micro-batches at every stage, of which up to min(A, k+1) wait for their
    second part; with ``orders="FIW"`` those of 1F1B, min(A, d+1), and a larger bubble.
    Time: the bubble of a flush is K-1 times F + I - W, the parts of a micro-batch, where 1F1B's is K-1 times F + B; for
    A >= K. It is the smallest of the synchronous orders with one stage a worker; interleaved ones, with several stages
    a worker, have a smaller one.
    Source: Qi et al., Zero bubble (almost) pipeline parallelism, ICLR 2024; arXiv:2401.10241: its handcrafted order H1.
    Differences: the paper keeps 1F1B's memory on its first worker; here all workers may hold what the first one holds.
    No post-validation: an update waits for its gradient.
    """
    return Method("bp-zb", 1, False, "graph", "current", flush=True, split_backward=True)


_ROWS: dict[str, Callable[[], Method]] = {
    row().name: row
    for row in (
        bp, gpipe, ddg, fr, fdg, adl, dtr, dtrp, dtrp_1f1b, pipedream, spectrain, dgl, dtrp_split, spectrain_split, bp_zb,
    )
}  # fmt: skip


def list_methods() -> list[str]:
    """The names of all methods."""
    return list(_ROWS)


def get_method(name: str, /, **options: Any) -> Method:
    """The method called ``name``, with any field of its row changed.

    >>> get_method("fdg", grad_shrink=0.5).grad_shrink
    0.5

    The row's documentation is the returned object's ``__doc__``.

    Raises:
        ValueError: an unknown name (with the nearest right one), or values that mean nothing together.
        TypeError: an option that is no field of `Method`.
    """
    if name not in _ROWS:
        raise ValueError(unknown("method", name, _ROWS))
    fields = [f.name for f in dataclasses.fields(Method)]
    for option in options:
        if option not in fields:
            raise TypeError(unknown("field of a method", option, fields))
    return dataclasses.replace(_ROWS[name](), **options)


def as_method(method: str | Method) -> Method:
    """The row that a name means; a row as it is."""
    row = get_method(method) if isinstance(method, str) else method
    if not isinstance(row, Method):
        raise TypeError(f"method is a {type(row).__name__}; pass a name or what get_method returns")
    return row


def keeping(method: Method, num_stages: int, keep: Any, memory_limit_bytes: Any) -> tuple[list[Method], int | None]:
    """The rows of the stages by the arguments ``keep`` and ``memory_limit_bytes`` of `dtrp.Pipeline`.

    Returns:
        (a row for each stage, the limit in bytes by which a stage decides what it keeps, or None).
    """
    if keep != "auto" and memory_limit_bytes is not None:
        raise ValueError(
            f"memory_limit_bytes={memory_limit_bytes!r} with keep={keep!r}: the limit is what keep='auto' decides by; pass that"
        )
    if keep is None:
        return [method] * num_stages, None
    if keep == "auto":
        if memory_limit_bytes is None:
            raise ValueError("keep='auto' needs memory_limit_bytes, what a stage may hold")
        limit = whole("memory_limit_bytes", memory_limit_bytes)
        return [method] * num_stages, limit
    keeps = [keep] * num_stages if isinstance(keep, str) else list(keep)
    if len(keeps) != num_stages or any(value not in ("graph", "input") for value in keeps):
        raise ValueError(
            f"keep={keep!r}: pass 'graph', 'input' or 'auto', or 'graph' or 'input' for each of the {num_stages} stages"
        )
    return [method.keeping(cast(Keep, value)) for value in keeps], None
