"""What the micro-batches of a mini-batch count for in its loss, where the caller says it (``loss_weight``)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from ..comm.message import Note
from ..tensors.pytree import num_samples
from ..typing import LossWeight, Tree


def weigh(loss_weight: LossWeight, targets: Sequence[Tree]) -> list[float]:
    """The weight of each micro-batch; 0 for one without samples.

    Args:
        loss_weight: the argument of `dtrp.Pipeline`.
        targets: the targets of each micro-batch.

    Raises:
        TypeError, ValueError: ``loss_weight`` did not return a finite number of at least 0.
    """
    given = [loss_weight(target) if num_samples(target) else 0.0 for target in targets]
    tensors = [value for value in given if isinstance(value, Tensor)]
    for value in given:
        if isinstance(value, Tensor) and value.numel() != 1:
            raise TypeError(f"loss_weight returned a tensor of shape {tuple(value.shape)}; it returns one number")
        if not isinstance(value, Tensor | Real):
            raise TypeError(f"loss_weight returned a {type(value).__name__}; it returns one number")
    read = iter(torch.stack([t.detach().double().reshape(()) for t in tensors]).tolist() if tensors else ())
    weights = [next(read) if isinstance(value, Tensor) else float(value) for value in given]
    for weight in weights:
        if not 0 <= weight < math.inf:
            raise ValueError(f"loss_weight returned {weight}; it returns a finite number of at least 0")
    return weights


def part_of_loss(weight: float, total: float, *, has_replicas: bool = False) -> float:
    """What the loss of a micro-batch is multiplied by, from its weight and the weight of its mini-batch.

    A mini-batch without any weight has no mean loss: nan. With replicas it has one if another replica's part has
    weight.
    """
    if total:
        return weight / total
    return 0.0 if has_replicas else math.nan


def weight_of(note: Note, *, has_replicas: bool = False) -> float | None:
    """The same, from what a message says of the micro-batch; None where it says nothing of weights."""
    return None if note.weight < 0 else part_of_loss(note.weight, note.total_weight, has_replicas=has_replicas)
