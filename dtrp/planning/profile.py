"""The profile of a model: time, activations and parameters of every layer, on the device that it will run on.

Layers run in their order, each with a graph for itself, forward and then backward as in training, and once more
without a graph. Times are medians of several such rounds. The model is a copy; the caller's weights, buffers and
random numbers stay as they are.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import operator
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import PlanError
from ..launch.heap import keep_heap
from ..measure.graph_size import NOT_WEIGHED, weigh_graph
from ..measure.memory import StageSizes
from ..optim.factories import with_keywords
from ..predict import BuiltInPredictor, Predictor, StatefulPredictor, as_predictor, linear, stage_predictor
from ..splitting.stages import called, check_device, layers_of, stage_device
from ..tensors.layout import aligned_clone, enter, parts_of
from ..tensors.nbytes import states_bytes, tensor_bytes
from ..tensors.pytree import check_samples, flatten, map_tensors, num_samples, tensors_of, unflatten
from ..tensors.torch_private import write_count
from ..typing import AutocastFactory, LossFn, OptimizerFactory, Tree
from .neighbours import Neighbours, busy_neighbours
from .spread import relative_spread

_GraphEntries = dict[str, Any]  # entries of a LayerProfile that tell of its graph


@dataclass(frozen=True)
class LayerProfile:
    """A layer on one micro-batch.

    Attributes:
        name: name in the model.
        forward_s, nograd_forward_s, backward_s: median seconds of the forward with a graph, without a graph, and of the
            backward.
        spread: interquartile range of the seconds of forward and backward together, over their median; None: not
            measurable.
        graph_bytes: bytes that its graph saves beside its input and its output.
        input_bytes, output_bytes: bytes of its input and its output.
        saves_input, saves_output: whether its graph saves them.
        parameter_bytes, trained_bytes, buffer_bytes, optimizer_bytes: bytes of its parameters, of those that require a
            gradient, of its buffers, and of its optimizer's state.
        trains: whether it, or a layer before it, has something to train; else it runs without a graph.
    """

    name: str
    forward_s: float
    nograd_forward_s: float
    backward_s: float
    spread: float | None
    graph_bytes: int
    input_bytes: int
    output_bytes: int
    saves_input: bool
    saves_output: bool
    parameter_bytes: int
    trained_bytes: int
    buffer_bytes: int
    optimizer_bytes: int
    trains: bool


@dataclass(frozen=True)
class StageProfile:
    """The sum of a stage's layers.

    Attributes:
        forward_s, nograd_forward_s, backward_s: seconds for a micro-batch.
        update_s, predict_s: seconds of one update, and of one prediction.
        sizes: bytes of what the stage holds.
    """

    forward_s: float
    nograd_forward_s: float
    backward_s: float
    update_s: float
    predict_s: float
    sizes: StageSizes


@dataclass(frozen=True)
class Profile:
    """The layers of a model on micro-batches of ``samples`` samples.

    Attributes:
        samples: number of samples in the micro-batch.
        layers: the layers, in order.
        update_s, predict_s: seconds of an update and of a prediction of the whole model, to be shared out by the bytes
            of trained parameters.
        spread: interquartile range, over the rounds, of the seconds of all layers together, over their median; None:
            not measurable, for which there are too few rounds.
        rule_known: of the optimizer, as of `StageSizes`.
    """

    samples: int
    layers: tuple[LayerProfile, ...]
    update_s: float
    predict_s: float
    spread: float | None = None
    rule_known: bool = True

    def stage(self, first: int, end: int) -> StageProfile:
        """Layers ``first`` to ``end - 1`` together."""
        total = {name: sums[end] - sums[first] for name, sums in self._sums.items()}
        last = self.layers[end - 1]
        # A tensor between two layers is saved once, whichever saves it; between stages it is an input or an output.
        between = self._sums["between"][end - 1] - self._sums["between"][first]
        share = total["trained_bytes"] / max(1.0, self._sums["trained_bytes"][-1])
        sizes = StageSizes(
            weights=total["parameter_bytes"] + total["buffer_bytes"],
            trained=total["trained_bytes"],
            optimizer=total["optimizer_bytes"],
            input=self.layers[first].input_bytes,
            graph=total["graph_bytes"] + between + (last.output_bytes if last.saves_output else 0),
            output=last.output_bytes,
            trains=last.trains,
            rule_known=self.rule_known,
        )
        seconds = total["forward_s"], total["nograd_forward_s"], total["backward_s"]
        return StageProfile(*seconds, share * self.update_s, share * self.predict_s, sizes)

    @cached_property
    def _sums(self) -> dict[str, list[float]]:
        """Sums over the first n layers, n = 0..L; ``between``: of the tensors that are saved behind them."""
        names = [field.name for field in dataclasses.fields(LayerProfile) if field.name.endswith(("_s", "_bytes"))]
        values = {name: [float(getattr(layer, name)) for layer in self.layers] for name in names}
        values["between"] = [
            float(before.output_bytes) if before.saves_output or after.saves_input else 0.0
            for before, after in itertools.pairwise(self.layers)
        ] + [0.0]
        return {name: list(itertools.accumulate(summands, initial=0.0)) for name, summands in values.items()}

    @property
    def whole(self) -> StageProfile:
        """The model in one stage."""
        return self.stage(0, len(self.layers))


class Profiler:
    """Measures a model at any micro-batch size, at each size once.

    Args:
        model: an `nn.Sequential`, or a list of modules.
        example: a batch (x, y); the samples are used over again where more are needed.
        loss_fn: the loss, as in `Pipeline`; its time is counted to the last layer.
        optimizer: makes the optimizer of a copy's parameters; None: updates take no time, and the state no memory.
        predict: the method's predictor, or None.
        device: device to measure on; None: where the model is.
        neighbours: processes that work on the same model meanwhile, where workers share a machine's memory and caches.
        repeats, warmup: rounds that count, and rounds before that do not.
        autocast: makes the region in which the forward runs.

    Attributes:
        repeats: rounds that count.
        names: names of the layers.
        layers: copies of the layers, on ``device``.
    """

    def __init__(
        self,
        model: nn.Sequential | Sequence[nn.Module],
        example: tuple[Tree, Tree],
        loss_fn: LossFn,
        *,
        optimizer: OptimizerFactory | None = None,
        predict: str | Predictor | None = None,
        device: torch.device | str | None = None,
        neighbours: int = 0,
        repeats: int = 7,
        warmup: int = 2,
        autocast: AutocastFactory | None = None,
    ) -> None:
        self._example = checked_example(example)
        self.loss_fn, self.make_optimizer = loss_fn, optimizer
        self.neighbours, self.autocast = neighbours, autocast or nullcontext
        self.repeats, self._warmup = repeats, warmup
        named = layers_of(model)
        self.names = [name for name, _ in named]
        # At once: a tensor that two layers share, they share again.
        self.layers = copy.deepcopy([layer for _, layer in named])
        self.device = check_device(torch.device(device) if device is not None else device_of(self.layers))
        for layer in self.layers:
            layer.to(self.device)
        trained = (p for layer in self.layers for p in layer.parameters() if p.requires_grad)
        self._parameters = list(dict.fromkeys(trained))
        trainable = [any(p.requires_grad for p in layer.parameters()) for layer in self.layers]
        self._trains = list(itertools.accumulate(trainable, operator.or_))  # the layer, or a layer before it
        self._changes: list[bool | None] = [None] * len(self.layers)  # whether it writes its input; None: not seen yet
        self._optimizer = self._made(optimizer) if optimizer is not None and self._parameters else None
        self._predictor = self._checked_predictor(predict)
        self._profiles: dict[tuple[int, int], Profile] = {}
        self._times: dict[tuple[str, int], list[float]] = defaultdict(list)  # by what runs, and the layer

    def _made(self, optimizer: OptimizerFactory) -> Optimizer:
        """The caller's optimizer of the whole model, as of a pipeline of one stage."""
        names = {id(p): f"{i}.{name}" for i, layer in enumerate(self.layers) for name, p in layer.named_parameters()}
        named = [(names[id(p)], p) for p in self._parameters]
        return with_keywords(optimizer, list(self._parameters), stage=0, num_stages=1, delay=0, named=named)

    def _checked_predictor(self, predict: str | Predictor | None) -> Any:
        """The predictor, where it is one of the library's and knows the optimizer."""
        predictor = as_predictor(predict)
        if isinstance(predictor, (BuiltInPredictor, StatefulPredictor)) and self._optimizer is not None:
            with suppress(TypeError):
                return stage_predictor(predictor, self._optimizer)
        return None

    def at(self, samples: int, *, neighbours: int | None = None) -> Profile:
        """The profile of micro-batches of ``samples`` samples."""
        key = samples, self.neighbours if neighbours is None else neighbours
        if key not in self._profiles:
            x, y = self.batch(samples)
            with self.measuring(x, neighbours):
                self._profiles[key] = self._measure(x, y)
        return self._profiles[key]

    def batch(self, samples: int) -> tuple[Tree, Tree]:
        """The example with so many samples, on the device."""
        x, y = (map_tensors(lambda t: t.to(self.device), _tiled(value, samples)) for value in self._example)
        return x, y

    @contextmanager
    def measuring(self, x: Tree, neighbours: int | None = None) -> Iterator[Neighbours]:
        """Within it ``neighbours`` processes work on x, and random numbers are drawn and given back."""
        keep_heap()  # as in the workers that are planned
        devices = [self.device] if self.device.type != "cpu" else []
        random_numbers = torch.random.fork_rng(devices, device_type=self.device.type if devices else "cuda")
        count = self.neighbours if neighbours is None else neighbours
        with random_numbers, busy_neighbours(count, self.layers, x) as working:
            yield working

    def _measure(self, x: Tree, y: Tree) -> Profile:
        saved: list[_GraphEntries] = []
        self._round(x, y)  # which layers write their input
        self._round(x, y, saved)
        for _ in range(self._warmup):
            self._round(x, y)
        self._times.clear()
        for _ in range(self.repeats):
            self._round(x, y)
        layers = tuple(itertools.starmap(self._layer_profile, enumerate(saved)))
        layer_times = [times for (what, _), times in self._times.items() if what in ("forward", "backward")]
        rounds_s = list(map(sum, zip(*layer_times, strict=True)))
        update_s, predict_s = self._median("update"), self._median("predict")
        known = self._optimizer is None or linear.foresees(self._optimizer)
        return Profile(num_samples(x), layers, update_s, predict_s, relative_spread(rounds_s), known)

    def _layer_profile(self, place: int, graph: _GraphEntries) -> LayerProfile:
        layer = self.layers[place]
        times = zip(self._times["forward", place], self._times["backward", place], strict=True)
        states = [] if self._optimizer is None else [self._optimizer.state.get(p, {}) for p in layer.parameters()]
        return LayerProfile(
            name=self.names[place],
            forward_s=self._median("forward", place),
            nograd_forward_s=self._median("forward without a graph", place),
            backward_s=self._median("backward", place),
            spread=relative_spread(list(map(sum, times))),
            **graph,
            parameter_bytes=sum(map(tensor_bytes, layer.parameters())),
            trained_bytes=sum(tensor_bytes(p) for p in layer.parameters() if p.requires_grad),
            buffer_bytes=sum(map(tensor_bytes, layer.buffers())),
            optimizer_bytes=states_bytes(states),
            trains=self._trains[place],
        )

    def _round(self, x: Tree, y: Tree, saved: list[_GraphEntries] | None = None) -> None:
        """Every layer's forward and backward, an update, and the forwards without a graph.

        Args:
            x: inputs.
            y: targets.
            saved: given, it receives every layer's entry of what its graph saves.
        """
        graphs: list[tuple[list[list[Tensor]], list[Tensor]]] = []
        h = x
        for place, layer in enumerate(self.layers):
            run = functools.partial(self._run_layer, place, h, y)
            with self._timed("forward", place):
                (inputs, gradients, out), sizes = (run(), None) if saved is None else weigh_graph(run, layer)
            outputs = tensors_of(out)
            if saved is not None:
                if sizes is None:
                    raise PlanError(f"layer {self.names[place]}: {NOT_WEIGHED}; make the Pipeline without a plan")
                saved.append(_graph_sizes(sizes, inputs, outputs))
            graphs.append((gradients, outputs))
            h = map_tensors(lambda t: t.detach().requires_grad_(t.requires_grad), out)
        self._backward(graphs)
        self._update()
        h = x
        for place, layer in enumerate(self.layers):
            copied = map_tensors(aligned_clone, h) if self._changes[place] is not False else h
            with self._timed("forward without a graph", place), torch.no_grad(), self.autocast():
                h = called(layer, copied, self.names[place])

    def _run_layer(self, place: int, h: Tree, y: Tree) -> tuple[list[Tensor], list[list[Tensor]], Tree]:
        """A layer's forward as in a stage, with a graph if the layer, or one before it, has something to train.

        Returns:
            The tensors of its input, lists in which their gradients will be, and its output or the loss.
        """
        tensors, form = flatten(h)
        gradients: list[list[Tensor]] = [[] for _ in tensors]
        with torch.set_grad_enabled(self._trains[place]), self.autocast():
            copies = self._changes[place] is not False
            inputs = [
                enter(t, gradient, copy=copies) if t.requires_grad else aligned_clone(t) if copies else t
                for t, gradient in zip(tensors, gradients, strict=True)
            ]
            before = list(map(write_count, inputs))
            out = called(self.layers[place], unflatten(form, iter(inputs)), self.names[place])
            self._changes[place] = list(map(write_count, inputs)) != before
            return inputs, gradients, self.loss_fn(out, y) if place == len(self.layers) - 1 else out

    def _backward(self, graphs: list[tuple[list[list[Tensor]], list[Tensor]]]) -> None:
        """The layers' backwards, from the loss on; every graph is freed after its backward."""
        incoming: Sequence[Sequence[Tensor | None]] = [[None]]  # the loss needs no gradient
        for place in reversed(range(len(graphs))):
            gradients, outputs = graphs.pop()
            with self._timed("backward", place):
                reached = [(t, g[0]) for t, g in zip(outputs, incoming, strict=True) if t.requires_grad and g]
                if reached:
                    torch.autograd.backward([t for t, _ in reached], [g for _, g in reached])
            incoming = gradients

    def _update(self) -> None:
        if self._optimizer is not None:
            with self._timed("update"):
                self._optimizer.step()
            if self._predictor is not None:
                room = list(map(torch.empty_like, self._parameters))
                gradients = self._parameters if self._predictor.uses_gradients else ()  # whatever their values
                with self._timed("predict"):
                    self._predictor(self._parameters, self._optimizer, 1, room, gradients=gradients, share=0.5)
        for p in self._parameters:
            p.grad = None

    @contextmanager
    def _timed(self, what: str, place: int = 0) -> Iterator[None]:
        start = self._now()
        yield
        self._times[what, place].append(self._now() - start)

    def _now(self) -> float:
        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize(self.device)
        return time.perf_counter()

    def _median(self, what: str, place: int = 0) -> float:
        return statistics.median(self._times[what, place] or [0.0])


def _graph_sizes(saved: Mapping[int, int], inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> dict[str, Any]:
    """The entries of a `LayerProfile` for its graph, from the ``saved`` bytes by storage, its input and its output."""
    ends = _storages([*inputs, *outputs])
    return {
        "graph_bytes": sum(size for storage, size in saved.items() if storage not in ends),
        "input_bytes": sum(map(tensor_bytes, inputs)),
        "output_bytes": sum(map(tensor_bytes, outputs)),
        "saves_input": not _storages(inputs).isdisjoint(saved),
        "saves_output": not _storages(outputs).isdisjoint(saved),
    }


def _storages(tensors: Iterable[Tensor]) -> set[int]:
    return {part.untyped_storage().data_ptr() for t in tensors for part in parts_of(t)}


def checked_example(example: tuple[Tree, Tree]) -> tuple[Tree, Tree]:
    """A batch (x, y), as `Pipeline.step` takes it.

    Raises:
        TypeError, PlanError: it is none.
    """
    if not isinstance(example, (tuple, list)) or len(example) != 2:
        raise TypeError("example: pass a batch (x, y), tensors or trees of them, with samples along dimension 0")
    try:
        x, y = map(check_samples, ("x", "y"), example)
    except (TypeError, ValueError) as error:
        raise (TypeError if isinstance(error, TypeError) else PlanError)(f"example: {error}") from error
    if (inputs := num_samples(x)) != (targets := num_samples(y)):
        raise PlanError(f"example: x has {inputs} samples and y has {targets}; pass as many targets as inputs")
    return x, y


def _tiled(value: Tree, samples: int) -> Tree:
    """The samples over again, or fewer of them; a tensor that is the same for all samples stays as it is."""
    present = num_samples(value)
    times = -(-samples // present)

    def tiled(t: Tensor) -> Tensor:
        if not t.dim() or len(t) != present:
            return t
        return t[:samples] if times == 1 else torch.cat([t] * times)[:samples]

    return map_tensors(tiled, value)


def device_of(layers: Iterable[nn.Module]) -> torch.device:
    """The device that layers are on; the CPU, if they hold nothing."""
    return next((place for place in map(stage_device, layers) if place is not None), torch.device("cpu"))
