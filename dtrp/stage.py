"""One stage: its forward, its backward, its update, and what it keeps in between.

For micro-batch m of mini-batch b, at a stage whose weights have had v updates (delay = b - v)::

                    keep="graph"                             keep="input"

    F(m)     1. weights: those of now; with delay > 0 a copy of them, predicted if the method predicts
             2. run with a graph on that copy                2. run without a graph, no buffer moves
             3. keep the graph (and so the copy)             3. keep the input; the copy too for "stashed"

    B(m)                                                     4. run again, with a graph, at the weights of
                                                                now (or at the copy); buffers move here
             5. differentiate, add to the stage's gradients  5. the same

    U        6. gradients into p.grad, optimizer.step(), lr_scheduler.step()

The last stage, whose B follows its F at once, always keeps its graph (unless all forwards come first).
A kept graph never stands on the parameters themselves when an update comes before its backward: the
update would change tensors that the graph has saved. It stands on leaves of its own, through
`torch.func.functional_call`.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import functional_call
from torch.optim import Optimizer

from .aligned import aligned_clone
from .methods import Method
from .predict import BuiltInPredictor, as_predictor
from .rng import microbatch_seed, seeded
from .schedule import Action

LossFn = Callable[[Tensor, Tensor], Tensor]


class StageError(RuntimeError):
    """What went wrong in a stage: which one, at which micro-batch, and (``__cause__``) why.

    Attributes:
        stage, microbatch, minibatch: where; ``microbatch`` is None in an update.
    """

    def __init__(self, stage: int, action: Action, minibatch: int, cause: BaseException) -> None:
        self.stage = stage
        self.minibatch = minibatch
        self.microbatch = None if action.kind == "U" else action.index
        doing = {
            "F": f"forward of micro-batch {action.index}",
            "B": f"backward of micro-batch {action.index}",
            "U": "update",
        }[action.kind]
        super().__init__(f"stage {stage}, {doing} (mini-batch {minibatch}): {type(cause).__name__}: {cause}")


class AutocastState(NamedTuple):
    """The caller's autocast settings for one type of device, to be used again when a forward is repeated."""

    device_type: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def now(cls, device_type: str) -> AutocastState:
        return cls(device_type, torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type))

    def region(self) -> torch.autocast:
        # The cache of casts is keyed by parameter object: it would serve weights of another version.
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.enabled, cache_enabled=False)


@dataclass(frozen=True)
class MicroBatch:
    """What every stage must know of a micro-batch.

    Args:
        index: m, counted since the pipeline was made.
        minibatch: b(m).
        share: its samples over those of its mini-batch.
    """

    index: int
    minibatch: int
    share: float


class WeightVersion:
    """A copy of a stage's trainable weights, with leaves for graphs to stand on."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = [torch.empty_like(t, requires_grad=False) for t in tensors]
        self.leaves = [t.detach().requires_grad_() for t in self.tensors]
        self.nbytes = sum(t.nbytes for t in self.tensors)


@dataclass
class _Held:
    """The stash's entry for one micro-batch, from its F to its B."""

    micro: MicroBatch
    version: int  # updates when F ran
    autocast: AutocastState
    leaf: Tensor  # the input
    nbytes: int
    target: Tensor | None = None  # what the loss compares with, at the last stage
    weights: WeightVersion | None = None  # the copy that F read, where B needs it
    has_graph: bool = False
    root: Tensor | GradientEdge | None = None  # where differentiation starts; None where it has nothing to do


class Stage:
    """A contiguous part of the network with its own optimizer.

    The engine calls `forward`, `backward` and `update` in the order of the schedule, and hands on what
    they return. Nothing here waits, sends or decides an order.

    Args:
        index, num_stages: k and K.
        module: this stage's layers; their parameters stay the caller's objects.
        method: the row to work by.
        optimizer: list of parameters -> optimizer; called when there are trainable parameters.
        lr_scheduler: optimizer -> scheduler, or None.
        loss_fn: the loss, at the last stage.
        needs_input_grad: whether any stage before has something to train.
        seed, replica: see `dtrp.rng`.
        device: where the stage works; None: where its input is.
    """

    def __init__(
        self,
        index: int,
        num_stages: int,
        module: nn.Module,
        method: Method,
        optimizer: Callable[[list[nn.Parameter]], Optimizer],
        lr_scheduler: Callable[[Optimizer], Any] | None,
        *,
        loss_fn: LossFn | None,
        needs_input_grad: bool,
        seed: int,
        replica: int = 0,
        device: torch.device | None = None,
    ) -> None:
        self.index = index
        self.module = module
        self.method = method
        self.device = device
        self.loss_fn = loss_fn
        self.seed, self.replica = seed, replica
        self.distance = num_stages - 1 - index
        self.needs_input_grad = needs_input_grad
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self.parameters = [p for _, p in named]
        for p in self.parameters:
            p.grad = None
        self.optimizer = optimizer(list(self.parameters)) if self.parameters else None
        self.lr_scheduler = lr_scheduler(self.optimizer) if lr_scheduler and self.optimizer else None
        self.lr_factor = method.lr_shrink**self.distance
        # A frozen front part has nothing to differentiate, so nothing to repeat.
        self.trains = bool(self.parameters) or needs_input_grad
        self.recomputes = self.trains and method.recomputes(num_stages, index)
        predicts = self.distance > 0 and self.parameters
        self.predictor = as_predictor(method.predict) if predicts else None
        if isinstance(self.predictor, BuiltInPredictor) and self.optimizer is not None:
            self.predictor.check(self.optimizer)

        self.version = 0  # updates made
        self.gradients: list[Tensor | None] = [None] * len(self.parameters)
        self._spent: list[Tensor | None] = []  # those of the last update
        self.delays: Counter[int] = Counter()
        self._stash: deque[_Held] = deque()
        self._versions: WeakValueDictionary[tuple[int, int], WeightVersion] = WeakValueDictionary()
        self._predicted: WeightVersion | None = None
        self._predicted_for: tuple[int, int] | None = None  # (version, horizon) of what _predicted holds
        self._changes_input: bool | None = None  # does the module write its input? None: not seen yet
        self._graph_bytes: dict[Any, int] = {}
        self._stash_peak = self._activations_peak = 0

    # -- F ------------------------------------------------------------------------------------------

    def forward(self, micro: MicroBatch, x: Tensor, target: Tensor | None = None) -> Tensor:
        """F(m).

        Args:
            micro: m.
            x: the stage's input.
            target: what the loss compares with, at the last stage.

        Returns:
            The output for the next stage, or the last stage's share of the loss (a scalar); detached.
        """
        self._spent = []
        leaf = self._own(x)
        autocast = AutocastState.now(leaf.device.type)
        delay = micro.minibatch - self.version
        held = _Held(micro, self.version, autocast, leaf, leaf.nbytes, target)
        if self.recomputes:
            stashes = self.method.backward_at == "stashed" and delay > 0
            weights = self._version(micro, delay) if stashes else self._prediction(micro, delay)
            held.weights = weights if stashes else None
            with torch.no_grad():
                out = self._run(held, leaf, weights, move_buffers=False)
        else:
            held.weights = self._version(micro, delay) if delay > 0 and self.trains else None
            out = self._graph(held)
            held.nbytes += self._graph_bytes_of(held)
        self._stash.append(held)
        self._note_peak(0)
        return out.detach()

    def _own(self, x: Tensor) -> Tensor:
        """The input, detached, on this stage's device; a copy of the caller's tensor where it outlives the step."""
        source = x
        x = x.detach()
        if self.device is not None and x.device != self.device:
            x = x.to(self.device, non_blocking=x.device.type != "cpu")
        if self.index == 0 and not self.method.flush and self.distance and x.data_ptr() == source.data_ptr():
            x = aligned_clone(x)
        if self.needs_input_grad and (x.is_floating_point() or x.is_complex()):
            x.requires_grad_()
        return x

    def _prediction(self, micro: MicroBatch, horizon: int) -> WeightVersion | None:
        """The predicted weights, in the stage's one buffer for them; None where nothing is predicted."""
        if self.predictor is None or horizon == 0:
            return None
        if self._predicted is None:
            self._predicted = WeightVersion(self.parameters)
        key = (self.version, horizon)
        if self._predicted_for != key or not isinstance(self.predictor, BuiltInPredictor):
            self._predict_into(self._predicted, micro, horizon)
            self._predicted_for = key
        return self._predicted

    def _version(self, micro: MicroBatch, horizon: int) -> WeightVersion | None:
        """A copy of the weights that F reads, shared by the micro-batches that read the same."""
        if not self.parameters:
            return None
        shared = self.predictor is None or isinstance(self.predictor, BuiltInPredictor)
        key = (self.version, 0 if self.predictor is None else horizon)
        version = self._versions.get(key) if shared else None
        if version is None:
            version = WeightVersion(self.parameters)
            if self.predictor is not None:
                self._predict_into(version, micro, horizon)
            else:
                with torch.no_grad():
                    for t, p in zip(version.tensors, self.parameters, strict=True):
                        t.copy_(p)
            if shared:
                self._versions[key] = version
        return version

    def _predict_into(self, version: WeightVersion, micro: MicroBatch, horizon: int) -> None:
        assert self.predictor is not None
        assert self.optimizer is not None
        with torch.no_grad(), self._shrunk_lr():
            self.predictor(
                self.parameters,
                self.optimizer,
                horizon,
                version.tensors,
                stage=self.index,
                microbatch=micro.index,
                version=self.version,
            )

    # -- B ------------------------------------------------------------------------------------------

    def recompute(self) -> None:
        """The part of the next B that needs no gradient: repeat its forward, with a graph."""
        self._spent = []
        held = self._stash[0]
        if not held.has_graph:
            self._graph(held)
            self._note_peak(self._graph_bytes_of(held))

    def backward(self, grad: Tensor | None) -> Tensor | None:
        """B of the oldest micro-batch in the stash.

        Args:
            grad: of its output, from the next stage; None at the last, or where no gradient comes.

        Returns:
            The gradient of its input, or None where there is none.
        """
        self.recompute()
        held = self._stash.popleft()
        assert self.version == held.micro.minibatch, "B(m) happens at version b(m)"
        self.delays[self.version - held.version] += 1
        root = held.root
        if root is None or (grad is None and self.loss_fn is None):
            return None
        if grad is not None:
            if self.device is not None and grad.device != self.device:
                grad = grad.to(self.device, non_blocking=grad.device.type != "cpu")
            if self.method.grad_shrink != 1:
                grad = grad * self.method.grad_shrink
        leaves = self.parameters if held.weights is None else held.weights.leaves
        for leaf, gradient in zip(leaves, self.gradients, strict=True):
            leaf.grad = gradient
        with torch.autocast(held.autocast.device_type, enabled=False):
            torch.autograd.backward((root,), (grad,))  # type: ignore[arg-type]
        for i, leaf in enumerate(leaves):
            self.gradients[i], leaf.grad = leaf.grad, None
        return held.leaf.grad

    def _graph(self, held: _Held) -> Tensor:
        """Run with a graph and remember where its differentiation starts."""
        key = (held.leaf.shape, held.leaf.dtype, held.autocast, self.module.training)
        with torch.enable_grad():
            if key in self._graph_bytes:
                out = self._run(held, held.leaf, held.weights)
            else:  # weigh the graph, once for each kind of input
                known = itertools.chain(self.module.parameters(), self.module.buffers(), [held.leaf])
                known = itertools.chain(known, held.weights.leaves if held.weights else [])
                seen = {t.untyped_storage().data_ptr() for t in known}
                sizes: dict[int, int] = {}

                def weigh(t: Tensor) -> Tensor:
                    storage = t.untyped_storage()
                    if storage.data_ptr() not in seen:
                        sizes[storage.data_ptr()] = storage.nbytes()
                    return t

                with torch.autograd.graph.saved_tensors_hooks(weigh, lambda t: t):
                    out = self._run(held, held.leaf, held.weights)
                self._graph_bytes[key] = sum(sizes.values())
        held.has_graph = True
        if out.requires_grad:
            # Not the output itself: the next stage has it, and this one need not hold it for its backward.
            held.root = out if self.loss_fn is not None else get_gradient_edge(out)
        return out

    def _graph_bytes_of(self, held: _Held) -> int:
        return self._graph_bytes[held.leaf.shape, held.leaf.dtype, held.autocast, self.module.training]

    # -- the module -----------------------------------------------------------------------------------

    def _run(self, held: _Held, x: Tensor, weights: WeightVersion | None, *, move_buffers: bool = True) -> Tensor:
        """The module's forward (and at the last stage the loss), as micro-batch m must see it every time."""
        tensors: dict[str, Tensor] = {}
        if weights is not None:
            tensors.update(zip(self.names, weights.leaves, strict=True))
        if not move_buffers:
            tensors.update((name, buffer.clone()) for name, buffer in self.module.named_buffers())
        # A module that writes its input (an in-place ReLU at its front) would write the stash, or what the stage
        # before has saved. The first run, on a copy, shows whether it does; one that does gets a copy every time.
        argument = aligned_clone(x) if self._changes_input is not False else x
        before = argument._version
        with self.rng(held.micro.index), held.autocast.region():
            out = functional_call(self.module, tensors, (argument,)) if tensors else self.module(argument)
            if not isinstance(out, Tensor):
                raise TypeError(f"its output is a {type(out).__name__}; a stage passes on one tensor")
            if self.loss_fn is not None:
                out = self._loss(out, held)
        if argument._version != before:
            if self._changes_input is False:
                raise RuntimeError(
                    "the stage changed its input in place, and did not when it was first tried; make its first "
                    "operation out of place (inplace=False)"
                )
            self._changes_input = True
        elif self._changes_input is None:
            self._changes_input = False
        return out

    def _loss(self, out: Tensor, held: _Held) -> Tensor:
        assert self.loss_fn is not None
        assert held.target is not None
        loss = self.loss_fn(out, held.target.to(out.device))
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"loss_fn returned a {type(loss).__name__}; it returns a scalar tensor, the mean over samples"
            )
        if loss.dim():
            raise ValueError(
                f"loss_fn returned a tensor of shape {tuple(loss.shape)}; it returns a scalar, the mean over samples "
                "(reduction='mean')"
            )
        return loss * held.micro.share

    def rng(self, microbatch: int) -> Any:
        """The context in which this stage draws for ``microbatch``."""
        return seeded(microbatch_seed(self.seed, self.replica, self.index, microbatch), self.device)

    @torch.no_grad()
    def infer(self, x: Tensor) -> Tensor:
        """The output in eval mode, at the weights of now."""
        if self.device is not None:
            x = x.to(self.device)
        modes = {module: module.training for module in self.module.modules()}
        try:
            self.module.eval()
            with self.rng(-1):
                out: Tensor = self.module(x if self._changes_input is False else x.clone())
        finally:
            for module, training in modes.items():
                module.training = training
        return out

    # -- U ------------------------------------------------------------------------------------------

    def update(self) -> None:
        """U: one optimizer step with the gradients of a mini-batch."""
        if self.optimizer is not None:
            for p, gradient in zip(self.parameters, self.gradients, strict=True):
                p.grad = gradient
            with self._shrunk_lr():
                self.optimizer.step()
            # Freed with the stage's next work, not here: a heap that is empty between two steps goes back to the
            # system and is faulted in again, a tenth of a small network's step.
            self._spent, self.gradients = self.gradients, [None] * len(self.parameters)
            for p in self.parameters:
                p.grad = None
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        self.version += 1

    @contextmanager
    def _shrunk_lr(self) -> Iterator[None]:
        """lr * lr_shrink**d, out of the scheduler's sight."""
        if self.lr_factor == 1 or self.optimizer is None:
            yield
            return
        groups = self.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        try:
            for group in groups:
                group["lr"] = group["lr"] * self.lr_factor
            yield
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate

    # -- what it holds ------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """Micro-batches between their F and their B."""
        return len(self._stash)

    def forget_predictions(self) -> None:
        """What was predicted from other weights than those of now."""
        self._predicted_for = None
        self._versions.clear()

    def drop(self) -> None:
        """Forget what is in flight."""
        self._stash.clear()
        self._predicted = None
        self.forget_predictions()
        self.gradients, self._spent = [None] * len(self.parameters), []

    def _stash_bytes(self) -> int:
        versions = {id(held.weights): held.weights.nbytes for held in self._stash if held.weights is not None}
        return sum(held.nbytes for held in self._stash) + sum(versions.values())

    def _note_peak(self, graph_bytes: int) -> None:
        stash = self._stash_bytes()
        self._stash_peak = max(self._stash_peak, stash)
        self._activations_peak = max(self._activations_peak, stash + graph_bytes)

    def memory(self) -> dict[str, int]:
        """Bytes held, as in `Pipeline.memory`."""
        state = self.optimizer.state.values() if self.optimizer is not None else ()
        return {
            "weights": sum(t.nbytes for t in itertools.chain(self.module.parameters(), self.module.buffers())),
            "predicted": self._predicted.nbytes if self._predicted is not None else 0,
            "optimizer": sum(t.nbytes for entry in state for t in entry.values() if isinstance(t, Tensor)),
            "gradients": sum(g.nbytes for g in [*self.gradients, *self._spent] if g is not None),
            "stash": self._stash_bytes(),
            "stash_peak": self._stash_peak,
            "activations_peak": self._activations_peak,
        }
