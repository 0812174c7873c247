"""Train and eval mode: for a while, and as another module's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn


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


def let_follow(module: Follower, other: nn.Module) -> None:
    """From now on ``module`` is in the mode of ``other``."""
    module._leader, module._leader_trains = (other,), other.training
    module.train(other.training)


def follow(module: nn.Module) -> None:
    """Take on the mode of the other, if that has changed; of a module without another nothing."""
    if isinstance(module, Follower):
        for other in module._leader:
            if other.training != module._leader_trains:
                let_follow(module, other)
