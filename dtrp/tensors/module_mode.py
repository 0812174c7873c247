"""Train and eval mode: for a while, and as another module's."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from torch.utils.hooks import RemovableHandle


def members(module: nn.Module) -> list[nn.Module]:
    """``module.modules()``, in the same order, without a generator in a generator for each level."""
    found: dict[nn.Module, None] = {}
    left = [module]
    while left:
        member = left.pop()
        if member is not None and member not in found:
            found[member] = None
            if member._modules:
                left.extend(reversed(member._modules.values()))  # type: ignore[arg-type]
    return list(found)


def modes_of(module: nn.Module) -> tuple[bool, ...]:
    """Which of ``module.modules()`` are in train mode."""
    return tuple([member.training for member in members(module)])


@contextmanager
def in_modes(module: nn.Module, training: Sequence[bool]) -> Iterator[None]:
    """Within it each of ``module.modules()`` is in the mode given for it; after it in its own again."""
    modes = {member: member.training for member in members(module)}
    try:
        for member, mode in zip(modes, training, strict=True):
            member.training = mode
        yield
    finally:
        for member, mode in modes.items():
            member.training = mode


@contextmanager
def in_mode(module: nn.Module, *, training: bool) -> Iterator[None]:
    """Within it the module is in one mode; after it each of its submodules is in its own again.

    In a module that is in train mode already, submodules that are in eval mode (a frozen BatchNorm) stay so.
    """
    modes = {member: member.training for member in members(module)}
    try:
        if not training or not module.training:
            module.train(training)
        yield
    finally:
        for member, mode in modes.items():
            member.training = mode


class Follower(nn.Module):
    """A module that was made of another, and is in train or eval mode as that is.

    It can be put into either by itself; when the other is put into the one it was not in, `follow` takes that on.
    (These are functions, since its submodules may have any name.)
    """

    _leader: tuple[nn.Module, ...] = ()  # the other; in a tuple it is no submodule
    _leader_trains = True
    _known_hooks: set[tuple[str, int]]  # of the other when this was made of it, and those of which was warned
    _num_handles = -1  # how many hooks there had been, of whatever, when these were last looked at


def let_follow(modules: Sequence[Follower], other: nn.Module) -> None:
    """From now on ``modules`` are in the mode of ``other``."""
    known = _hooks(other)
    for module in modules:
        module._leader, module._known_hooks = (other,), known
        _take_mode(module, other)


def follow(module: nn.Module) -> None:
    """Take on the mode of the other, if that has changed; of a module without another nothing.

    Warns of hooks that were registered on the other, or inside of the module, since it was made: they are not run.
    """
    if isinstance(module, Follower):
        for other in module._leader:
            if other.training != module._leader_trains:
                _take_mode(module, other)
        if module._num_handles != RemovableHandle.next_id:
            module._num_handles = RemovableHandle.next_id
            hooks = {hook for hook in _hooks(module) if hook[0]}
            for other in module._leader:
                hooks |= _hooks(other)
            hooks -= module._known_hooks
            if hooks:
                module._known_hooks |= hooks
                names = ", ".join(sorted({repr(name) if name else "the model itself" for name, _ in hooks}))
                warnings.warn(
                    f"hooks were registered after dtrp.split, on {names}: they are not run, since stages run what was traced "
                    "then; register them on the model before dtrp.split, or on the stages that it returned",
                    stacklevel=3,
                )


def _take_mode(module: Follower, other: nn.Module) -> None:
    module._leader_trains = other.training
    module.train(other.training)


def _hooks(module: nn.Module) -> set[tuple[str, int]]:
    """The hooks of a module and those in it, but for the library's own: of which, and their numbers."""
    return {
        (name, number)
        for name, member in module.named_modules()
        for hooks in (
            member._forward_hooks,
            member._forward_pre_hooks,
            member._backward_hooks,
            member._backward_pre_hooks,
        )
        for number, hook in hooks.items()
        if not type(getattr(hook, "__self__", None)).__module__.startswith("dtrp.")
    }
