"""What a stage keeps of a micro-batch between its forward and its backward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ..tensors.autocast import AutocastState
from .buffers import Met


@dataclass(frozen=True)
class MicroBatch:
    """What every stage must know of a micro-batch.

    Args:
        index: m, counted since the pipeline was made.
        minibatch: b(m).
        share: its samples over those of its mini-batch.
    """

    index: int
    minibatch: int
    share: float


class WeightVersion:
    """A copy of a stage's trainable weights: ``tensors`` to write, ``leaves`` for graphs to stand on.

    Attributes:
        minibatch, marks: the last mini-batch that has read it as the weights of then, and what told that they were.
    """

    minibatch: int | None = None
    marks: list[tuple[int, int]] | None = None

    def __init__(self, like: Sequence[Tensor]) -> None:
        self.tensors = [torch.empty_like(t, requires_grad=False) for t in like]
        self.leaves = [t.detach().requires_grad_() for t in self.tensors]
        self.nbytes = sum(t.nbytes for t in self.tensors)

    @torch.no_grad()
    def copy_from(self, parameters: Sequence[Tensor]) -> None:
        """Take the weights of now."""
        for t, p in zip(self.tensors, parameters, strict=True):
            t.copy_(p)


@dataclass
class Held:
    """The stash's entry for one micro-batch."""

    micro: MicroBatch
    version: int  # updates when F ran
    autocast: AutocastState
    leaf: Any  # the input, a tensor or a tree of them
    nbytes: int  # of the input, and of the graph where it is kept
    target: Any = None  # what the loss compares with, at a stage that has one
    weights: WeightVersion | None = None  # the copy that F read, where B needs it
    has_graph: bool = False
    modes: tuple[bool, ...] = ()  # of the module and those in it, train or eval, in the forward
    met: Met | None = None  # the buffers that F read, where its graph is kept
    first: Any = None  # what the repetition of the forward is compared with (`dtrp.stage.repetition`)
    # Where differentiation starts, for each tensor of the output; None where it has nothing to do. Where there is a loss: it.
    roots: list[Tensor | GradientEdge | None] = field(default_factory=list)
    # Which tensors of the output went on as ones that want a gradient; empty where all have a root that do.
    wanting: list[bool] = field(default_factory=list)
    # Filled by B, for each tensor of the input; empty where it needs none.
    input_gradients: list[list[Tensor]] = field(default_factory=list)


def stash_bytes(stash: Iterable[Held]) -> int:
    """What the entries hold together; entries may share a copy of the weights."""
    versions = {id(held.weights): held.weights.nbytes for held in stash if held.weights is not None}
    return sum(held.nbytes for held in stash) + sum(versions.values())
