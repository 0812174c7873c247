"""Warnings about what users write by habit in a training loop and what does something else beside a pipeline.

A rank that saves or runs the whole model has old values of the stages that other ranks train (`StaleStages`). An
optimizer of the caller's that steps parameters of a pipeline does nothing (`optimizer_watch`). A script for torch's
schedules that steps it once for several mini-batches adds up their gradients there, and not here (`AccumulationWatch`).
Each warning comes once.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from ..tensors.module_mode import leaders
from .base import Engine


class StaleStages:
    """Watches the modules that other ranks train, of which this rank holds the initial values.

    Those values are right before the first update, and after `load_state_dict` until the next one. A copy of a module,
    pickled or not, has a watch that warns of nothing. The modules are watched for as long as they live, since most are
    saved after the pipeline's end. The watch of a new pipeline replaces that of an old one.

    Args:
        stages: all stages of the pipeline.
        stage: the index of the one that this rank trains.
        engine: counts the updates.
    """

    def __init__(self, stages: Sequence[nn.Module] = (), stage: int = 0, engine: Engine | None = None) -> None:
        self._engine = weakref.ref(engine) if engine is not None else lambda: None
        self._stage = stage
        self._final_updates = 0  # the number of updates at the pipeline's end
        self._warned: set[str] = set()
        self._valid_at: Any = (
            WeakTensorKeyDictionary()
        )  # by parameter, the number of updates when its values were right
        self._handles: list[RemovableHandle] = []
        trained_by_rank = {id(p) for p in stages[stage].parameters()} if stages else ()
        replaced = {id(watch): watch for stage in stages for m in stage.modules() if (watch := _watches.get(m))}
        for watch in replaced.values():
            watch._replace(warns=engine is not None and engine.is_first)
        for module in {module for stage in stages for module in _holders(stage, trained_by_rank)}:
            _watches[module] = self
            self._mark_valid(module, 0)
            self._handles += [
                module.register_state_dict_pre_hook(self._before_state_dict),  # type: ignore[no-untyped-call]
                module.register_forward_pre_hook(self._before_forward),
                module.register_load_state_dict_post_hook(self._after_load),  # type: ignore[no-untyped-call]
            ]

    def end(self) -> None:
        """The pipeline ends, and makes no more updates."""
        self._final_updates = self._num_updates()
        self._engine = lambda: None

    def _num_updates(self) -> int:
        engine = self._engine()
        return self._final_updates if engine is None else engine.num_updates

    def _replace(self, *, warns: bool) -> None:
        """A new pipeline has the modules. It begins with the values of the first rank, which ``warns`` of them."""
        for handle in self._handles:
            handle.remove()
        if warns:
            self._warn(self._valid_at, "The new pipeline begins with", "model.load_state_dict(pipe.model_state_dict())")

    def __reduce__(self) -> tuple[Any, ...]:
        self._warn(self._valid_at, "A copy of the model has", "pipe.save_model(path)")
        return StaleStages, ()

    def _before_state_dict(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        instead = "pipe.save_model(path) or pipe.model_state_dict()"
        self._warn(module.parameters(False), "model.state_dict() has", instead)

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        self._warn(module.parameters(False), "The model is run with", "pipe.infer(x)")

    def _after_load(self, module: nn.Module, keys: Any) -> None:
        self._mark_valid(module, self._num_updates())

    def _mark_valid(self, module: nn.Module, num_updates: int) -> None:
        self._valid_at.update(dict.fromkeys(module.parameters(False), num_updates))

    def _warn(self, parameters: Iterable[nn.Parameter], what: str, instead: str) -> None:
        now = self._num_updates()
        if what not in self._warned and any(self._valid_at.get(p, now) != now for p in parameters):
            self._warned.add(what)
            warnings.warn(
                f"{what} old values of the stages that other ranks train, since this rank trains stage {self._stage} alone; call "
                f"{instead}, on every rank, before close()",
                stacklevel=3,
            )


_watches: weakref.WeakKeyDictionary[nn.Module, StaleStages] = weakref.WeakKeyDictionary()  # by the module they watch


def _holders(stage: nn.Module, trained_by_rank: Container[int]) -> Iterator[nn.Module]:
    """The modules that hold what only another rank trains, of a stage and of the module that it was made of."""
    trained = [name for name, p in stage.named_parameters() if p.requires_grad and id(p) not in trained_by_rank]
    for root in (stage, *leaders(stage)):
        yield from (root.get_submodule(name.rpartition(".")[0]) for name in trained)


class _OptimizerWatch:
    """Hears of every optimizer's step while there is a pipeline, and warns of those on a pipeline's parameters."""

    def __init__(self) -> None:
        self._engines: dict[int, weakref.ref[Engine]] = {}
        self._unsuspicious: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._handle: RemovableHandle | None = None

    def watch(self, engine: Engine) -> Callable[[], object]:
        """Watch what an engine trains, until it ends or the function that is returned is called."""
        self._unsuspicious.clear()
        self._engines[id(engine)] = weakref.ref(engine)
        if self._handle is None:
            self._handle = register_optimizer_step_pre_hook(self._before_step)
        end = weakref.finalize(engine, self._end, id(engine))
        end.atexit = False
        return end

    def _end(self, key: int) -> None:
        self._engines.pop(key, None)
        if not self._engines and self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if optimizer in self._unsuspicious or any(callable(value) for value in (*args[1:], *kwargs.values())):
            return  # a closure makes the gradients
        self._unsuspicious.add(optimizer)
        engines = [engine for reference in list(self._engines.values()) if (engine := reference()) is not None]
        if any(stage.optimizer is optimizer for engine in engines for stage in engine.stages):
            return
        members = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for engine in engines:
            trained = [p for stage in engine.stages for p in stage.parameters if id(p) in members]
            # In an update, where an optimizer steps another, they have gradients, and so where the caller makes some.
            if trained and all(p.grad is None for p in trained):
                self._end(id(engine))
                warnings.warn(
                    f"{type(optimizer).__name__}.step() does nothing: a pipeline trains its parameters, and makes the updates "
                    "itself, with optimizers of its own; leave it out, and pass a function that makes the optimizer as optimizer=",
                    stacklevel=3,
                )
                return


optimizer_watch = _OptimizerWatch()


class AccumulationWatch:
    """Warns of the step of a script's optimizer after several steps of the schedule that has been given it.

    Args:
        optimizer: that of the script; anything else is not watched.
    """

    def __init__(self, optimizer: Any) -> None:
        self._num_steps = 0  # of the schedule since the script's last one of the optimizer
        self._handle: RemovableHandle | None = None
        if isinstance(optimizer, Optimizer):
            watch = weakref.WeakMethod(self._before_step)  # the optimizer outlives the schedule

            def before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
                if (warn := watch()) is not None:
                    warn(optimizer)

            self._handle = optimizer.register_step_pre_hook(before_step)

    def note_step(self) -> None:
        """The schedule makes a step."""
        self._num_steps += 1

    def end(self) -> None:
        """The schedule ends."""
        if self._handle is not None:
            self._handle.remove()

    def _before_step(self, optimizer: Optimizer) -> None:
        if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
            return  # an update of the schedule's
        steps, self._num_steps = self._num_steps, 0
        if steps > 1 and self._handle is not None:
            self._handle.remove()
            warnings.warn(
                f"{type(optimizer).__name__}.step() after {steps} calls of step(): each has made an update, and no gradients are "
                f"accumulated over them; pass the samples of all {steps} to one step(), with {steps} times the n_microbatches, "
                "and leave the optimizer's step out",
                stacklevel=5,
            )
