"""One stage: its forward, its backward, its update, and what it keeps in between.

For micro-batch m of mini-batch b, at a stage whose weights have had v updates (delay = b - v)::

                    keep="graph"                             keep="input"

    F(m)     1. weights: those of now, or a copy where a graph on them meets an update, predicted over the delay if the
                method predicts
             2. run with a graph on that copy                2. run without a graph; moves buffers ahead
             3. keep the graph (and so the copy)             3. keep the input; the copy too for "stashed"

    B(m)                                                     4. run again, with a graph, at the weights of
                                                                now (or at the copy); buffers move here
             5. differentiate, add to the stage's gradients  5. the same

    U        6. is the gradient finite? clip it
             7. gradients into p.grad, optimizer.step(), lr_scheduler.step()

The last stage, whose B follows its F at once, always keeps its graph (unless all forwards come first). So does every stage
with a loss of its own, which is that of its auxiliary network on its output.
A kept graph never stands on the parameters themselves when an update comes before its backward: the
update would change tensors that the graph has saved. It stands on leaves of its own, which are in the
parameters' places while the module runs.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.optim import Optimizer

from ..measure.memory import StageSizes, footprint, optimizer_bytes
from ..measure.prediction_error import Gauge
from ..methods import Keep, Method
from ..predict import as_predictor
from ..schedule import lead
from ..tensors.autocast import AutocastState
from ..tensors.compile import compiled
from ..tensors.layout import aligned_clone, parts_of
from ..tensors.module_mode import in_modes, modes_of
from ..tensors.nbytes import states_bytes, tensor_bytes, value_bytes
from ..tensors.parameter_hooks import attach
from ..tensors.pytree import flatten, map_tensors, tensors_of, unflatten
from ..tensors.rng import Draws
from .forward import LossFn, Moves, Repeatable
from .gradients import GradientRule, gradient_norm
from .local_loss import WithAux
from .optimizer_step import Updates
from .reach import Reach, strange_leaves
from .repetition import Repetition, sizes_of
from .saved_tensors import NOT_WEIGHED, weigh_graph
from .stash import Held, MicroBatch, WeightVersion, stash_bytes
from .tied import Tie
from .weight_versions import Versions


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
        loss_fn: the loss, at a stage that has one: the last, or each.
        reach: what tells whose tensors are whose, in the first mini-batch; None: nobody asks.
        aux: what comes between the output and a loss of the stage's own, as a submodule of the whole; None at the last.
        needs_input_grad: whether any stage before has something to train.
        device: where the stage works.
        seed, replica: see `dtrp.tensors.rng`.
        num_microbatches: A, where the stage decides by itself what it keeps.
        memory_limit_bytes: None: the stage keeps what its method says. Else it looks at its first input, and keeps its
            graphs where they fit, and its inputs where they do not.
        rule: what is done with gradients that are too long or not finite.
        compile: arguments of `torch.compile` for the module; None: it runs as it is.
        ties: parameters that other stages hold too; those that an earlier one owns have no part in this one's optimizer.
        call: runs the module on a stage's input; None: the module is called with it.
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
        reach: Reach | None = None,
        aux: tuple[str, nn.Module] | None = None,
        needs_input_grad: bool,
        device: torch.device,
        seed: int,
        replica: int = 0,
        num_microbatches: int = 1,
        memory_limit_bytes: int | None = None,
        rule: GradientRule | None = None,
        compile: Mapping[str, Any] | None = None,
        ties: Sequence[Tie] = (),
        call: Callable[[Any], Any] | None = None,
    ) -> None:
        self.index = index
        self.num_stages, self.num_microbatches = num_stages, num_microbatches
        self.memory_limit_bytes = memory_limit_bytes
        self.module = module
        self.aux = None if aux is None else aux[1]
        self.whole: nn.Module = module if aux is None else WithAux(module, *aux)  # what is trained here
        named = [(name, p) for name, p in self.whole.named_parameters() if p.requires_grad]
        for name, t in [*named, *self.whole.named_buffers()]:
            _check_layout(t, f"{name} of stage {index}")
        self.compiles = compile is not None
        self.replica = replica
        self.draws = Draws(seed, replica, index, device)
        self.repeatable = Repeatable(
            self.whole,
            module,
            call or (module if compile is None else compiled(module, compile)),
            self.aux if compile is None or self.aux is None else compiled(self.aux, compile),
            loss_fn,
            is_last=index == num_stages - 1,
            draws=self.draws,
            reach=reach,
            compiles=self.compiles,
        )
        self.method = method
        self.device = device
        self.loss_fn = loss_fn
        self.distance = num_stages - 1 - index
        self.needs_input_grad = needs_input_grad
        self._named = dict(named)
        self.names = [name for name, _ in named]
        self.parameters = [p for _, p in named]
        for p in self.parameters:
            p.grad = None
        self.repetition = Repetition(self.repeatable, self.whole, self.parameters)
        self.ties = [tie for tie in ties if index in tie.names]
        others = {tie.names[index][0] for tie in self.ties if tie.owner != index}
        # By every name of its trained parameters, in whichever stage, the one it goes by here.
        firsts = {id(p): name for name, p in named}
        everywhere = self.whole.named_parameters(remove_duplicate=False)
        self.called = {name: firsts[id(p)] for name, p in everywhere if id(p) in firsts}
        self._tied: set[str] = set()
        for tie in self.ties:
            if tie.trained:
                self._tied.add(tie.names[index][0])
                self.called |= {name: tie.names[index][0] for names in tie.names.values() for name in names}
        own = [p for name, p in named if name not in others]
        self.optimizer = optimizer(own) if own else None
        self.lr_scheduler = lr_scheduler(self.optimizer) if lr_scheduler and self.optimizer else None
        # A frozen front part has nothing to differentiate, so nothing to keep and nothing to repeat.
        self.trains = bool(self.parameters) or needs_input_grad
        assert not (method.local and self.trains and loss_fn is None), "it has a loss of its own"
        self.recomputes = self.trains and method.recomputes(num_stages, index)
        self.has_decided = memory_limit_bytes is None or not self.trains
        # Whether another F may come before a graph's B.
        self.holds_graphs = method.forward_all or lead(method, num_stages, index) > 0
        self.rule = rule or GradientRule()
        self.updates = Updates(
            index, self._named, self.optimizer, self.lr_scheduler, self.rule,
            lr_factor=method.lr_shrink**self.distance, device=device,
        )  # fmt: skip
        predictor = as_predictor(method.predict) if self.distance > 0 and self.parameters else None
        self.versions = Versions(index, self.parameters, self.optimizer, predictor, self.updates.shrunk_lr)

        self.version = 0  # updates made, those that were left out counted
        self.gradients: list[Tensor | None] = [None] * len(self.parameters)
        self.delays: Counter[int] = Counter()
        self.stash_peak = self.activations_peak = self.gradients_peak = 0  # bytes
        self.gauge: Gauge | None = None  # of the distance from the weights read to the true ones
        self._spoiled: list[Tensor] = []  # of the mini-batch's micro-batches: whether their loss was not finite
        self._spent: list[Tensor | None] = []  # the gradients of the last update
        self.stash: deque[Held] = deque()
        self._prepared: WeightVersion | None = None  # made ahead of its F, which finds it among the shared ones
        self._graph_bytes: dict[Any, int] = {}
        self._wanting: dict[Any, list[bool]] = {}  # which tensors of an output have a gradient, by its form
        self._begun = False  # whether there has been an F
        self._read_copies = False  # whether there has been a graph on copies of the parameters

    # -- F ------------------------------------------------------------------------------------------

    def prepare(self, microbatch: int, minibatch: int) -> None:
        """The part of the next F that needs no input: the weights it is going to read, and the seed of its draws."""
        self.draws.seed_of(microbatch)  # which is remembered
        if self.versions.alike:
            self._prepared = self._weights(microbatch, minibatch - self.version)

    def forward(self, micro: MicroBatch, x: Any, target: Any = None) -> Any:
        """F(m).

        Args:
            micro: m.
            x: the stage's input, a tensor or a tree of them.
            target: what the loss compares with, at a stage that has one.

        Returns:
            The output for the next stage, a tensor or a tree of them, each requiring a gradient if it wants one back; or
            the last stage's share of the loss (a scalar), detached.
        """
        self.rest()
        leaf = self._own(x)
        if not self.has_decided:
            self._decide(micro, leaf, target)
        is_first, self._begun = not self._begun, True
        weights = self._weights(micro.index, micro.minibatch - self.version)
        if self.gauge is not None and self.trains:
            read = self.parameters if weights is None else weights.tensors
            self.gauge.forward(micro.index, micro.minibatch - self.version, read, self.parameters)
        held = Held(micro, self.version, self._autocast_now(), leaf, value_bytes(leaf), target)
        if not self.trains:
            with torch.enable_grad():  # of nothing here; a module may differentiate something of its own
                out, _ = self.repeatable.run(held, {})
            held.leaf, held.nbytes, held.has_graph = None, 0, True
        elif self.recomputes:
            held.weights = weights if self.method.backward_at == "stashed" else None
            before = self._writing(held.weights, is_first=is_first)
            out = self.repetition.forward(held, self._tensors(weights))
            self._check_unwritten(before, self._writing(held.weights, is_first=is_first))
        else:
            held.weights = weights
            before = self._writing(weights, is_first=is_first)
            out, graph_bytes = self._graph(held, "returned" if self.holds_graphs else "own")
            self._check_unwritten(before, self._writing(weights, is_first=is_first))
            held.nbytes += graph_bytes
        self._prepared = None
        self.stash.append(held)
        self._note_peak(0)
        if self.distance == 0:
            return out.detach()
        tensors, form = flatten(out)
        wanting = self._wants(held, tensors)
        passed = [aligned_clone(t) if self._is_weight(t) else t.detach() for t in tensors]
        return unflatten(form, iter([t.requires_grad_(each) for t, each in zip(passed, wanting, strict=True)]))

    def _writing(self, weights: WeightVersion | None, *, is_first: bool) -> tuple[list[Any], str]:
        """What tells whether a forward writes the copy that it reads: at first by whatever way."""
        if weights is None:
            return [], ""
        return [(t.data_ptr(), t._version) for t in weights.leaves], sizes_of(weights.tensors) if is_first else ""

    def _check_unwritten(self, before: tuple[list[Any], str], after: tuple[list[Any], str]) -> None:
        """Refuse a forward that has written its weights, which are a copy."""
        if before == after:
            return
        written = [name for name, a, b in zip(self.names, before[0], after[0], strict=False) if a != b]
        raise RuntimeError(
            f"the stage's forward writes {written[0] if written else 'its parameters'} (as nn.Embedding(max_norm=) does), and what "
            f"it reads by method {self.method.name!r} with keep={self.method.keep!r} is a copy, where that would be lost; pass "
            "method='bp', or one that recomputes at the weights of now (dtrp, dtr, fr); if it is once alone, by its first "
            "input, run the model once before"
        )

    def _wants(self, held: Held, tensors: list[Tensor]) -> list[bool]:
        """Which tensors of an output have a gradient: where it was made without a graph, by a trial with one."""
        if self.method.local or not self.trains:
            return [False] * len(tensors)
        if not self.recomputes:
            return [t.requires_grad for t in tensors]
        able = [t.is_floating_point() or t.is_complex() for t in tensors]
        if sum(able) < 2:  # why else would this stage be there
            return able
        key = (*((t.dtype, t.dim()) for t in tensors), self.module.training)
        if key not in self._wanting:
            trial = Held(held.micro, self.version, held.autocast, held.leaf, 0)
            self._graph(trial, "discarded")
            self._wanting[key] = [root is not None for root in trial.roots]
        held.wanting = self._wanting[key]
        return held.wanting

    def _autocast_now(self) -> AutocastState:
        return AutocastState.now(self.device.type)

    def _decide(self, micro: MicroBatch, leaf: Any, target: Any) -> None:
        """Keep graphs if they fit the memory limit, inputs if those do; what a graph takes is seen on a trial run."""
        trial = Held(micro, self.version, self._autocast_now(), leaf, value_bytes(leaf), target)
        if self.repeatable.changes_input is None:  # the first run is on a copy of the input, not to be weighed
            self._graph(trial, "discarded")
        out, graph_bytes = self._graph(trial, "discarded")
        sizes = StageSizes(
            weights=self._weights_bytes(),
            trained=sum(map(tensor_bytes, self.parameters)),
            optimizer=optimizer_bytes(self.optimizer) if self.optimizer is not None else 0,
            input=value_bytes(leaf),
            graph=graph_bytes,
            output=value_bytes(out),
        )
        del trial, out
        assert self.memory_limit_bytes is not None
        needs = {}
        keeps: tuple[Keep, ...] = ("graph", "input")
        for keep in keeps:
            method = self.method.keeping(keep)
            needs[keep] = footprint(method, self.num_stages, self.index, self.num_microbatches, sizes)
            if needs[keep].total <= self.memory_limit_bytes:
                self.method, self.has_decided = method, True
                self.recomputes = method.recomputes(self.num_stages, self.index)
                return
        least = min(needs.values(), key=lambda need: need.total)
        parts = ", ".join(f"{name} {size:,.0f}" for name, size in dataclasses.asdict(least).items() if size)
        raise MemoryError(
            f"stage {self.index} needs {least.total:,.0f} bytes at least ({parts}), {least.total - self.memory_limit_bytes:,.0f} "
            f"more than memory_limit_bytes={self.memory_limit_bytes:,}; raise it, or take smaller mini-batches, more "
            "micro-batches or more stages"
        )

    def _own(self, x: Any) -> Any:
        """The input, detached, on this stage's device; a copy of the caller's tensors where they outlive the step."""
        return map_tensors(self._own_tensor, x)

    def _own_tensor(self, x: Tensor) -> Tensor:
        leaf = x.detach()
        # Also for a stage that keeps nothing: what it passes on may be a view of its input.
        outlives = self.distance > 0 and not self.method.flush
        if leaf.device != self.device:
            leaf = _moved(leaf, self.device)
        elif self.index == 0 and outlives:
            leaf = aligned_clone(leaf)
        # The stage before says which of its outputs have one.
        return leaf.requires_grad_(self.needs_input_grad and x.requires_grad)

    def _is_weight(self, out: Tensor) -> bool:
        """Whether an output is (a view of) a tensor that will be written while a later stage keeps it."""
        on_copies = self.trains and not self.recomputes and self.holds_graphs
        buffers = () if on_copies else self.repeatable.written()
        places = [part.untyped_storage().data_ptr() for part in parts_of(out)]
        written = itertools.chain(self.parameters, self.versions.tensors(), buffers)
        return any(t.untyped_storage().data_ptr() in places for t in written)

    def _weights(self, microbatch: int, delay: int) -> WeightVersion | None:
        """What F reads; None for the weights of now, where nothing can write them before B, or B reads what they are then."""
        if not self.trains or self.method.flush or not self.holds_graphs:
            return None
        if self.recomputes and self.method.backward_at == "current":
            predicted = self.versions.predicted if delay else None
            return predicted and predicted(microbatch, self.version, delay, self._known_gradients)
        return self.versions.copied(microbatch, self.version, delay, self._known_gradients)

    def _known_gradients(self) -> dict[str, Any]:
        """What a predictor is told that uses gradients."""
        # A forward with a delay is of a later mini-batch than this version's, so all of its forwards are through.
        waiting = sum(held.micro.share for held in self.stash if held.micro.minibatch == self.version)
        known = any(gradient is not None for gradient in self.gradients)
        return {"gradients": self.gradients, "share": max(0.0, 1.0 - waiting) if known else 0.0}

    # -- B ------------------------------------------------------------------------------------------

    def recompute(self) -> None:
        """The part of the next B that needs no gradient: repeat its forward, with a graph."""
        self.rest()
        held = self.stash[0]
        if not held.has_graph:
            # In its own modes: the caller may have called eval() since.
            changed = held.modes not in ((), modes_of(self.module))
            with in_modes(self.module, held.modes) if changed else nullcontext():
                expected = self.repetition.expected(held)
                out, graph_bytes = self._graph(held)
            self._note_peak(graph_bytes)
            if expected is not None:
                self.repetition.check(held, expected, out)

    def backward(self, grad: Any) -> Any:
        """B of the oldest micro-batch in the stash.

        Args:
            grad: of its output, from the next stage: a tensor, or where the output was a tree a list with one for each
                tensor of it; None at the last, or where no gradient comes.

        Returns:
            The gradient of its input, in the same way; None where there is none.
        """
        self.recompute()
        held = self.stash.popleft()
        if not self.stash:
            self.repeatable.ahead = None
        assert self.version == held.micro.minibatch, "B(m) happens at version b(m)"
        self.delays[self.version - held.version] += 1
        if self.gauge is not None:
            self.gauge.backward(held.micro.index, self.version, self.parameters)
        starts = self._starts(held, grad)
        if not starts:
            return None
        spoiled = self._spoils(starts) if self.rule.on_nonfinite == "skip" else None
        leaves = self.parameters if held.weights is None else held.weights.leaves
        hooks = attach(self._named, leaves, self._tied)
        try:
            for leaf, gradient in zip(leaves, self.gradients, strict=True):
                leaf.grad = gradient
            # An activation checkpoint inside the module runs a part of it again: at the same weights.
            with self.repeatable.at(self._tensors(held.weights)), held.autocast._replace(enabled=False).region():
                torch.autograd.backward([root for root, _ in starts], [gradient for _, gradient in starts])  # type: ignore[arg-type]
        finally:
            for hook in hooks:
                hook.remove()
            for i, leaf in enumerate(leaves):
                self.gradients[i], leaf.grad = leaf.grad, None
        gradients = [each[0] if each else None for each in held.input_gradients]
        if spoiled is not None:
            self._spoiled.append(spoiled)
            for gradient in gradients:
                if gradient is not None:
                    _first(gradient).masked_fill_(spoiled, math.nan)
        if all(gradient is None for gradient in gradients):
            return None
        return gradients[0] if isinstance(held.leaf, Tensor) else gradients

    def _starts(self, held: Held, grad: Any) -> list[tuple[Tensor | GradientEdge, Tensor | None]]:
        """Where differentiation starts, and with what gradient."""
        if self.loss_fn is not None:
            if not held.roots:
                return []
            (root,) = held.roots
            assert isinstance(root, Tensor)
            return [(root, None)]
        starts: list[tuple[Tensor | GradientEdge, Tensor | None]] = []
        for root, gradient in zip(held.roots, grad if isinstance(grad, list) else [grad], strict=False):
            if root is None or gradient is None:
                continue
            if gradient.device != self.device:
                gradient = _moved(gradient, self.device)
            if self.method.grad_shrink != 1:
                gradient = gradient * self.method.grad_shrink
            starts.append((root, gradient))
        return starts

    def _spoils(self, starts: list[tuple[Tensor | GradientEdge, Tensor | None]]) -> Tensor:
        """Whether the loss of the micro-batch was not finite, which its gradient may not show: a scalar, not waited for.

        A mask or an ignored label hides a nan on its way back, so that of the gradient that is sent the first entry tells.
        """
        root, _ = starts[0]
        if self.loss_fn is not None:
            assert isinstance(root, Tensor)
            return ~torch.isfinite(root.detach())
        return torch.stack([_first(gradient).isnan().any() for _, gradient in starts if gradient is not None]).any()

    def settle(self) -> None:
        """Make the gradient of a mini-batch that has met a loss that was not finite so as well, all of it."""
        if self._spoiled and torch.stack(self._spoiled).any():
            self.gradients = [torch.full_like(p, math.nan) for p in self.parameters]
        self._spoiled = []

    def newest_loss(self) -> Tensor | None:
        """Of the last F, at a stage that has a loss."""
        (root, *_) = self.stash[-1].roots if self.loss_fn is not None else (None,)
        return root.detach() if isinstance(root, Tensor) else None

    def _graph(self, held: Held, buffers: Moves = "own") -> tuple[Any, int]:
        """Run with a graph and remember where its differentiation starts; (output, bytes of the graph)."""
        inputs = tensors_of(held.leaf)
        held.modes = held.modes or modes_of(self.module)
        key = (*((t.shape, t.dtype) for t in inputs), held.autocast, held.modes)
        nbytes = self._graph_bytes.get(key)
        with torch.enable_grad():
            if nbytes is not None:
                out, loss = self.repeatable.run(held, self._tensors(held.weights), buffers)
            else:  # once for each kind of input; 0 where it saves nothing, or nobody could look
                known = [*inputs, *(held.weights.leaves if held.weights else [])]
                first = self.repeatable.changes_input is None
                (out, loss), sizes = weigh_graph(
                    lambda: self.repeatable.run(held, self._tensors(held.weights), buffers), self.whole, known
                )
                if sizes is None and not self.has_decided:
                    raise ValueError(f"keep='auto' at stage {self.index}: {NOT_WEIGHED}; pass keep='graph' or 'input'")
                nbytes = sum((sizes or {}).values())
                if not first:
                    self._graph_bytes[key] = nbytes
        held.has_graph = True
        if held.weights is not None and not self._read_copies:
            self._read_copies = True
            self._check_read([*tensors_of(out), *tensors_of(loss)])
        if held.met is not None:
            nbytes += sum(map(tensor_bytes, filter(torch.is_tensor, held.met.moved.values())))
        if loss is None:
            # Not the output itself: the next stage has it, and this one need not hold it for its backward.
            held.roots = [get_gradient_edge(t) if t.requires_grad else None for t in tensors_of(out)]
            if any(root is not None and not each for root, each in zip(held.roots, held.wanting, strict=False)):
                raise RuntimeError(
                    "an output of the stage has a gradient now and had none when it was first tried; let it always have one, or "
                    "never (return it detached)"
                )
        elif loss.requires_grad:
            held.roots = [loss]
        else:
            raise ValueError("the loss has no gradient; loss_fn must not detach it or compute it under no_grad")
        return out, nbytes

    def _check_read(self, made: list[Tensor]) -> None:
        """Refuse a graph that stands on the parameters themselves, where they have copies in their places."""
        names = {id(p): name for name, p in self._named.items()}
        for leaf in strange_leaves(made, set(), list):
            if id(leaf) in names:
                raise RuntimeError(
                    f"the stage's forward reads {names[id(leaf)]} not as an attribute of its module (from a list, or a variable of "
                    f"a function), and what it is to read by method {self.method.name!r} with keep={self.method.keep!r} is a copy "
                    "there; read it there, or pass method='bp', or one that recomputes at the weights of now (dtrp, dtr, fr)"
                )

    def _tensors(self, weights: WeightVersion | None) -> dict[str, Tensor]:
        return {} if weights is None else dict(zip(self.names, weights.leaves, strict=True))

    @torch.no_grad()
    def infer(self, x: Any) -> Any:
        """The output in eval mode, at the weights of now."""
        return self.repeatable.infer(map_tensors(lambda t: _moved(t, self.device), x))

    # -- U ------------------------------------------------------------------------------------------

    def gradient_norm(self) -> float:
        """Of the mini-batch's gradient at this stage; not finite where the gradient is not."""
        return float(gradient_norm(self.gradients))

    def update(self, norms: Sequence[float] | None = None) -> None:
        """U: one optimizer step with the gradients of a mini-batch.

        Args:
            norms: of every stage's gradient, where the rule is about all of them together.

        Raises:
            StageError: as of `Updates.step`.
        """
        if self.optimizer is not None:
            self.updates.step(self.version, self.gradients, norms)
            # Freed with the stage's next work, not here: a heap that is empty between two steps goes back to the
            # system and is faulted in again, a tenth of a small network's step.
            self._spent, self.gradients = self.gradients, [None] * len(self.parameters)
            self.gradients_peak = max(self.gradients_peak, self._gradients_bytes())
        self.version += 1

    def check_gradients(self) -> None:
        """Refuse a gradient that was not finite and has been applied: an accelerator answers when it comes to it."""
        self.settle()
        self.updates.check()

    # -- what it holds ------------------------------------------------------------------------------

    def keep_as(self, keep: Keep | None) -> None:
        """Go on as a stage that has decided to keep its graphs or its inputs; None: as one that has not decided yet."""
        if keep is not None and self.method.keep != keep:
            self.method = self.method.keeping(keep)
            self.recomputes = self.trains and self.method.recomputes(self.num_stages, self.index)
        self.has_decided = keep is not None

    @property
    def in_flight(self) -> int:
        """Micro-batches between their F and their B."""
        return len(self.stash)

    def restore(self, held: Held, *, has_graph: bool) -> None:
        """Add a micro-batch of a checkpoint to the stash; where it had a graph, that is made again from its input."""
        if has_graph and self.trains:
            with in_modes(self.module, held.modes):
                self._graph(held, "discarded")
        held.has_graph = has_graph
        self.stash.append(held)

    def check_trainable(self) -> None:
        """Refuse parameters that were frozen, freed or replaced since the stage was made: its optimizer would not know."""
        now = {name: p for name, p in self.whole.named_parameters() if p.requires_grad}
        if list(now) != self.names:
            changed = sorted(set(now) ^ set(self.names))[0]
            raise RuntimeError(
                f"requires_grad of {changed} has changed since the pipeline was made; make a new Pipeline"
            )
        for name, p in self._named.items():
            if now[name] is not p:
                raise RuntimeError(
                    f"{name} is another tensor than when the pipeline was made, and its optimizer has the one of then "
                    "(load_state_dict(assign=True) does so); write into the one that is there, or make a new Pipeline"
                )

    def index_of(self, tie: Tie) -> int:
        """The index of a tied parameter among those that the stage trains."""
        return self.names.index(tie.names[self.index][0])

    def take_gradient(self, tie: Tie) -> Tensor | None:
        """This stage's part of the gradient of a tied parameter, which leaves the stage.

        Raises:
            TypeError: the gradient is sparse.
        """
        place = self.index_of(tie)
        gradient, self.gradients[place] = self.gradients[place], None
        if gradient is not None and gradient.layout is not torch.strided:
            raise TypeError(
                f"the gradient of {tie.name} is sparse, and stages that share a parameter add up dense ones; make the embedding "
                "with sparse=False"
            )
        return gradient

    def add_gradients(self, tie: Tie, parts: Sequence[Tensor | None]) -> None:
        """Add the other holders' ``parts`` to the gradient of a tied parameter of this stage, in the order of the stages."""
        present = [part for part in (self.take_gradient(tie), *parts) if part is not None]
        self.gradients[self.index_of(tie)] = functools.reduce(torch.add, present) if present else None

    def rest(self) -> None:
        """Let go of the gradients of the last update."""
        self._spent = []

    def forget_predictions(self) -> None:
        """What was predicted from other weights than those of now."""
        self._prepared = None
        self.versions.forget()

    def drop(self) -> None:
        """Forget what is in flight."""
        self.rest()
        self._spoiled = []
        self.updates.drop()
        self.stash.clear()
        self.repeatable.ahead = None
        if self.gauge is not None:
            self.gauge.drop()
        self._prepared = None
        self.versions.drop()
        self.gradients = [None] * len(self.parameters)

    def _note_peak(self, graph_bytes: int) -> None:
        stash = stash_bytes(self.stash)
        self.stash_peak = max(self.stash_peak, stash)
        self.activations_peak = max(self.activations_peak, stash + graph_bytes)

    def _gradients_bytes(self) -> int:
        return sum(tensor_bytes(g) for g in [*self.gradients, *self._spent] if g is not None)

    def _weights_bytes(self) -> int:
        return sum(map(tensor_bytes, itertools.chain(self.whole.parameters(), self.whole.buffers())))

    def memory(self) -> dict[str, int]:
        """Bytes held, as in `Pipeline.memory`."""
        states = self.optimizer.state.values() if self.optimizer is not None else ()
        return {
            "weights": self._weights_bytes(),
            "buffers": self.repeatable.ahead_bytes,
            "predicted": self.versions.nbytes,
            "optimizer": states_bytes(states),
            "gradients": self._gradients_bytes(),
            "gradients_peak": self.gradients_peak,
            "stash": stash_bytes(self.stash),
            "stash_peak": self.stash_peak,
        }


def _check_layout(t: Tensor, what: str) -> None:
    """Refuse a parameter without strides, and a buffer that nothing can copy."""
    if t.is_nested or t.is_mkldnn or (t.requires_grad and t.layout is not torch.strided):
        raise TypeError(
            f"{what} is a {'nested' if t.is_nested else str(t.layout).removeprefix('torch.')} tensor; parameters that are trained "
            "have strides, and buffers have them or are sparse: make it a dense one"
        )


def _first(x: Tensor) -> Tensor:
    """The first entry, in its place, if there is one; of a sparse tensor, which may travel in another order, all."""
    return x._values() if x.is_sparse else x[(slice(1),) * x.dim()]


def _moved(x: Tensor, device: torch.device) -> Tensor:
    """``x`` on ``device``; between accelerators without waiting (a CPU would read it too early)."""
    return x.to(device, non_blocking=x.device.type != "cpu" and device.type != "cpu")
