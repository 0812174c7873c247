"""What each layer costs on the device that it will run on: time, activations, parameters.

Layers run one after another, each with a graph of its own, forward and then backward as in training, and once more
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
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..measure.memory import StageSizes
from ..methods import Keep, Method
from ..predict import BuiltInPredictor, as_predictor
from ..splitting.stages import called, check_device, layers_of, stage_device
from ..stage.forward import LossFn
from ..stage.saved_tensors import NOT_WEIGHED, weigh_graph
from ..tensors.layout import aligned_clone, enter, parts_of
from ..tensors.nbytes import states_bytes, tensor_bytes
from ..tensors.pytree import check_samples, flatten, map_tensors, num_samples, tensors_of, unflatten
from .neighbours import busy_neighbours
from .plan_file import PlanError
from .trial import StageTrial, relative_spread, try_stages


@dataclass(frozen=True)
class LayerProfile:
    """One layer on one micro-batch: seconds (medians; ``spread`` the interquartile range of F+B over its median) and bytes.

    Attributes:
        name: in the model.
        forward_s, nograd_forward_s, backward_s: with a graph, without one, and of the graph.
        spread: how far its times scatter, relative.
        graph_bytes: what its graph saves beside its input and its output.
        input_bytes, output_bytes: of the tensors.
        saves_input, saves_output: whether its graph saves them.
        parameter_bytes, trained_bytes, buffer_bytes, optimizer_bytes: of what it holds.
        trains: whether it, or a layer before it, has something to train; else it runs without a graph.
    """

    name: str
    forward_s: float
    nograd_forward_s: float
    backward_s: float
    spread: float
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
    """The sum of a stage's layers: seconds of one micro-batch (update and prediction: of one time), and sizes."""

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
        samples: in the micro-batch.
        layers: one after another.
        update_s, predict_s: of the whole model, to be shared out by the bytes of trained parameters.
    """

    samples: int
    layers: tuple[LayerProfile, ...]
    update_s: float
    predict_s: float

    def stage(self, first: int, end: int) -> StageProfile:
        """Layers ``first`` to ``end - 1`` together."""
        of = {name: sums[end] - sums[first] for name, sums in self._sums.items() if name != "between"}
        before, last = self.layers[first], self.layers[end - 1]
        # Of two neighbours' tensor, which is saved once whoever saves it; between stages it is an input or an output.
        inside = self._sums["between"][end - 1] - self._sums["between"][first]
        share = of["trained_bytes"] / max(1.0, self._sums["trained_bytes"][-1])
        return StageProfile(
            forward_s=of["forward_s"],
            nograd_forward_s=of["nograd_forward_s"],
            backward_s=of["backward_s"],
            update_s=share * self.update_s,
            predict_s=share * self.predict_s,
            sizes=StageSizes(
                weights=of["parameter_bytes"] + of["buffer_bytes"],
                trained=of["trained_bytes"],
                optimizer=of["optimizer_bytes"],
                input=before.input_bytes,
                graph=of["graph_bytes"] + inside + (last.output_bytes if last.saves_output else 0),
                output=last.output_bytes,
                trains=last.trains,
            ),
        )

    @cached_property
    def _sums(self) -> dict[str, list[float]]:
        """Sums over the first n layers, n = 0..L."""
        names = [field.name for field in dataclasses.fields(LayerProfile) if field.name.endswith(("_s", "_bytes"))]
        sums = {
            name: [0.0, *itertools.accumulate(float(getattr(layer, name)) for layer in self.layers)] for name in names
        }
        between = [
            float(before.output_bytes) if before.saves_output or after.saves_input else 0.0
            for before, after in itertools.pairwise(self.layers)
        ]
        sums["between"] = [0.0, *itertools.accumulate(between), 0.0]
        return sums

    @property
    def whole(self) -> StageProfile:
        """The model in one stage."""
        return self.stage(0, len(self.layers))

    @property
    def spread(self) -> float:
        """The median over the layers."""
        return statistics.median(layer.spread for layer in self.layers)


class Profiler:
    """Profiles a model at any micro-batch size, each once.

    Args:
        model: an `nn.Sequential`, or a list of modules.
        example: a batch (x, y); the samples are used over again where more are needed.
        loss_fn: as `Pipeline`'s; its time is the last layer's.
        optimizer: as `Pipeline`'s, called with a copy's parameters; None: updates take no time, and the state no memory.
        predict: what the method predicts with, or None.
        device: where to measure; None: where the model is.
        neighbours: processes that work on the same model meanwhile, where workers share a machine's memory and caches.
        repeats, warmup: rounds that count, and rounds before that do not.
        autocast: makes the region in which the forward runs.
    """

    def __init__(
        self,
        model: nn.Sequential | Sequence[nn.Module],
        example: tuple[Any, Any],
        loss_fn: LossFn,
        *,
        optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
        predict: Any = None,
        device: torch.device | str | None = None,
        neighbours: int = 0,
        repeats: int = 7,
        warmup: int = 2,
        autocast: Callable[[], AbstractContextManager[Any]] | None = None,
    ) -> None:
        self.example = checked_example(example)
        self._loss_fn, self._make_optimizer = loss_fn, optimizer
        named = layers_of(model)
        self.names = [name for name, _ in named]
        self._layers = copy.deepcopy(
            [layer for _, layer in named]
        )  # at once: a tensor that two share, they share again
        self.device = check_device(torch.device(device) if device is not None else device_of(self._layers))
        for layer in self._layers:
            layer.to(self.device)
        self._module: Any = torch.get_device_module(self.device) if self.device.type != "cpu" else None
        self._parameters = list(
            dict.fromkeys(p for layer in self._layers for p in layer.parameters() if p.requires_grad)
        )
        trainable = [any(p.requires_grad for p in layer.parameters()) for layer in self._layers]
        self._trains = list(itertools.accumulate(trainable, operator.or_))  # it, or a layer before it
        self._changes: list[bool | None] = [None] * len(self._layers)  # whether it writes its input; None: not seen yet
        self._optimizer = optimizer(list(self._parameters)) if optimizer is not None and self._parameters else None
        self._predictor = self._checked_predictor(predict)
        self._neighbours, self._repeats, self._warmup = neighbours, repeats, warmup
        self._autocast = autocast or nullcontext
        self._known: dict[tuple[int, int], Profile] = {}

    def _checked_predictor(self, predict: Any) -> BuiltInPredictor | None:
        """The predictor, where it is one of dtrp's and knows the optimizer."""
        predictor = as_predictor(predict)
        if not isinstance(predictor, BuiltInPredictor) or self._optimizer is None:
            return None
        try:
            predictor.check(self._optimizer)
        except TypeError:
            return None
        return predictor

    def at(self, samples: int, *, neighbours: int | None = None) -> Profile:
        """The profile of micro-batches of ``samples`` samples."""
        neighbours = self._neighbours if neighbours is None else neighbours
        key = samples, neighbours
        if key not in self._known:
            x, y = (map_tensors(lambda t: t.to(self.device), _tiled(value, samples)) for value in self.example)
            with self._quietly(), busy_neighbours(neighbours, self._layers, x):
                self._known[key] = self._measure(x, y)
        return self._known[key]

    def try_stages(
        self,
        method: Method,
        cuts: Sequence[int],
        keep: Sequence[Keep],
        num_microbatches: int,
        samples: int,
        *,
        steps: int,
        neighbours: int | None = None,
    ) -> list[StageTrial]:
        """Some steps of the stages that these cuts make, as `try_stages` does them."""
        x, y = (map_tensors(lambda t: t.to(self.device), _tiled(value, samples)) for value in self.example)
        named = list(zip(self.names, self._layers, strict=True))
        with self._quietly():
            return try_stages(
                named, (x, y), self._loss_fn, self._make_optimizer, method, cuts, keep, num_microbatches,
                neighbours=self._neighbours if neighbours is None else neighbours, steps=steps, autocast=self._autocast,
            )  # fmt: skip

    def _quietly(self) -> AbstractContextManager[Any]:
        """Random numbers are drawn and given back."""
        devices = [self.device] if self._module is not None else []
        return torch.random.fork_rng(devices, device_type=self.device.type if devices else "cuda")

    def _measure(self, x: Any, y: Any) -> Profile:
        count = len(self._layers)
        forward: list[list[float]] = [[] for _ in range(count)]
        backward: list[list[float]] = [[] for _ in range(count)]
        nograd: list[list[float]] = [[] for _ in range(count)]
        update: list[float] = []
        predict: list[float] = []
        sizes: list[tuple[int, int, int, bool, bool]] = []
        spare = [torch.empty_like(p) for p in self._parameters] if self._predictor is not None else []
        for number in range(-2, self._warmup + self._repeats):  # -2: which layers write their input; -1: what they save
            graphs: list[tuple[list[list[Tensor]], list[Tensor]]] = []
            h = x
            for place, layer in enumerate(self._layers):
                start = self._now()
                if number == -1:
                    ran, saved = weigh_graph(functools.partial(self._run_layer, place, h, y), layer)
                    if saved is None:
                        raise PlanError(f"layer {self.names[place]}: {NOT_WEIGHED}; make the Pipeline without a plan")
                    sizes.append(_sizes(saved, ran[0], tensors_of(ran[2])))
                else:
                    ran = self._run_layer(place, h, y)
                forward[place].append(self._now() - start)
                _, gradients, out = ran
                graphs.append((gradients, tensors_of(out)))
                h = map_tensors(lambda t: t.detach().requires_grad_(t.requires_grad), out)
            incoming: list[Tensor | None] = []
            for place in reversed(range(count)):
                gradients, made = graphs.pop()
                start = self._now()
                roots = [t for t in made if t.requires_grad] if place == count - 1 else []
                starts = [(t, g) for t, g in zip(made, incoming, strict=False) if t.requires_grad and g is not None]
                if roots:
                    torch.autograd.backward(roots)
                elif starts:
                    torch.autograd.backward([t for t, _ in starts], [g for _, g in starts])
                backward[place].append(self._now() - start)
                incoming = [own[0] if own else None for own in gradients]
                del made, roots, starts
            if self._optimizer is not None:
                start = self._now()
                self._optimizer.step()
                update.append(self._now() - start)
                if self._predictor is not None:
                    start = self._now()
                    known = self._parameters if self._predictor.uses_gradients else ()  # whatever their values
                    self._predictor(self._parameters, self._optimizer, 1, spare, gradients=known, share=0.5)
                    predict.append(self._now() - start)
            for p in self._parameters:
                p.grad = None
            h = x
            for place, layer in enumerate(self._layers):
                copied = map_tensors(aligned_clone, h) if self._changes[place] is not False else h
                start = self._now()
                with torch.no_grad(), self._autocast():
                    h = called(layer, copied, self.names[place])
                nograd[place].append(self._now() - start)
        for times in (*forward, *backward, *nograd, update, predict):
            del times[: 2 + self._warmup]
        return Profile(
            samples=num_samples(x),
            layers=tuple(
                LayerProfile(
                    name=name,
                    forward_s=statistics.median(forward[place]),
                    nograd_forward_s=statistics.median(nograd[place]),
                    backward_s=statistics.median(backward[place]),
                    spread=relative_spread([f + b for f, b in zip(forward[place], backward[place], strict=True)]),
                    graph_bytes=sizes[place][0],
                    input_bytes=sizes[place][1],
                    output_bytes=sizes[place][2],
                    saves_input=sizes[place][3],
                    saves_output=sizes[place][4],
                    parameter_bytes=sum(map(tensor_bytes, layer.parameters())),
                    trained_bytes=sum(tensor_bytes(p) for p in layer.parameters() if p.requires_grad),
                    buffer_bytes=sum(map(tensor_bytes, layer.buffers())),
                    optimizer_bytes=self._state_bytes(layer),
                    trains=self._trains[place],
                )
                for place, (name, layer) in enumerate(zip(self.names, self._layers, strict=True))
            ),
            update_s=statistics.median(update) if update else 0.0,
            predict_s=statistics.median(predict) if predict else 0.0,
        )

    def _run_layer(self, place: int, h: Any, y: Any) -> tuple[list[Tensor], list[list[Tensor]], Any]:
        """A layer's forward as in a stage: (tensors of its input, where their gradients will be, output or loss).

        With a graph if it, or a layer before it, has something to train.
        """
        tensors, form = flatten(h)
        gradients: list[list[Tensor]] = [[] for _ in tensors]
        with torch.set_grad_enabled(self._trains[place]), self._autocast():
            copies = self._changes[place] is not False
            given = [
                enter(t, own, copy=copies) if t.requires_grad else aligned_clone(t) if copies else t
                for t, own in zip(tensors, gradients, strict=True)
            ]
            before = [t._version for t in given]
            out = called(self._layers[place], unflatten(form, iter(given)), self.names[place])
            self._changes[place] = [t._version for t in given] != before
            return given, gradients, self._loss_fn(out, y) if place == len(self._layers) - 1 else out

    def _state_bytes(self, layer: nn.Module) -> int:
        if self._optimizer is None:
            return 0
        return states_bytes(self._optimizer.state.get(p, {}) for p in layer.parameters())

    def _now(self) -> float:
        if self._module is not None:
            self._module.synchronize(self.device)
        return time.perf_counter()


def _sizes(saved: dict[int, int], given: Sequence[Tensor], made: Sequence[Tensor]) -> tuple[int, int, int, bool, bool]:
    """(graph, input, output bytes; whether the graph saves a part of the input, and of the output)."""
    places = [{part.untyped_storage().data_ptr() for t in tensors for part in parts_of(t)} for tensors in (given, made)]
    saves = [not own.isdisjoint(saved) for own in places]
    rest = sum(size for place, size in saved.items() if place not in places[0] | places[1])
    return rest, sum(map(tensor_bytes, given)), sum(map(tensor_bytes, made)), saves[0], saves[1]


def checked_example(example: Any) -> tuple[Any, Any]:
    """A batch (x, y), as `Pipeline.step` takes it.

    Raises:
        TypeError, PlanError: it is none.
    """
    if not isinstance(example, (tuple, list)) or len(example) != 2:
        raise TypeError("example: pass a batch (x, y), tensors or trees of them, with samples along dimension 0")
    try:
        x, y = check_samples("x", example[0]), check_samples("y", example[1])
    except TypeError as error:
        raise TypeError(f"example: {error}") from error
    except ValueError as error:
        raise PlanError(f"example: {error}") from error
    if num_samples(x) != num_samples(y):
        raise PlanError(
            f"example: x has {num_samples(x)} samples and y has {num_samples(y)}; pass as many targets as inputs"
        )
    return x, y


def _tiled(value: Any, samples: int) -> Any:
    """The samples over again, or fewer of them; what is one for all stays so."""
    own = num_samples(value)
    times = -(-samples // own)

    def tiled(t: Tensor) -> Tensor:
        if not t.dim() or len(t) != own:
            return t
        return t[:samples] if times == 1 else torch.cat([t] * times)[:samples]

    return map_tensors(tiled, value)


def device_of(layers: Iterable[nn.Module]) -> torch.device:
    """Where they are; the CPU, if they hold nothing."""
    return next((place for place in map(stage_device, layers) if place is not None), torch.device("cpu"))
