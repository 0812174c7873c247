"""One stage: its forward (F), its backward (B), its update (U), and what it keeps in between.

For micro-batch m of mini-batch b, at a stage whose weights have had v updates (delay = b - v)::

                    keep="graph"                             keep="input"

    F(m)     1. weights: the present ones, or a copy where a graph on them meets an update, predicted over the delay
                if the method predicts
             2. run with a graph on that copy                2. run without a graph; moves buffers ahead
             3. keep the graph (and so the copy)             3. keep the input; the copy too for "stashed"

    B(m)                                                     4. run again, with a graph, at the present weights
                                                                (or at the copy); buffers move now
             5. differentiate, add to the stage's gradients  5. the same

             In two parts: I differentiates down to the input, and leaves for W what the weights' gradients are made of
             (`dtrp.stage.deferral`); R is 4.

    U        6. is the gradient finite? clip it
             7. gradients into p.grad, optimizer.step(), lr_scheduler.step()

The last stage, whose B follows its F at once, always keeps its graph (unless all forwards come first). So does every
stage with a local loss, which is that of its auxiliary network on its output.
A kept graph is never built on the parameters themselves when an update comes before its backward: the
update would change tensors that the graph has saved. It is built on leaves with copies of their values, which are in
the parameters' places while the module runs.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ..measure.graph_size import NOT_WEIGHED, weigh_graph
from ..measure.memory import StageSizes, choose_keep, optimizer_bytes
from ..measure.prediction_error import PredictionErrorGauge
from ..methods import Keep
from ..optim.factories import group_options, is_by_place, with_keywords
from ..predict import as_predictor, linear
from ..schedule import most_in_flight, steady_delay
from ..tensors.autocast import AutocastState
from ..tensors.layout import aligned_clone, edge_of, parts_of
from ..tensors.module_mode import in_modes, modes_of
from ..tensors.nbytes import states_bytes, tensor_bytes, value_bytes
from ..tensors.parameter_hooks import attach
from ..tensors.pytree import flatten, map_tensors, tensors_of, unflatten
from ..tensors.rng import generator
from ..tensors.torch_private import has_gradient_hooks
from ..typing import Tree
from .deferral import Division, receiving
from .deferral.trying import Tried
from .forward import Moves, RepeatableForward
from .gradients import gradient_norm, mark_nonfinite, shows_nonfinite
from .optimizer_step import OptimizerSteps
from .reach import Reach, strange_leaves
from .repetition import Repetition, repeating, sizes_of
from .specs import StageNetwork, StagePosition, StageTraining
from .stash import MicroBatch, StashEntry, WaitingWeights, stash_bytes
from .tied import Tie
from .weight_versions import WeightVersion, WeightVersions, weight_marks

Gradients = Tensor | list[Tensor | None] | None  # of a tensor; of a tree, one for each tensor of it


class Stage:
    """A contiguous part of the network with its optimizer.

    The engine calls `forward`, `backward` and `update` in the order of the schedule, and passes on what
    they return. Nothing in a stage waits, sends or decides an order.

    Args:
        position: where it stands among the stages.
        network: what it computes.
        training: how it is trained.
        reach: knows which tensors belong to which stage, in the first mini-batch; None: nothing is checked.
    """

    def __init__(
        self, position: StagePosition, network: StageNetwork, training: StageTraining, reach: Reach | None = None
    ) -> None:
        self.index, self.num_stages, self.replica = position.index, position.num_stages, position.replica
        self.device, self.draws = position.device, position.draws()
        self.distance = position.num_stages - 1 - position.index
        self.method, self.rule = training.method, training.rule
        self.num_microbatches, self.memory_limit_bytes = training.num_microbatches, training.memory_limit_bytes
        self.module, self.whole, self.loss_fn = network.module, network.whole, network.loss_fn
        self.aux = None if network.aux is None else network.aux[1]
        self.section = network.section
        self.compiles, self.needs_input_grad = network.compile is not None, network.needs_input_grad
        self._named = {name: p for name, p in self.whole.named_parameters() if p.requires_grad}
        self.names, self.parameters = list(self._named), list(self._named.values())
        for name, t in [*self._named.items(), *self.whole.named_buffers()]:
            _check_layout(t, f"{name} of stage {self.index}")
        for p in self.parameters:
            p.grad = None
        self.repeatable = RepeatableForward(network, self.draws, reach, is_last=position.is_last)
        divides = self.method.split_backward and not self.compiles and bool(self.parameters)
        self.division = Division(self.whole, self.parameters) if divides else None
        self._division_tried = False
        self._deferred_bytes = 0  # what the weights' gradients of one micro-batch wait with
        self.repetition = Repetition(self.repeatable, self.whole, self.parameters)
        self._note_ties(network.ties)
        # A frozen front part has nothing to differentiate, so nothing to keep and nothing to repeat.
        self.trains = bool(self.parameters) or self.needs_input_grad
        assert not (self.method.local and self.trains and self.loss_fn is None), "every stage has a local loss"
        self.recomputes = self.trains and self.method.recomputes(self.num_stages, self.index)
        self.has_decided = self.memory_limit_bytes is None or not self.trains
        # Whether another F may come before a graph's B.
        self.holds_graphs = self.method.forward_all or most_in_flight(self.method, self.num_stages, self.index) > 0
        self._make_optimizer(training)

        self.num_infers = 0  # calls of `infer`
        self.version = 0  # updates made, skipped ones included
        self.gradients: list[Tensor | None] = [None] * len(self.parameters)
        self.delays: Counter[int] = Counter()
        self.stash_peak = self.activations_peak = self.gradients_peak = 0  # bytes
        self.gauge: PredictionErrorGauge | None = None  # of the distance from the weights read to the true ones
        self.stash: deque[StashEntry] = deque()  # the micro-batches between their F and their B, the oldest first
        self._waiting: deque[WaitingWeights] = deque()  # those between the two parts of their B
        self._spoiled: list[Tensor] = []  # for each micro-batch of the mini-batch, whether its loss was not finite
        self._spent: list[Tensor | None] = []  # the gradients of the last update
        self._prepared: WeightVersion | None = None  # made ahead of its F, which finds it among the shared ones
        self._graph_bytes: dict[Any, int] = {}  # by the kind of input
        self._wanting: dict[Any, list[bool]] = {}  # which tensors of an output require a gradient, by its form
        self._begun = False  # whether there has been an F
        self._read_copies = False  # whether there has been a graph on copies of the parameters

    def _note_ties(self, ties: Sequence[Tie]) -> None:
        self.ties = [tie for tie in ties if self.index in tie.names]
        # For every name of a trained parameter, in whichever stage, the name that this stage uses.
        firsts = {id(p): name for name, p in self._named.items()}
        everywhere = self.whole.named_parameters(remove_duplicate=False)
        self.called = {name: firsts[id(p)] for name, p in everywhere if id(p) in firsts}
        self._tied = {tie.names[self.index][0] for tie in self.ties if tie.trained}
        for tie in self.ties:
            if tie.trained:
                self.called |= {name: tie.names[self.index][0] for names in tie.names.values() for name in names}

    def _make_optimizer(self, training: StageTraining) -> None:
        others = {tie.names[self.index][0] for tie in self.ties if tie.owner != self.index}
        named = [(name, p) for name, p in self._named.items() if name not in others]
        place = {
            "stage": self.index,
            "num_stages": self.num_stages,
            "delay": steady_delay(training.method, self.num_stages, self.index, training.num_microbatches, 0),
        }
        updated = [p for _, p in named]
        self.optimizer = with_keywords(training.optimizer, updated, named=named, **place) if updated else None
        groups = self.optimizer.param_groups if self.optimizer and is_by_place(training.optimizer) else []
        self.options_of_place = list(map(group_options, groups))
        self.rates_of_place = is_by_place(training.lr_scheduler)
        make_scheduler, optimizer = training.lr_scheduler, self.optimizer
        self.lr_scheduler = with_keywords(make_scheduler, optimizer, **place) if make_scheduler and optimizer else None
        self.updates = OptimizerSteps(
            self.index, self._named, self.optimizer, self.lr_scheduler, self.rule,
            lr_factor=self.method.lr_shrink**self.distance, device=self.device, num_stages=self.num_stages,
        )  # fmt: skip
        predictor = as_predictor(self.method.predict) if self.distance > 0 and self.parameters else None
        self.versions = WeightVersions(
            self.index, self.parameters, self.optimizer, predictor, self.updates.shrunk_lr, self._known_gradients
        )

    # -- F ------------------------------------------------------------------------------------------

    def prepare(self, microbatch: int, minibatch: int) -> None:
        """The part of the next F that needs no input: the weights that it reads, and the seed of its draws."""
        self.draws.seed_of(microbatch)  # which is cached
        if self.versions.alike:
            self._prepared = self._weights(microbatch, minibatch - self.version)

    def forward(self, micro: MicroBatch, x: Tree, target: Tree = None) -> Tree:
        """F(m).

        Args:
            micro: m.
            x: the stage's input, a tensor or a tree of tensors.
            target: what the loss compares with, at a stage that has one.

        Returns:
            The output for the next stage, a tensor or a tree of tensors, which require a gradient where one is wanted
            back; or the last stage's share of the loss (a scalar), detached.
        """
        self.rest()
        leaf = map_tensors(self._leaf_of, x)
        if not self.has_decided:
            self._decide(micro, leaf, target)
        weights = self._weights(micro.index, micro.minibatch - self.version)
        if self.gauge is not None and self.trains:
            read = self.parameters if weights is None else weights.tensors
            self.gauge.forward(micro.index, micro.minibatch - self.version, read, self.parameters)
        held = StashEntry(micro, self.version, self._autocast_now(), leaf, value_bytes(leaf), target)
        if not self.trains:
            with torch.enable_grad():  # for a module that differentiates within itself
                out, _ = self.repeatable.run(held, {})
            held.leaf, held.nbytes, held.has_graph = None, 0, True
            held.added = None if held.added is None else held.added.detach()
        else:
            if not self.recomputes or self.method.backward_at == "stashed":
                held.weights = weights
            with nullcontext() if held.weights is None else self._refusing_writes(held.weights):
                if self.recomputes:
                    out = self.repetition.forward(held, self._tensors(weights))
                else:
                    out, graph_bytes = self._graph(held, "returned" if self.holds_graphs else "current")
                    held.nbytes += graph_bytes
        self._begun, self._prepared = True, None
        self.stash.append(held)
        self._note_peak(0)
        if self.distance == 0:
            return out.detach()
        tensors, form = flatten(out)
        wanting = self._wants(held, tensors)
        passed = [aligned_clone(t) if self._is_weight(t) else t.detach() for t in tensors]
        return unflatten(form, iter([t.requires_grad_(wants) for t, wants in zip(passed, wanting, strict=True)]))

    @contextmanager
    def _refusing_writes(self, weights: WeightVersion) -> Iterator[None]:
        """Refuse a forward that writes the copy of the weights that it reads; the first one by whatever way."""
        is_first = not self._begun

        def state() -> tuple[list[tuple[int, int]], str]:
            return weight_marks(weights.leaves), sizes_of(weights.tensors) if is_first else ""

        before = state()
        yield
        if (after := state()) == before:
            return
        written = [name for name, a, b in zip(self.names, before[0], after[0], strict=False) if a != b]
        raise RuntimeError(
            f"the stage's forward writes {written[0] if written else 'its parameters'} (as nn.Embedding(max_norm=) does), and what "
            f"it reads by method {self.method.name!r} with keep={self.method.keep!r} is a copy, where that would be lost; pass "
            "method='bp', or one that recomputes at the weights of now (dtrp, dtr, fr); if it is once alone, by its first "
            "input, run the model once before"
        )

    def _wants(self, held: StashEntry, tensors: list[Tensor]) -> list[bool]:
        """Which tensors of an output require a gradient; of an output made without a graph, by a trial with one."""
        if self.method.local or not self.trains:
            return [False] * len(tensors)
        if not self.recomputes:
            return [t.requires_grad for t in tensors]
        able = [t.is_floating_point() or t.is_complex() for t in tensors]
        if sum(able) < 2:  # otherwise nothing at this stage or before it could be trained
            return able
        key = (*((t.dtype, t.dim()) for t in tensors), self.module.training)
        if key not in self._wanting:
            trial = StashEntry(held.micro, self.version, held.autocast, held.leaf, 0)
            self._graph(trial, "discarded")
            self._wanting[key] = [root is not None for root in trial.roots]
        held.wanting = self._wanting[key]
        return held.wanting

    def _autocast_now(self) -> AutocastState:
        return AutocastState.now(self.device.type)

    def _decide(self, micro: MicroBatch, leaf: Tree, target: Tree) -> None:
        """Keep graphs if they fit the memory limit, otherwise inputs; a trial run shows the size of a graph."""
        assert self.memory_limit_bytes is not None
        trial = StashEntry(micro, self.version, self._autocast_now(), leaf, value_bytes(leaf), target)
        if self.repeatable.changes_input is None:  # the first run is on a copy of the input, which must not be counted
            self._graph(trial, "discarded")
            trial.roots = []  # which hold that graph; there is one at a time, or the trial would need more than the limit
        out, graph_bytes = self._graph(trial, "discarded")
        sizes = StageSizes(
            weights=self._weights_bytes(),
            trained=sum(map(tensor_bytes, self.parameters)),
            optimizer=optimizer_bytes(self.optimizer) if self.optimizer is not None else 0,
            input=value_bytes(leaf),
            graph=graph_bytes,
            output=value_bytes(out),
            deferred=None if self.division is not None and not self._division_tried else self._deferred_bytes,
            rule_known=self.optimizer is None or linear.foresees(self.optimizer),
        )
        del trial, out
        self.keep_as(
            choose_keep(self.method, self.num_stages, self.index, self.num_microbatches, sizes, self.memory_limit_bytes)
        )

    def _leaf_of(self, x: Tensor) -> Tensor:
        """A tensor of the input, detached, on this stage's device; a copy of the caller's where it outlives the step."""
        leaf = x.detach()
        # Also for a stage that keeps nothing: what it passes on may be a view of its input.
        outlives = self.distance > 0 and not self.method.flush
        if leaf.device != self.device:
            leaf = _moved(leaf, self.device)
        elif self.index == 0 and outlives:
            leaf = aligned_clone(leaf)
        # The stage before says which of its outputs require a gradient.
        return leaf.requires_grad_(self.needs_input_grad and x.requires_grad)

    def _is_weight(self, out: Tensor) -> bool:
        """Whether an output is (a view of) a tensor that will be written while a later stage keeps it."""
        on_copies = self.trains and not self.recomputes and self.holds_graphs
        buffers = () if on_copies else self.repeatable.written()
        places = [part.untyped_storage().data_ptr() for part in parts_of(out)]
        written = itertools.chain(self.parameters, self.versions.tensors(), buffers)
        return any(t.untyped_storage().data_ptr() in places for t in written)

    def _weights(self, microbatch: int, delay: int) -> WeightVersion | None:
        """The weights that F reads; None: the present ones."""
        if not self.trains or self.method.flush or not self.holds_graphs:
            return None
        if self.recomputes and self.method.backward_at == "current":
            return self.versions.predicted(microbatch, self.version, delay) if delay else None
        return self.versions.copied(microbatch, self.version, delay)

    def _known_gradients(self) -> dict[str, Any]:
        """The keyword arguments of a predictor that uses gradients."""
        # A forward with a delay is of a later mini-batch than this version's, so all of its forwards are through.
        micros = [held.micro for held in self.stash] + [held.micro for held in self._waiting]
        waiting = sum(micro.share for micro in micros if micro.minibatch == self.version)
        known = any(gradient is not None for gradient in self.gradients)
        return {"gradients": self.gradients, "share": max(0.0, 1.0 - waiting) if known else 0.0}

    # -- B ------------------------------------------------------------------------------------------

    def recompute(self) -> None:
        """The part of the next B that needs no gradient: repeat its forward, with a graph."""
        self.rest()
        held = self.stash[0]
        if not held.has_graph:
            # In the modes of the forward: the caller may have called eval() since.
            changed = held.modes not in ((), modes_of(self.repeatable.roster_of_module))
            with in_modes(self.module, held.modes) if changed else nullcontext(), repeating():
                expected = self.repetition.expected(held)
                out, graph_bytes = self._graph(held)
            self._note_peak(graph_bytes)
            if expected is not None:
                self.repetition.check(held, expected, (out, held.added))

    def weigh(self, weight: float | None) -> None:
        """Note what part of the loss the oldest micro-batch in the stash is; a stage without targets did not know in F."""
        if weight is not None:
            self.stash[0].micro = dataclasses.replace(self.stash[0].micro, weight=weight)

    def weight_backward(self, microbatch: int) -> None:
        """W: add the gradients that the I of ``microbatch`` has left, if it has left any."""
        if self._waiting and self._waiting[0].micro.index == microbatch:
            waiting = self._waiting.popleft()
            with self._gradients_at(waiting.leaves):
                waiting.queue.run()

    def finish_weights(self) -> None:
        """Add all gradients that wait, now; their W find nothing to do."""
        while self._waiting:
            self.weight_backward(self._waiting[0].micro.index)

    def backward(self, grad: Gradients) -> Gradients:
        """B of the oldest micro-batch in the stash; I, where backwards are in two parts.

        Args:
            grad: the gradient of its output, from the next stage: a tensor, or where the output was a tree a list with
                a gradient for each tensor of it; None at the last stage, or where no gradient comes.

        Returns:
            The gradient of its input, in the same form; None where there is none.
        """
        self.recompute()
        held = self.stash.popleft()
        if not self.stash:
            self.repeatable.ahead = None
        assert self.version == held.micro.minibatch, "B(m) happens at version b(m)"
        self.delays[self.version - held.version] += 1
        if self.gauge is not None:
            self.gauge.backward(held.micro.index, self.version, self.parameters)
        if held.micro.factor == 0:
            return self._no_gradient(held)
        roots, starts = self._starts(held, grad)
        if not roots:
            return None
        spoiled = shows_nonfinite(roots, starts) if self.rule.on_nonfinite == "skip" else None
        self._differentiate(held, roots, starts)
        gradients = [received[0] if received else None for received in held.input_gradients]
        if spoiled is not None:
            self._spoiled.append(spoiled)
            if self.division is not None:  # what waits for W may be the same tensors
                gradients = [None if gradient is None else gradient.clone() for gradient in gradients]
            mark_nonfinite(gradients, spoiled)
        if all(gradient is None for gradient in gradients):
            return None
        return gradients[0] if isinstance(held.leaf, Tensor) else gradients

    @staticmethod
    def _no_gradient(held: StashEntry) -> Gradients:
        """The zero gradient of the input of a micro-batch that does not count; 0 times nan would be nan."""
        gradients = [torch.zeros_like(t) if t.requires_grad else None for t in tensors_of(held.leaf)]
        if all(gradient is None for gradient in gradients):
            return None
        return gradients[0] if isinstance(held.leaf, Tensor) else gradients

    def _differentiate(
        self, held: StashEntry, roots: Sequence[Tensor | GradientEdge], starts: Sequence[Tensor | None]
    ) -> None:
        """Differentiate from ``roots``, with the gradients ``starts``, and add to the stage's gradients."""
        leaves = self._leaves(held.weights)
        # An activation checkpoint inside the module runs a part of it again: at the same weights.
        weights, no_autocast = self._tensors(held.weights), held.autocast._replace(enabled=False)
        with self._gradients_at(leaves), self.repeatable.at(weights), no_autocast.region(), repeating():
            if self.division is None:
                with nullcontext() if held.weights is None else receiving(self.parameters, leaves):
                    torch.autograd.backward(roots, starts)  # type: ignore[arg-type]
                return
            queue = self.division.input_backward(roots, starts, leaves)
        self._waiting.append(waiting := WaitingWeights(held.micro, queue, leaves, held.weights))
        self._deferred_bytes = max(self._deferred_bytes, waiting.nbytes)
        self._note_peak(0)

    def _try_division(self, held: StashEntry) -> None:
        assert self.division is not None
        modes = in_modes(self.module, held.modes) if held.modes else nullcontext()
        try:
            with modes:
                self.division.trial(functools.partial(self._try, held))
        except Exception as error:  # of the stage itself, which will say so at its place
            self.division.whole = dict.fromkeys(range(len(self.parameters)), f"raises {type(error).__name__}")
        # The trial is without the loss, which the caller has written to be called once for a micro-batch.
        of_loss = {id(p) for p in self.section[1].parameters()} if self.section and self.section[0] == "loss" else set()
        self.division.whole |= {i: "of the loss" for i, p in enumerate(self.parameters) if id(p) in of_loss}

    def _try(self, held: StashEntry, divided: bool) -> Tried:
        """Run a micro-batch forward and backward, from gradients of our own, as `Division.trial` asks; nothing is kept."""
        assert self.division is not None
        weights = held.weights
        if weights is None and any(map(has_gradient_hooks, self.parameters)):
            weights = WeightVersion(self.parameters)
            weights.copy_from(self.parameters)
        leaves = self._leaves(weights)
        trial = StashEntry(held.micro, self.version, held.autocast, held.leaf, 0, held.target, weights)
        with torch.enable_grad(), self.division.recording(leaves) if divided else nullcontext():
            out, _ = self.repeatable.run(trial, self._tensors(weights), "discarded", judges=False)
        made = [t for t in (*tensors_of(out), trial.added) if t is not None and t.requires_grad]
        random = generator("trial", self.index)
        starts = [torch.randn(t.shape, generator=random, dtype=torch.float64).to(t.device, t.dtype) for t in made]
        before = [leaf.grad for leaf in leaves]
        no_autocast = held.autocast._replace(enabled=False)
        try:
            for leaf in leaves:
                leaf.grad = None
            with self.repeatable.at(self._tensors(weights)), no_autocast.region(), repeating():
                if divided:
                    queue = self.division.input_backward(made, starts, leaves)
                    self._deferred_bytes = queue.nbytes
                    queue.run()
                else:
                    torch.autograd.backward(made, starts)
            gradients = [leaf.grad for leaf in leaves]
        finally:
            for leaf, gradient in zip(leaves, before, strict=True):
                leaf.grad = gradient
        inputs = [received[0] if received else None for received in trial.input_gradients]
        return Tried([*map(Tensor.detach, made), *inputs], gradients)

    def _leaves(self, weights: WeightVersion | None) -> Sequence[Tensor]:
        return self.parameters if weights is None else weights.leaves

    @contextmanager
    def _gradients_at(self, leaves: Sequence[Tensor]) -> Iterator[None]:
        """The context in which the stage's gradients are at ``leaves``, with the parameters' hooks, to be added to."""
        hooks = attach(self._named, leaves, self._tied)
        try:
            for leaf, gradient in zip(leaves, self.gradients, strict=True):
                leaf.grad = gradient
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for i, leaf in enumerate(leaves):
                self.gradients[i], leaf.grad = leaf.grad, None

    def _starts(self, held: StashEntry, grad: Gradients) -> tuple[list[Tensor | GradientEdge], list[Tensor | None]]:
        """Where differentiation starts, and with which gradients."""
        if self.loss_fn is not None:
            return [root for root in held.roots if root is not None], [None] * len(held.roots)
        roots: list[Tensor | GradientEdge] = []
        starts: list[Tensor | None] = []
        for root, gradient in zip(held.roots, grad if isinstance(grad, list) else [grad], strict=False):
            if root is None or gradient is None:
                continue
            if gradient.device != self.device:
                gradient = _moved(gradient, self.device)
            if self.method.grad_shrink != 1:
                gradient = gradient * self.method.grad_shrink
            roots.append(root)
            starts.append(gradient)
        if held.added is not None and held.added.requires_grad:
            roots.append(held.added)
            starts.append(torch.full_like(held.added, held.micro.factor))
        return roots, starts

    def settle(self) -> None:
        """After a mini-batch with a loss that was not finite, make all of its gradient so."""
        if self._spoiled and torch.stack(self._spoiled).any():
            self.spoil()
        self._spoiled = []

    def spoil(self) -> None:
        """Make all of the gradient of the mini-batch not finite."""
        self.gradients = [torch.full_like(p, math.nan) for p in self.parameters]

    def added_loss(self, before: Tensor | None = None) -> Tensor | None:
        """``before`` and the terms that the last F has added to the loss, a detached scalar, or None."""
        added = self.stash[-1].added
        if added is None or before is None:
            return before if added is None else added.detach()
        return before.to(added.device) + added.detach()

    def newest_loss(self) -> Tensor | None:
        """The loss of the last F, at a stage that has one."""
        (root, *_) = self.stash[-1].roots if self.loss_fn is not None else (None,)
        return root.detach() if isinstance(root, Tensor) else None

    def _graph(self, held: StashEntry, moves: Moves = "current") -> tuple[Tree, int]:
        """Run with a graph and remember where its differentiation starts; (output, bytes of the graph)."""
        if self.division is not None and not self._division_tried and held.micro.factor:
            self._division_tried = True
            self._try_division(held)
        out, loss, nbytes = self._run_with_graph(held, moves)
        held.has_graph = True
        if held.weights is not None and not self._read_copies:
            self._read_copies = True
            self._check_read([*tensors_of(out), *tensors_of(loss)])
        if held.met is not None:
            nbytes += sum(map(tensor_bytes, filter(torch.is_tensor, held.met.moved.values())))
        if loss is None:
            # Not the output itself: the next stage has it, and this one need not hold it for its backward.
            held.roots = [edge_of(t) if t.requires_grad else None for t in tensors_of(out)]
            if any(root is not None and not wants for root, wants in zip(held.roots, held.wanting, strict=False)):
                raise RuntimeError(
                    "an output of the stage has a gradient now and had none when it was first tried; let it always have one, or "
                    "never (return it detached)"
                )
        elif loss.requires_grad or held.micro.factor == 0:
            held.roots = [loss]
        else:
            raise ValueError("the loss has no gradient; loss_fn must not detach it or compute it under no_grad")
        return out, nbytes

    def _run_with_graph(self, held: StashEntry, moves: Moves) -> tuple[Tree, Tensor | None, int]:
        """The output, the loss, and the bytes that the graph saves, which are measured once for each kind of input."""
        inputs = tensors_of(held.leaf)
        held.modes = held.modes or modes_of(self.repeatable.roster_of_module)
        key = (*((t.shape, t.dtype) for t in inputs), held.autocast, held.modes)
        nbytes, is_first = self._graph_bytes.get(key), self.repeatable.changes_input is None
        run = functools.partial(self.repeatable.run, held, self._tensors(held.weights), moves)
        recording = self.division.recording(self._leaves(held.weights)) if self.division else nullcontext()
        with torch.enable_grad(), recording:
            if nbytes is not None:
                return *run(), nbytes
            (out, loss), sizes = weigh_graph(run, self.whole, [*inputs, *(held.weights.leaves if held.weights else [])])
        if sizes is None and not self.has_decided:
            raise ValueError(f"keep='auto' at stage {self.index}: {NOT_WEIGHED}; pass keep='graph' or 'input'")
        nbytes = sum((sizes or {}).values())  # 0 too where it could not be measured
        if not is_first:
            self._graph_bytes[key] = nbytes
        return out, loss, nbytes

    def _check_read(self, made: list[Tensor]) -> None:
        """Refuse a graph on the parameters themselves, where they have copies in their places."""
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
    def infer(self, x: Tree, *, in_eval_mode: bool = True) -> Tree:
        """The output at the present weights, in eval mode or in that of the module; every call draws other random numbers."""
        self.num_infers += 1
        x = map_tensors(lambda t: _moved(t, self.device), x)
        return self.repeatable.infer(x, -self.num_infers, in_eval_mode=in_eval_mode)

    # -- U ------------------------------------------------------------------------------------------

    def gradient_norm(self) -> float:
        """The norm of the mini-batch's gradient at this stage; not finite where the gradient is not."""
        return float(gradient_norm(self.gradients))

    def update(self, norms: Sequence[float] | None = None) -> None:
        """U: one optimizer step with the gradients of a mini-batch.

        Args:
            norms: the norms of all stages' gradients, where the rule looks at them together.

        Raises:
            StageError: see `OptimizerSteps.step`.
        """
        if self.optimizer is not None:
            self.updates.step(self.version, self.gradients, norms, self.versions.before_update)
            # Freed at the next forward or backward: freeing here makes malloc trim the heap and fault it in again (10 %
            # of a small network's step).
            self._spent, self.gradients = self.gradients, [None] * len(self.parameters)
            self.gradients_peak = max(self.gradients_peak, self._gradients_bytes())
        self.version += 1
        self.versions.after_update(self.version)

    @property
    def gradient_norms(self) -> dict[int, float]:
        """``{mini-batch: the norm of its gradient}`` of the stage's last updates; 0 where there is nothing to update."""
        if self.optimizer is None:
            return dict.fromkeys(range(max(0, self.version - 2 * self.num_stages - 1), self.version), 0.0)
        return {minibatch: float(norm) for minibatch, norm in self.updates.norms}

    def check_gradients(self) -> None:
        """Refuse a gradient that was not finite and has been applied, where an accelerator has answered by now."""
        self.settle()
        self.updates.check()

    # -- tied parameters ----------------------------------------------------------------------------

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
        """Add the other stages' ``parts`` to the gradient of a tied parameter of this stage, in their order."""
        present = [part for part in (self.take_gradient(tie), *parts) if part is not None]
        self.gradients[self.index_of(tie)] = functools.reduce(torch.add, present) if present else None

    # -- what it holds ------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """Micro-batches between their F and their B."""
        return len(self.stash)

    def keep_as(self, keep: Keep | None) -> None:
        """Keep graphs or inputs from now on; None: the stage has not decided yet."""
        if keep is not None and self.method.keep != keep:
            self.method = self.method.keeping(keep)
            self.recomputes = self.trains and self.method.recomputes(self.num_stages, self.index)
        self.has_decided = keep is not None

    def restore(self, held: StashEntry, *, has_graph: bool) -> None:
        """Add a micro-batch of a checkpoint to the stash; a graph that it had is built again from its input."""
        if has_graph and self.trains:
            with in_modes(self.module, held.modes):
                self._graph(held, "discarded")
        held.has_graph = has_graph
        self.stash.append(held)

    def check_trainable(self) -> None:
        """Refuse parameters that were frozen, freed or replaced since the optimizer was made."""
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

    def rest(self) -> None:
        """Free the gradients of the last update."""
        self._spent = []

    def forget_predictions(self) -> None:
        """Forget what was predicted from other weights than the present ones."""
        self._prepared = None
        self.versions.forget()

    def drop(self) -> None:
        """Forget the micro-batches in flight."""
        self.rest()
        self._spoiled = []
        self.updates.drop()
        self.stash.clear()
        self._waiting.clear()
        self.repeatable.ahead = None
        if self.gauge is not None:
            self.gauge.drop()
        self._prepared = None
        self.versions.drop()
        self.gradients = [None] * len(self.parameters)

    def _note_peak(self, graph_bytes: int) -> None:
        stash = stash_bytes((*self.stash, *self._waiting))
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
            "stash": stash_bytes((*self.stash, *self._waiting)),
            "stash_peak": self.stash_peak,
        }


def _check_layout(t: Tensor, what: str) -> None:
    """Refuse a parameter without strides, and a buffer that nothing can copy."""
    if t.is_nested or t.is_mkldnn or (t.requires_grad and t.layout is not torch.strided):
        raise TypeError(
            f"{what} is a {'nested' if t.is_nested else str(t.layout).removeprefix('torch.')} tensor; parameters that are trained "
            "have strides, and buffers have them or are sparse: make it a dense one"
        )


def _moved(x: Tensor, device: torch.device) -> Tensor:
    """``x`` on ``device``; between accelerators without waiting (a CPU would read it too early)."""
    return x.to(device, non_blocking=x.device.type != "cpu" and device.type != "cpu")
