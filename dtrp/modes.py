"""Train and eval mode, for a while."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_modes(module: nn.Module, training: Sequence[bool]) -> Iterator[None]:
    """Within it each of ``module.modules()`` is in the mode given for it; after it in its own again."""
    modes = {member: member.training for member in module.modules()}
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
    modes = {member: member.training for member in module.modules()}
    try:
        if not training or not module.training:
            module.train(training)
        yield
    finally:
        for member, mode in modes.items():
            member.training = mode
