"""Names for the types that signatures share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

from torch import Tensor
from torch.optim import Optimizer

Tree: TypeAlias = Any
"""A tensor, or tuples, lists and dicts of tensors, nested: what a stage is given and returns."""

LossFn: TypeAlias = Callable[[Tree, Tree], Tensor]
"""(output, target) -> a scalar tensor, the mean over the samples."""

LossWeight: TypeAlias = Callable[[Tree], Tensor | float]
"""The targets of a micro-batch -> what it counts for in its mini-batch, a number of at least 0."""

OptimizerFactory: TypeAlias = Callable[..., Optimizer]
"""The trainable parameters of a stage -> their optimizer."""

SchedulerFactory: TypeAlias = Callable[..., Any]
"""An optimizer -> its learning-rate scheduler."""

AutocastFactory: TypeAlias = Callable[[], AbstractContextManager[Any]]
"""() -> the region in which forwards run, as ``lambda: torch.autocast("cpu", torch.bfloat16)``."""

StateDict: TypeAlias = dict[str, Any]
"""What ``state_dict()`` of a module, an optimizer, a scheduler or a pipeline returns, or a part of it."""

Json: TypeAlias = Any
"""None, bool, int, float, str, and lists and dicts with string keys of them."""
