"""`Pipeline`: a model in stages, trained without waiting."""

from __future__ import annotations

import operator
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from . import checkpoint
from .local import LocalEngine
from .methods import Method, get_method
from .splitting import into_stages, stage_device
from .stage import LossFn, Stage
from .stash import MicroBatch

Device = torch.device | str | int


class Pipeline:
    """A network in K stages, each with its own optimizer, trained by one of the family's methods.

    All stages live in this process, on one device or on one each; the user keeps the training loop.

    Args:
        model: an `nn.Sequential`, which is cut between its top-level layers, or a list of modules, one a
            stage. Its parameters stay the same objects and are trained in place.
        optimizer: list of parameters -> `torch.optim.Optimizer`; called once for each stage that has
            trainable parameters.
        loss_fn: (output, target) -> scalar, the mean over the samples.
        num_stages: K. None: the length of a list, or ``len(cuts) + 1``, or 1. By ``num_stages`` alone a
            Sequential is cut into equal numbers of layers, the first stages taking the remainder.
        cuts: index of the first layer of stages 1..K-1.
        method: a name from `list_methods`, or a `Method`, as from ``get_method("fdg", grad_shrink=0.5)``.
        num_microbatches: A, the parts that `torch.tensor_split` cuts a mini-batch into. More of them
            bring the delay down; a mini-batch of fewer samples has one part a sample.
        lr_scheduler: optimizer -> scheduler, stepped once an update.
        seed: of the stages' random draws (dropout); None: drawn once from the global generator.
        devices: one device for all stages or one for each; None: where the model is.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what to change.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> pipe = Pipeline(model, lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        ...                 torch.nn.functional.cross_entropy, num_stages=3)
        >>> for _ in range(5):
        ...     loss = pipe.step(torch.randn(16, 4), torch.randint(2, (16,)))
        >>> pipe.flush()
        >>> pipe.delays()
        {0: Counter({3: 2, 0: 1, 1: 1, 2: 1}), 1: Counter({1: 4, 0: 1}), 2: Counter({0: 5})}
    """

    def __init__(
        self,
        model: nn.Sequential | Sequence[nn.Module],
        optimizer: Callable[[list[nn.Parameter]], Optimizer],
        loss_fn: LossFn,
        *,
        num_stages: int | None = None,
        cuts: Sequence[int] | None = None,
        method: str | Method = "dtrp",
        num_microbatches: int = 1,
        lr_scheduler: Callable[[Optimizer], Any] | None = None,
        seed: int | None = None,
        devices: Device | Sequence[Device] | None = None,
    ) -> None:
        self.method = get_method(method) if isinstance(method, str) else method
        if not isinstance(self.method, Method):
            raise TypeError(f"method is a {type(method).__name__}; pass a name or what get_method returns")
        num_microbatches = _whole("num_microbatches", num_microbatches)
        if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63):
            raise ValueError(f"seed={seed!r}: pass a whole number from 0 to 2**63 - 1")
        _check_callables(optimizer, loss_fn, lr_scheduler)
        modules = into_stages(model, num_stages, cuts)
        if not any(p.requires_grad for module in modules for p in module.parameters()):
            raise ValueError("the model has no parameter that requires a gradient; there is nothing to train")
        places = _places(modules, devices)
        self.num_stages = len(modules)
        self.num_microbatches = num_microbatches
        self.seed = int(torch.randint(2**63 - 1, ())) if seed is None else int(seed)
        self.num_updates = 0

        self._stages: list[Stage] = []
        trained = False  # whether any stage before has something to train
        for index, (module, place) in enumerate(zip(modules, places, strict=True)):
            stage = Stage(
                index,
                self.num_stages,
                module,
                self.method,
                _checked_optimizer(optimizer),
                _checked_scheduler(lr_scheduler),
                loss_fn=loss_fn if index == self.num_stages - 1 else None,
                needs_input_grad=trained,
                seed=self.seed,
                device=place,
            )
            trained |= bool(stage.parameters)
            self._stages.append(stage)
        self._engine = LocalEngine(self._stages, self.method)
        self._next_microbatch = 0
        self._closed = False
        self._broken: str | None = None

    # -- training ---------------------------------------------------------------------------------------

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Train on one mini-batch.

        Args:
            x: the model's input, samples along dimension 0; any number of them, of any shape the model takes.
            y: the targets, as many.

        Returns:
            The mean loss of this mini-batch, at the weights its forward met: a detached scalar tensor.

        Raises:
            TypeError, ValueError: x and y that do not fit; nothing has happened then.
            StageError: what failed inside a stage; the pipeline is of no use after it.
        """
        self._check_usable(trains=True)
        for stage in self._stages:
            stage.check_trainable()
        for label, value in (("x", x), ("y", y)):
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"{label} is a {type(value).__name__}; step takes tensors with samples along dimension 0"
                )
            if not value.dim():
                raise ValueError(f"{label} has no dimension; its first one counts the samples")
        if len(x) != len(y):
            raise ValueError(f"x has {len(x)} samples and y has {len(y)}; a mini-batch needs as many targets as inputs")
        if not len(x):
            raise ValueError("an empty mini-batch; pass at least one sample")
        if x.is_inference():  # no graph can save such a tensor
            x = x.clone()
        parts = min(self.num_microbatches, len(x))
        micros = []
        for part, target in zip(torch.tensor_split(x, parts), torch.tensor_split(y, parts), strict=True):
            micro = MicroBatch(self._next_microbatch, self.num_updates, len(part) / len(x))
            micros.append((micro, part, target))
            self._next_microbatch += 1
        self.num_updates += 1
        with self._breaking():
            return self._engine.step(micros)

    def flush(self) -> None:
        """Run the backwards and updates that are left. After it every stage has made one update per mini-batch."""
        self._check_usable(trains=True)
        with self._breaking():
            self._engine.flush()

    def infer(self, x: Tensor) -> Tensor:
        """The model's output for ``x``, any number of samples, in eval mode, with the weights as they are.

        Batches in flight stay in flight. Modules that were in train mode are again after it.
        """
        self._check_usable()
        for stage in self._stages:
            x = stage.infer(x)
        return x

    def rng(self, stage: int, microbatch: int) -> AbstractContextManager[None]:
        """The context in which ``stage`` draws its random numbers for ``microbatch``.

        ``microbatch`` counts from 0 since the pipeline was made, through flush and load. A plain loop that
        runs each stage's layers inside it draws the same dropout masks.
        """
        if not 0 <= stage < self.num_stages:
            raise ValueError(f"stage={stage}: the pipeline has stages 0..{self.num_stages - 1}")
        context: AbstractContextManager[None] = self._stages[stage].rng(microbatch)
        return context

    # -- what it holds ------------------------------------------------------------------------------------

    def delays(self) -> dict[int, Counter[int]]:
        """``{stage: Counter({delay: micro-batches})}``, in updates, of the micro-batches that are through."""
        return {stage.index: Counter(stage.delays) for stage in self._stages}

    def memory(self) -> dict[int, dict[str, int]]:
        """Bytes that each stage holds now, measured from its tensors.

        ``weights`` (parameters and buffers), ``predicted`` (the predicted copy that a forward reads),
        ``optimizer`` (its state), ``gradients`` (those of the last update until the stage's next work),
        ``stash`` (what waits between F and B: inputs, graphs and the copies of weights they need), and
        ``stash_peak``, its maximum so far. A graph is weighed by the storages it saves, once for each shape of
        input; one whose saved tensors go through hooks of the caller's weighs nothing.
        """
        return {stage.index: stage.memory() for stage in self._stages}

    def activations_peak(self) -> dict[int, int]:
        """``{stage: bytes}``: the most that the stash and the graph that a backward recomputes took together."""
        return {stage.index: stage.activations_peak for stage in self._stages}

    @property
    def stages(self) -> tuple[nn.Module, ...]:
        """The stages' modules, made of the model's own layers."""
        return tuple(stage.module for stage in self._stages)

    @property
    def optimizers(self) -> tuple[Optimizer | None, ...]:
        """Each stage's optimizer; None where there is nothing to train."""
        return tuple(stage.optimizer for stage in self._stages)

    @property
    def in_flight(self) -> int:
        """Micro-batches whose backward some stage has not run yet."""
        return max(stage.in_flight for stage in self._stages)

    # -- saving -------------------------------------------------------------------------------------------

    def model_state_dict(self) -> dict[str, Tensor]:
        """A snapshot of the whole model under the unsplit model's names; it loads into the plain model."""
        return checkpoint.model_state_dict(self._stages)

    def state_dict(self) -> dict[str, Any]:
        """A snapshot: ``{"model", "optimizer", "scheduler", "num_updates"}``, of no particular K.

        ``optimizer`` is ``{"state": {name: ...}, "param_groups": [...]}`` by parameter name. Batches in flight
        are not part of it: flush first to have every stage at the same update.
        """
        return {
            "model": checkpoint.model_state_dict(self._stages),
            "optimizer": checkpoint.optimizer_state_dict(self._stages),
            "scheduler": checkpoint.scheduler_state_dict(self._stages),
            "num_updates": self.num_updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned, here or at another K, method or engine.

        Raises:
            ValueError: it is another model's; nothing has been written then.
            RuntimeError: batches are in flight.
        """
        self._check_usable(trains=True)
        if self.in_flight:
            raise RuntimeError(f"{self.in_flight} micro-batches are in flight; call flush() before load_state_dict()")
        checkpoint.load_into(self._stages, state)
        self.num_updates = state["num_updates"]

    def save_model(self, path: str | os.PathLike[str]) -> None:
        """Write `model_state_dict` to ``path`` with `torch.save`, on the CPU, whole or not at all."""
        checkpoint.write_model(self.model_state_dict(), path)

    # -- the end ------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Drop what is in flight. Training ends here; the model stays as it is."""
        if not self._closed:
            self._closed = True
            self._engine.drop()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None and not self._closed and self._broken is None:
                self.flush()
        finally:
            self.close()

    def __repr__(self) -> str:
        sizes = ", ".join(str(len(stage.module)) for stage in self._stages)  # type: ignore[arg-type]
        return (
            f"Pipeline(method={self.method.name!r}, num_stages={self.num_stages}, layers=[{sizes}], "
            f"num_microbatches={self.num_microbatches}, num_updates={self.num_updates}, in_flight={self.in_flight})"
        )

    def _check_usable(self, *, trains: bool = False) -> None:
        if self._broken is not None:
            raise RuntimeError(f"this pipeline has failed; make a new one (it failed with: {self._broken})")
        if self._closed:
            raise RuntimeError("this pipeline is closed; make a new one")
        if trains and torch.is_inference_mode_enabled():
            raise RuntimeError("a Pipeline trains outside torch.inference_mode(), whose tensors no backward can use")

    @contextmanager
    def _breaking(self) -> Iterator[None]:
        """Half a slot cannot be taken back: what fails in the middle ends the pipeline."""
        try:
            yield
        except BaseException as error:
            self._broken = str(error) or type(error).__name__
            self._engine.drop()
            raise


def _whole(label: str, value: Any) -> int:
    """A count of at least 1; any integer type will do."""
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{label}={value!r}: pass a whole number of at least 1")
    return number


def _check_callables(optimizer: Any, loss_fn: Any, lr_scheduler: Any) -> None:
    if isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__} made already; each stage has its own: pass a function, "
            "lambda params: torch.optim.SGD(params, lr=0.1)"
        )
    for label, value in (("optimizer", optimizer), ("loss_fn", loss_fn), ("lr_scheduler", lr_scheduler)):
        if not callable(value) and not (label == "lr_scheduler" and value is None):
            raise TypeError(f"{label} is a {type(value).__name__}; pass a function")


def _checked_optimizer(make: Callable[[list[nn.Parameter]], Optimizer]) -> Callable[[list[nn.Parameter]], Optimizer]:
    def checked(parameters: list[nn.Parameter]) -> Optimizer:
        optimizer = make(parameters)
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer returned a {type(optimizer).__name__}; it returns a torch.optim.Optimizer")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError(
                "LBFGS calls the loss many times in a step, which no pipeline can do; use another optimizer"
            )
        strange = {id(p) for group in optimizer.param_groups for p in group["params"]} - {id(p) for p in parameters}
        if strange:
            raise ValueError(
                "optimizer was given a stage's parameters and holds others; use only those it is called with"
            )
        return optimizer

    return checked


def _checked_scheduler(make: Callable[[Optimizer], Any] | None) -> Callable[[Optimizer], Any] | None:
    if make is None:
        return None

    def checked(optimizer: Optimizer) -> Any:
        scheduler = make(optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            raise TypeError(
                "ReduceLROnPlateau needs a metric at every step; use a scheduler that is a function of the update"
            )
        if not hasattr(scheduler, "step"):
            raise TypeError(
                f"lr_scheduler returned a {type(scheduler).__name__}; it returns a torch.optim.lr_scheduler"
            )
        return scheduler

    return checked


def _places(modules: Sequence[nn.Module], devices: Device | Sequence[Device] | None) -> list[torch.device]:
    """Each stage's device; the modules are moved there if ``devices`` says so."""
    if devices is not None:
        given = [devices] * len(modules) if isinstance(devices, (torch.device, str, int)) else list(devices)
        if len(given) != len(modules):
            raise ValueError(
                f"devices has {len(given)} entries for {len(modules)} stages; pass one device, or one per stage"
            )
        # A tensor knows the index that "cuda" leaves out.
        try:
            places = [torch.empty(0, device=device).device for device in given]
        except (RuntimeError, AssertionError, TypeError) as error:
            raise ValueError(f"devices={devices!r}: torch cannot use them ({str(error).splitlines()[0]})") from error
        for module, place in zip(modules, places, strict=True):
            module.to(place)
        return places
    found = [stage_device(module) for module in modules]
    # A stage without tensors works where the stage before it does, or the first that has any.
    current = next(own for own in found if own is not None)
    result = []
    for own in found:
        current = own or current
        result.append(current)
    return result
