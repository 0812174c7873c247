"""What is written by habit beside a pipeline, and does not do there what it does in a plain loop; each is warned of once."""

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

from ..tensors.module_mode import Follower
from .base import Engine


class Elsewhere:
    """Modules that other ranks train: what this rank holds of them is what they began with.

    Their values are as they should be before the first update, and after `load_state_dict` until the next one. A copy of
    a module, pickled or not, has a watch that warns of nothing. The modules are watched for as long as they live, since most
    is saved after the pipeline's end; the watch of a new pipeline takes the place of an old one's.

    Args:
        stages: of the pipeline.
        place: of this rank's among them.
        engine: counts the updates.
    """

    def __init__(self, stages: Sequence[nn.Module] = (), place: int = 0, engine: Engine | None = None) -> None:
        self._engine = weakref.ref(engine) if engine is not None else lambda: None
        self._stage = place
        self._made = 0  # updates, as of the pipeline's end
        self._warned: set[str] = set()
        self._since: Any = WeakTensorKeyDictionary()  # of parameters, the updates made when their values came
        self._handles: list[RemovableHandle] = []
        here = {id(p) for p in stages[place].parameters()} if stages else ()
        before = {id(watch): watch for stage in stages for m in stage.modules() if (watch := _elsewhere.get(m))}
        for watch in before.values():
            watch._leave(told=engine is not None and engine.is_first)
        for module in {module for stage in stages for module in _holders(stage, here)}:
            _elsewhere[module] = self
            self._has_now(module, 0)
            self._handles += [
                module.register_state_dict_pre_hook(self._before_state_dict),  # type: ignore[no-untyped-call]
                module.register_forward_pre_hook(self._before_forward),
                module.register_load_state_dict_post_hook(self._after_load),  # type: ignore[no-untyped-call]
            ]

    def end(self) -> None:
        """The pipeline ends, and makes no update any more."""
        self._made = self._updates()
        self._engine = lambda: None

    def _updates(self) -> int:
        engine = self._engine()
        return self._made if engine is None else engine.num_updates

    def _leave(self, *, told: bool) -> None:
        """A new pipeline has the modules, and begins with the values that the first rank, which is ``told``, has of them."""
        for handle in self._handles:
            handle.remove()
        if told:
            self._warn(self._since, "The new pipeline begins with", "model.load_state_dict(pipe.model_state_dict())")

    def __reduce__(self) -> tuple[Any, ...]:
        self._warn(self._since, "A copy of the model has", "pipe.save_model(path)")
        return Elsewhere, ()

    def _before_state_dict(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        self._warn(
            module.parameters(False), "model.state_dict() has", "pipe.save_model(path) or pipe.model_state_dict()"
        )

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        self._warn(module.parameters(False), "The model is run with", "pipe.infer(x)")

    def _after_load(self, module: nn.Module, keys: Any) -> None:
        self._has_now(module, self._updates())

    def _has_now(self, module: nn.Module, num_updates: int) -> None:
        self._since.update(dict.fromkeys(module.parameters(False), num_updates))

    def _warn(self, parameters: Iterable[nn.Parameter], what: str, instead: str) -> None:
        now = self._updates()
        if what not in self._warned and any(self._since.get(p, now) != now for p in parameters):
            self._warned.add(what)
            warnings.warn(
                f"{what} old values of the stages that other ranks train, since this rank trains stage {self._stage} alone; call "
                f"{instead}, on every rank, before close()",
                stacklevel=3,
            )


_elsewhere: weakref.WeakKeyDictionary[nn.Module, Elsewhere] = weakref.WeakKeyDictionary()  # who watches a module


def _holders(stage: nn.Module, here: Container[int]) -> Iterator[nn.Module]:
    """The modules that hold what a stage trains, and not ``here``; where it was made of another module, that one's too."""
    trained = [name for name, p in stage.named_parameters() if p.requires_grad and id(p) not in here]
    for root in (stage, *(stage._leader if isinstance(stage, Follower) else ())):
        yield from (root.get_submodule(name.rpartition(".")[0]) for name in trained)


class _OtherOptimizers:
    """Hears of every optimizer's step while there is a pipeline, and warns of those that train what a pipeline trains."""

    def __init__(self) -> None:
        self._engines: dict[int, weakref.ref[Engine]] = {}
        self._known: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # of whose steps there is nothing to say
        self._handle: RemovableHandle | None = None

    def watch(self, engine: Engine) -> Callable[[], Any]:
        """Watch over what is trained there; what is returned ends it, as the engine's own end does."""
        self._known.clear()
        self._engines[id(engine)] = weakref.ref(engine)
        if self._handle is None:
            self._handle = register_optimizer_step_pre_hook(self._before_step)
        end = weakref.finalize(engine, self._leave, id(engine))
        end.atexit = False
        return end

    def _leave(self, number: int) -> None:
        self._engines.pop(number, None)
        if not self._engines and self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if optimizer in self._known or any(callable(value) for value in (*args[1:], *kwargs.values())):
            return  # a closure makes the gradients
        self._known.add(optimizer)
        engines = [engine for reference in list(self._engines.values()) if (engine := reference()) is not None]
        if any(stage.optimizer is optimizer for engine in engines for stage in engine.stages):
            return
        members = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for engine in engines:
            trained = [p for stage in engine.stages for p in stage.parameters if id(p) in members]
            # Inside an update, where an optimizer steps another, they have gradients, and so where the caller makes some.
            if trained and all(p.grad is None for p in trained):
                self._leave(id(engine))
                warnings.warn(
                    f"{type(optimizer).__name__}.step() does nothing: a pipeline trains its parameters, and makes the updates "
                    "itself, with optimizers of its own; leave it out, and pass a function that makes the optimizer as optimizer=",
                    stacklevel=3,
                )
                return


other_optimizers = _OtherOptimizers()
