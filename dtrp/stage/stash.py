"""What a stage keeps of a micro-batch between its forward and its backward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge

from ..tensors.autocast import AutocastState
from ..typing import Tree
from .buffers import BuffersRead
from .deferral import Queue
from .weight_versions import WeightVersion


@dataclass(frozen=True)
class MicroBatch:
    """What every stage must know of a micro-batch.

    Args:
        index: m, counted since the pipeline was made.
        minibatch: b(m).
        share: its samples over those of its mini-batch.
        weight: its part of the mini-batch's loss by ``loss_weight``; nan where the whole mini-batch has no weight;
            None: ``share``, or not known yet at this stage.
    """

    index: int
    minibatch: int
    share: float
    weight: float | None = None

    @property
    def factor(self) -> float:
        """What its loss is multiplied by in the loss of the mini-batch."""
        return self.share if self.weight is None else self.weight


@dataclass
class StashEntry:
    """The stash's entry for one micro-batch."""

    micro: MicroBatch
    version: int  # updates when F ran
    autocast: AutocastState
    leaf: Tree  # the input
    nbytes: int  # of the input, and of the graph where it is kept
    target: Tree = None  # what the loss compares with, at a stage that has one
    weights: WeightVersion | None = None  # the copy that F read, where B needs it
    has_graph: bool = False
    modes: tuple[bool, ...] = ()  # of the module and its submodules, train or eval, in the forward
    met: BuffersRead | None = None  # the buffers that F read, where its graph is kept
    first: Any = None  # what the repetition of the forward is compared with (`dtrp.stage.repetition`)
    # Where differentiation starts: the loss, or the edge of each tensor of the output; None: no gradient is wanted.
    roots: list[Tensor | GradientEdge | None] = field(default_factory=list)
    added: Tensor | None = None  # the sum of the terms that the forward has added to the loss
    # Which tensors of the output were passed on as requiring a gradient; empty where those with a root were.
    wanting: list[bool] = field(default_factory=list)
    # Filled by B, for each tensor of the input; empty where it needs none.
    input_gradients: list[list[Tensor]] = field(default_factory=list)


@dataclass(frozen=True)
class WaitingWeights:
    """What a micro-batch has left between the two parts of its backward.

    Args:
        micro: the micro-batch.
        queue: what its weights' gradients are made of.
        leaves: where they go.
        weights: the copy that its forward read; None: the parameters themselves.
    """

    micro: MicroBatch
    queue: Queue
    leaves: Sequence[Tensor]
    weights: WeightVersion | None

    @cached_property
    def nbytes(self) -> int:
        return self.queue.nbytes


def stash_bytes(stash: Iterable[StashEntry | WaitingWeights]) -> int:
    """Bytes of the entries together; entries may share a copy of the weights."""
    versions = {id(held.weights): held.weights.nbytes for held in stash if held.weights is not None}
    return sum(held.nbytes for held in stash) + sum(versions.values())
