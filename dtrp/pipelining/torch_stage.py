"""What is read of a stage of torch's, and of the optimizer that a script has made for it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import Schedule1F1B
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, Optimizer

from ..launch.ranks import Ranks
from ..splitting.stages import check_device
from ..stage.optimizer_step import checked_optimizer
from ..tensors.torch_private import forward_contexts


def ranks_of(stage: Any) -> Ranks:
    """The ranks of the stage's group."""
    missing = [name for name in ("submod", "stage_index", "num_stages", "device", "group") if not hasattr(stage, name)]
    if missing:
        raise TypeError(
            f"stage is a {type(stage).__name__} without {missing[0]}; pass the one stage of this rank, a "
            "torch.distributed.pipelining.PipelineStage or what pipeline(...).build_stage(...) returns"
        )
    members = dist.get_process_group_ranks(stage.group) if stage.group is not None else range(dist.get_world_size())
    if len(members) != stage.num_stages:
        raise ValueError(
            f"num_stages={stage.num_stages} and the stage's group has {len(members)} ranks; each rank hosts one stage: start as "
            "many ranks as there are stages, or pass the stages their group"
        )
    return Ranks((tuple(members),), dist.get_rank())


def checked_module(stage: Any, ranks: Ranks) -> nn.Module:
    """The stage's module, if it can be trained here."""
    if stage.stage_index != ranks.stage:
        raise ValueError(
            f"stage_index={stage.stage_index} on rank {ranks.rank}, which is number {ranks.stage} of the stage's group; rank by "
            "rank the stages are 0, 1, 2, ..."
        )
    module = stage.submod
    if not isinstance(module, nn.Module):
        raise TypeError(f"stage.submod is a {type(module).__name__}; it is a torch.nn.Module")
    if isinstance(module, DistributedDataParallel) or any(isinstance(p, DTensor) for p in module.parameters()):
        raise TypeError(
            "stage.submod is wrapped for data or tensor parallelism (DistributedDataParallel, fully_shard, DTensor), which would "
            "wait for other ranks inside a stage; pass the plain module, or use dtrp.Pipeline(mesh=...), which averages "
            "gradients over replicas"
        )
    if getattr(stage, "dw_builder", None) is not None:
        raise ValueError("the stage has a dw_builder, for schedules that split a backward in two; make it without one")
    return module


def scales_by_default() -> bool:
    """Whether this torch's schedules divide gradients by the number of micro-batches: since 2.7, with an argument for it."""
    return "scale_grads" in inspect.signature(Schedule1F1B).parameters


def check_contexts(stage: Any) -> None:
    """Refuse a context for forwards, which torch 2.15 and later registers on a stage."""
    if forward_contexts(stage):
        raise ValueError(
            "the stage has a forward context (register_forward_context, of torch 2.15), in which ScheduleDTRP would not run: a "
            "backward may repeat a forward; remove it, and enter the context in the forward of the stage's module"
        )


def device_of(stage: Any) -> torch.device:
    """The stage's device, with its number; the module must be there."""
    device = check_device(torch.empty(0, device=stage.device).device)
    for name, tensor in [*stage.submod.named_parameters(), *stage.submod.named_buffers()]:
        if tensor.device != device:
            raise ValueError(
                f"{name} is on {tensor.device} and the stage's device is {device}; move the module there first, then make "
                "optimizer and schedule"
            )
    return device


def maker(optimizer: Any, module: nn.Module) -> Callable[[list[nn.Parameter]], Optimizer]:
    """A function from parameters to the optimizer, which may be there already."""
    if optimizer is None:
        if any(p.requires_grad for p in module.parameters()):
            raise TypeError("optimizer is None and the stage has parameters to train; pass an optimizer")
        return checked_optimizer(lambda parameters: torch.optim.SGD(parameters))  # never called
    if not isinstance(optimizer, Optimizer):
        return checked_optimizer(optimizer) if callable(optimizer) else optimizer
    parameters = {id(p) for p in module.parameters()}
    members = [p for group in optimizer.param_groups for p in group["params"]]
    strange = sum(id(p) not in parameters for p in members)
    if strange:
        raise ValueError(
            f"{strange} of the optimizer's {len(members)} tensors are no parameters of stage.submod; make it of "
            "stage.submod.parameters(), after the stage (pipeline(...) copies, and moving to a device may)"
        )
    if isinstance(optimizer, LBFGS):
        raise TypeError("LBFGS calls the loss many times in a step, which no pipeline can do; use another optimizer")
    return lambda parameters: optimizer
