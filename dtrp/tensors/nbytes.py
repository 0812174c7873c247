"""Sizes in bytes: of a tensor, of a tree of tensors, of the states of an optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..typing import Tree
from .layout import parts_of
from .pytree import tensors_of


def value_bytes(value: Tree) -> int:
    """Bytes of the tensors of a tree."""
    return sum(map(tensor_bytes, tensors_of(value)))


def tensor_bytes(t: Tensor) -> int:
    """``t.nbytes``, also of a sparse tensor."""
    return t.nbytes if t.layout is torch.strided else sum(part.nbytes for part in parts_of(t))


def states_bytes(states: Iterable[Mapping[str, Any]]) -> int:
    """Bytes of the tensors in an optimizer's states."""
    return sum(tensor_bytes(t) for state in states for t in state.values() if isinstance(t, Tensor))
