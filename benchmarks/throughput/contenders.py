"""What is compared: dtrp's methods, the schedules of torch.distributed.pipelining, DistributedDataParallel and one worker.

They are behind one `step`.

All of them train the same stages on the same mini-batches and make one optimizer step a mini-batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import dtrp
from dtrp.schedule import steady_delay

LossFn = Callable[[Tensor, Tensor], Tensor]
MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]
MakeScheduler = Callable[[Optimizer], LRScheduler]  # stepped once an update

SCHEDULES: dict[str, Any] = {
    "GPipe": ScheduleGPipe,
    "1F1B": Schedule1F1B,
    "InterleavedZeroBubble": ScheduleInterleavedZeroBubble,
    "ZBVZeroBubble": ScheduleZBVZeroBubble,
}


@dataclass(frozen=True)
class Contender:
    """Who trains, how.

    Args:
        engine: ``"dtrp"``, ``"torch"`` (torch.distributed.pipelining), ``"plain"`` (rank 0 alone, a plain loop), or ``"ddp"``
            (`DistributedDataParallel`; its ranks are given their parts of a mini-batch).
        method: a row of dtrp or one of `SCHEDULES`; of no meaning to the last two.
        num_microbatches: A.
        order: of dtrp's row, in words; empty: the row's own.
        options: fields of that row, by name, that are changed.
    """

    engine: Literal["dtrp", "torch", "plain", "ddp"]
    method: str = ""
    num_microbatches: int = 1
    order: str = ""
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        if self.engine in ("plain", "ddp"):
            return "one worker" if self.engine == "plain" else "DistributedDataParallel"
        return f"torch {self.method}" if self.engine == "torch" else " ".join([self.method, self.order]).strip()

    @property
    def row(self) -> dtrp.Method:
        """The row of dtrp."""
        return dtrp.get_method(self.method, **dict(self.options))

    def stages_per_rank(self) -> int:
        return 2 if self.method.endswith("ZeroBubble") else 1

    def host(self, index: int, num_ranks: int) -> int:
        """The rank of a stage: in turn, or to and fro in the shape of a V."""
        return min(index, 2 * num_ranks - 1 - index) if self.method == "ZBVZeroBubble" else index % num_ranks

    def recomputes(self, num_stages: int, stage: int) -> bool:
        return self.engine == "dtrp" and self.row.recomputes(num_stages, stage)

    def delay(self, num_stages: int) -> int:
        """The largest delay in steady state, in updates."""
        if self.engine != "dtrp":
            return 0
        return max(steady_delay(self.row, num_stages, k, self.num_microbatches, 0) for k in range(num_stages))


class Running(Protocol):
    """A contender in this rank; ``works``: whether it has anything to do here."""

    works: bool

    def step(self, x: Tensor, y: Tensor) -> Tensor | None:
        """One mini-batch; the loss on the last rank."""

    def close(self) -> None:
        """Finish what is in flight."""


class _Dtrp:
    works = True

    def __init__(
        self,
        contender: Contender,
        stages: Sequence[nn.Module],
        optimizer: MakeOptimizer,
        loss_fn: LossFn,
        scheduler: MakeScheduler | None = None,
    ) -> None:
        self.first, self.last = dist.get_rank() == 0, dist.get_rank() == len(stages) - 1
        self.pipe = dtrp.Pipeline(
            list(stages),
            optimizer,
            loss_fn,
            num_stages=len(stages),
            method=contender.row,
            num_microbatches=contender.num_microbatches,
            lr_scheduler=scheduler,
            seed=0,
            timeout_s=120.0,
        )

    def step(self, x: Tensor, y: Tensor) -> Tensor | None:
        return self.pipe.step(x if self.first else None, y if self.last else None)

    def close(self) -> None:
        self.pipe.flush()
        self.pipe.close()


class _ChannelsLast(nn.Module):
    """A stage of channels_last images between others: gloo sends contiguous tensors only, so they travel as (N, H, W, C).

    That is how they lie, so nothing is copied.
    """

    def __init__(self, stage: nn.Module, *, is_first: bool) -> None:
        super().__init__()
        self.stage, self.is_first = stage, is_first

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.stage(x if self.is_first or x.dim() != 4 else x.permute(0, 3, 1, 2))
        return out.permute(0, 2, 3, 1).contiguous() if out.dim() == 4 else out


class _Updating:
    """A contender of torch's, which has an optimizer and, it may be, a scheduler of its own."""

    works = True

    def __init__(self, parameters: list[Tensor], optimizer: MakeOptimizer, scheduler: MakeScheduler | None) -> None:
        self.optimizer = optimizer(parameters)
        self.scheduler = None if scheduler is None else scheduler(self.optimizer)

    def update(self) -> None:
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()

    def close(self) -> None:
        pass


class _Torch(_Updating):
    def __init__(
        self,
        contender: Contender,
        stages: Sequence[nn.Module],
        optimizer: MakeOptimizer,
        loss_fn: LossFn,
        x: Tensor,
        scheduler: MakeScheduler | None = None,
    ) -> None:
        rank, world = dist.get_rank(), dist.get_world_size()
        parts = contender.num_microbatches
        hosted, h = {}, torch.tensor_split(x, parts)[0]
        if not all(p.is_contiguous() for stage in stages for p in stage.parameters()):
            stages = [_ChannelsLast(stage, is_first=index == 0) for index, stage in enumerate(stages)]
        for index, stage in enumerate(stages):  # what goes between stages, by example
            out = copy.deepcopy(stage)(h).detach().requires_grad_()  # of a copy: statistics of batches stay as they are
            if contender.host(index, world) == rank:
                device = torch.device("cpu")
                hosted[index] = PipelineStage(stage, index, len(stages), device, input_args=(h,), output_args=(out,))
            h = out
        self.first, self.last = rank == 0, rank == contender.host(len(stages) - 1, world)
        super().__init__([p for index in hosted for p in stages[index].parameters()], optimizer, scheduler)
        own = list(hosted.values())
        schedule = SCHEDULES[contender.method]
        self.schedule = schedule(own if contender.stages_per_rank() > 1 else own[0], parts, loss_fn=loss_fn)

    def step(self, x: Tensor, y: Tensor) -> Tensor | None:
        self.optimizer.zero_grad()
        losses: list[Tensor] = []
        inputs = (x,) if self.first else ()
        target = {"target": y, "losses": losses} if self.last else {}
        self.schedule.step(*inputs, **target, return_outputs=False)
        self.update()
        return torch.stack([loss.detach() for loss in losses]).mean() if self.last else None


class _Whole(_Updating):
    """All stages in this rank: a plain loop, on rank 0 alone or on every rank within `DistributedDataParallel`."""

    def __init__(
        self,
        contender: Contender,
        stages: Sequence[nn.Module],
        optimizer: MakeOptimizer,
        loss_fn: LossFn,
        scheduler: MakeScheduler | None = None,
    ) -> None:
        model = nn.Sequential(*stages)
        super().__init__(list(model.parameters()), optimizer, scheduler)
        self.works = contender.engine == "ddp" or dist.get_rank() == 0
        # Without broadcasts of buffers, which nothing reads in training: it is faster.
        self.model = DistributedDataParallel(model, broadcast_buffers=False) if contender.engine == "ddp" else model
        self.loss_fn = loss_fn

    def step(self, x: Tensor, y: Tensor) -> Tensor | None:
        if not self.works:
            return None
        self.optimizer.zero_grad()
        loss = self.loss_fn(self.model(x), y)
        loss.backward()
        self.update()
        return loss.detach()


def start(
    contender: Contender,
    stages: Sequence[nn.Module],
    optimizer: MakeOptimizer,
    loss_fn: LossFn,
    x: Tensor,
    scheduler: MakeScheduler | None = None,
) -> Running:
    """Put a contender to work; collective. ``stages``: all of them, of which a rank trains its own; ``x``: a mini-batch."""
    if contender.engine == "dtrp":
        return _Dtrp(contender, stages, optimizer, loss_fn, scheduler)
    if contender.engine == "torch":
        return _Torch(contender, stages, optimizer, loss_fn, x, scheduler)
    return _Whole(contender, stages, optimizer, loss_fn, scheduler)


def chosen(contenders: Sequence[Contender], only: Sequence[str]) -> list[Contender]:
    """Those whose names are in ``only``; all where it is empty."""
    return [contender for contender in contenders if not only or contender.name in only]
