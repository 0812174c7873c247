"""Train and eval mode: for a while, and as another module's; and the path that attention takes."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..typing import Tree
from .torch_private import forward_hooks, module_backward_hooks, module_dict

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Roster:
    """The modules within a module, as they were found last; for what would walk through all of them again and again.

    Children that have come, gone or been replaced since are seen at once.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._found: list[nn.Module] | None = None
        self._children: list[tuple[dict[str, nn.Module | None], list[nn.Module | None]]] = []

    def members(self) -> list[nn.Module]:
        """As `members` of the module."""
        if self._found is None or any([*children.values()] != known for children, known in self._children):
            self._found = members(self._module)
            dictionaries = map(module_dict, self._found)
            self._children = [(children, [*children.values()]) for children in dictionaries]
        return self._found


def members(module: nn.Module | Roster) -> list[nn.Module]:
    """``module.modules()``, in the same order, without a generator in a generator for each level."""
    if isinstance(module, Roster):
        return module.members()
    found: dict[nn.Module, None] = {}
    left: list[nn.Module | None] = [module]
    while left:
        member = left.pop()
        if member is not None and member not in found:
            found[member] = None
            if children := module_dict(member):
                left.extend(reversed(children.values()))
    return list(found)


def modes_of(module: nn.Module | Roster) -> tuple[bool, ...]:
    """For each of ``module.modules()`` whether it is in train mode."""
    return tuple([member.training for member in members(module)])


@contextmanager
def in_modes(module: nn.Module | Roster, training: Sequence[bool] | None = None) -> Iterator[None]:
    """The context in which each of ``module.modules()`` is in the mode given for it."""
    modes = {member: member.training for member in members(module)}
    try:
        for member, mode in zip(modes, modes.values() if training is None else training, strict=True):
            member.training = mode
        yield
    finally:
        for member, mode in modes.items():
            member.training = mode


@contextmanager
def in_mode(module: nn.Module, *, training: bool) -> Iterator[None]:
    """Within it the module is in one mode; afterwards its submodules have their present modes again.

    In a module that is in train mode already, submodules that are in eval mode (a frozen BatchNorm) stay so.
    """
    with in_modes(module):
        if not training or not module.training:
            module.train(training)
        yield


class _SlowAttention:
    """Makes contexts in which torch's modules of attention take the path that they take with gradients.

    The switch is the process's: the first thread that comes in turns it, and the last one out turns it back.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._before = threading.Lock(), 0, True

    @contextmanager
    def __call__(self) -> Iterator[None]:
        attention = torch.backends.mha
        with self._lock:
            if not self._inside:
                self._before = attention.get_fastpath_enabled()
                attention.set_fastpath_enabled(False)
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    attention.set_fastpath_enabled(self._before)


slow_attention = _SlowAttention()


class Follower(nn.Module):
    """A module that was made from another one, its leader, and follows that into train or eval mode.

    It can be put into either mode by itself; once its leader is put into the other mode, `follow` adopts that.
    (These are functions, since its submodules may have any name.)
    """

    _leader: tuple[nn.Module, ...] = ()  # in a tuple it is no submodule
    _leader_trains = True
    _written: frozenset[str] = frozenset()  # names of the leader's buffers that its forward is known to write
    _known_hooks: set[tuple[str, int]]  # of the leader when this was made, and those that were warned of
    _num_handles = -1  # the number of hooks ever registered in the process, when these were last looked at

    def _check_input(self, value: Tree, *, whole: bool) -> None:
        """Refuse an input that the module cannot take; any, as far as is known."""


def writes_buffer(module: nn.Module, name: str) -> bool:
    """Whether the forward is known to write the buffer: statistics of a norm, or what a traced one writes."""
    return name.rpartition(".")[2] in _STATISTICS or (isinstance(module, Follower) and name in module._written)


def check_input(module: nn.Module, value: Tree, *, whole: bool) -> None:
    """Refuse the input of a mini-batch that a traced stage cannot take, before anything is done with it; a ``whole``
    one will be cut.

    Raises:
        TypeError, ValueError: it does not fit, with what to change.
    """
    if isinstance(module, Follower):
        module._check_input(value, whole=whole)


def let_follow(modules: Sequence[Follower], leader: nn.Module) -> None:
    """From now on ``modules`` are in the mode of ``leader``."""
    known = _hooks(leader)
    for module in modules:
        module._leader, module._known_hooks = (leader,), known
        _take_mode(module, leader)


def leaders(module: nn.Module) -> tuple[nn.Module, ...]:
    """The module that ``module`` follows; empty where it follows none."""
    return module._leader if isinstance(module, Follower) else ()


def follow(module: nn.Module) -> None:
    """Adopt the mode of the leader, if it has changed; does nothing for a module without one.

    Warns of hooks that were registered on the leader, or inside the module, since it was made: they are not run.
    """
    if not isinstance(module, Follower):
        return
    for leader in module._leader:
        if leader.training != module._leader_trains:
            _take_mode(module, leader)
    if module._num_handles == RemovableHandle.next_id:
        return
    module._num_handles = RemovableHandle.next_id
    hooks = {hook for hook in _hooks(module) if hook[0]}.union(*map(_hooks, module._leader)) - module._known_hooks
    if hooks:
        module._known_hooks |= hooks
        names = ", ".join(sorted({repr(name) if name else "the model itself" for name, _ in hooks}))
        warnings.warn(
            f"hooks were registered after dtrp.split, on {names}: they are not run, since stages run what was traced "
            "then; register them on the stages that it returned",
            stacklevel=3,
        )


def _take_mode(module: Follower, leader: nn.Module) -> None:
    module._leader_trains = leader.training
    module.train(leader.training)


def _hooks(module: nn.Module) -> set[tuple[str, int]]:
    """The hooks of a module and its submodules, but for the library's: name of the module, and number of the hook."""
    return {
        (name, number)
        for name, member in module.named_modules()
        for number, hook in [*forward_hooks(member), *module_backward_hooks(member)]
        if not type(getattr(hook, "__self__", None)).__module__.startswith("dtrp.")
    }
