"""What a stage is made from: its position among the stages, its network, and how that is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from ..methods import Method
from ..tensors.rng import Draws
from ..tensors.torch_private import module_dict
from ..typing import LossFn, OptimizerFactory, SchedulerFactory, Tree
from .gradients import GradientRule
from .losses import Section, WithLoss
from .tied import Tie


@dataclass(frozen=True)
class StagePosition:
    """Where a stage stands.

    Args:
        index: k.
        num_stages: K.
        device: the device on which the stage computes.
        seed: the pipeline's seed of random draws.
        replica: the index of the replica of the pipeline.
    """

    index: int
    num_stages: int
    device: torch.device
    seed: int
    replica: int = 0

    @property
    def is_last(self) -> bool:
        return self.index == self.num_stages - 1

    def draws(self) -> Draws:
        """The random draws of the stage."""
        return Draws(self.seed, self.replica, self.index, self.device)


@dataclass(frozen=True)
class StageNetwork:
    """What a stage computes.

    Args:
        module: the stage's layers; their parameters stay the caller's objects.
        loss_fn: the loss, at a stage that has one: the last, or with a local method every stage.
        needs_input_grad: whether any stage before this one has something to train.
        aux: the auxiliary network between the output and a local loss, with its name in the whole; None: there is none.
        loss_module: the loss itself, where it has parameters to train; at the last stage only.
        call: runs the module on a stage's input; None: the module is called with it.
        compile: keyword arguments of `torch.compile` for the module; None: it runs as it is.
        ties: parameters that several stages hold, of all stages.
        shared_buffers: buffers that several stages hold, of all stages.
    """

    module: nn.Module
    loss_fn: LossFn | None
    needs_input_grad: bool
    aux: tuple[str, nn.Module] | None = None
    loss_module: nn.Module | None = None
    call: Callable[[Tree], Tree] | None = None
    compile: Mapping[str, Any] | None = None
    ties: Sequence[Tie] = ()
    shared_buffers: Sequence[Tie] = ()

    @cached_property
    def section(self) -> tuple[Section, nn.Module] | None:
        """What is trained at the stage beside its module, and the section of a state dict that has it."""
        if self.loss_module is not None:
            return "loss", self.loss_module
        if self.aux is None:
            return None
        networks = nn.Module()
        # The name is a layer's, which may be that of a method of any class of modules.
        module_dict(networks)[self.aux[0]] = self.aux[1]
        return "aux", networks

    @cached_property
    def whole(self) -> nn.Module:
        """All that is trained at the stage: the module, with its auxiliary network or its loss."""
        return self.module if self.section is None else WithLoss(self.module, *self.section)


@dataclass(frozen=True)
class StageTraining:
    """How a stage is trained.

    Args:
        method: the row to work by.
        optimizer: makes the optimizer; called when the stage has parameters to update.
        lr_scheduler: makes the learning-rate scheduler, or None.
        num_microbatches: A.
        memory_limit_bytes: None: the stage keeps what its method says. Otherwise it measures its first micro-batch, and
            keeps its graphs where they fit into the limit, and its inputs where they do not.
        rule: what is done with gradients that are too long or not finite.
    """

    method: Method
    optimizer: OptimizerFactory
    lr_scheduler: SchedulerFactory | None = None
    num_microbatches: int = 1
    memory_limit_bytes: int | None = None
    rule: GradientRule = field(default_factory=GradientRule)
