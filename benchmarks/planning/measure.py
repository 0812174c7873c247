"""What the ranks do: take jobs in turn, round after round, and tell the times, the memory and the waiting."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sleeping import SleepingStage
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from turns import take_turn

import dtrp
from dtrp.models import get_model

LATENCY = "DTRP_MESSAGE_LATENCY_S"
FORWARD_S, BACKWARD_S = 0.030, 0.060


@dataclass(frozen=True)
class Job:
    """A pipeline to time: of sleeping stages, or of a model."""

    label: str
    method: str
    num_microbatches: int = 1
    latency_s: float = 0.0
    forward_s: tuple[float, ...] = ()
    backward_s: tuple[float, ...] = ()
    model: str | None = None
    cuts: tuple[int, ...] = ()
    batch: int = 32
    options: dict[str, Any] = field(default_factory=dict)  # of the method
    keep: str | tuple[str, ...] | None = None
    limit: int | None = None
    device: str | None = None  # of all stages
    timed: int = 12


@dataclass(frozen=True)
class Outcome:
    """Seconds a mini-batch in each round; of each stage its most bytes, its share of work, and what it keeps."""

    rounds_s: list[float]
    memory: list[int]
    busy: list[float]
    keeps: list[str]

    @property
    def median_s(self) -> float:
        return statistics.median(self.rounds_s)


def sleeping_jobs(num_stages: int) -> list[Job]:
    """dtrp, fdg, pipedream and bp on even and uneven stages, without latency and with a third of a forward."""
    even = (1.0,) * num_stages
    uneven = tuple(1.0 if k % 2 else 0.7 for k in range(num_stages))
    jobs = []
    for (label, shares), latency_s, method in itertools.product(
        (("even", even), ("uneven", uneven)), (0.0, FORWARD_S / 3), ("dtrp", "fdg", "pipedream", "bp")
    ):
        parts = 2 if method == "bp" else 1  # each of a whole F and B
        jobs.append(
            Job(
                label=label,
                method=method,
                num_microbatches=parts,
                latency_s=latency_s,
                forward_s=tuple(share * FORWARD_S for share in shares),
                backward_s=tuple(share * BACKWARD_S for share in shares),
            )
        )
    return jobs


def make_optimizer(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.01, momentum=0.9, weight_decay=5e-4)


def example(batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 3, 32, 32, generator=generator), torch.randint(10, (batch,), generator=generator)


def new_model(name: str) -> nn.Sequential:
    torch.manual_seed(0)
    return get_model(name, 3, 10, image_size=32)


def planned(model: str, batch: int, *, workers: int = 2, **options: Any) -> dtrp.Plan:
    return dtrp.plan(
        new_model(model),
        example(batch),
        cross_entropy,
        num_workers=workers,
        optimizer=make_optimizer,
        progress=print,
        **options,
    )


def model_job(
    model: str,
    plan: dtrp.Plan,
    cuts: tuple[int, ...],
    batch: int,
    *,
    method: str | None = None,
    keep: Any = "plan",
    limit: int | None = None,
    device: str | None = None,
    label: str = "",
) -> Job:
    own = method is None or method == plan.method
    return Job(
        label=label or f"{model} {list(cuts)}",
        method=method or plan.method,
        num_microbatches=plan.num_microbatches,
        model=model,
        cuts=cuts,
        batch=batch,
        options=plan.options if own else {},
        keep=plan.keep if keep == "plan" and own else None if keep == "plan" else keep,
        limit=limit,
        device=device,
        timed=max(8, min(40, 512 // batch)),
    )


class _Running:
    works = True

    def __init__(self, job: Job) -> None:
        self._first, self._last = dist.get_rank() == 0, dist.get_rank() == dist.get_world_size() - 1
        os.environ[LATENCY] = str(job.latency_s)
        model: Any
        if job.model is not None:
            model = new_model(job.model)
        else:
            model = [SleepingStage(f, b) for f, b in zip(job.forward_s, job.backward_s, strict=True)]
        self.pipe = dtrp.Pipeline(
            model,
            make_optimizer,
            cross_entropy,
            cuts=job.cuts if job.model is not None else None,
            method=dtrp.get_method(job.method, **job.options),
            num_microbatches=job.num_microbatches,
            keep=job.keep,  # type: ignore[arg-type]
            memory_limit_bytes=job.limit,
            devices=job.device,
            seed=0,
            timeout_s=120.0,
        )
        self.memory = 0
        self.busy = 0.0
        self._before: dict[str, float] | None = None
        self._steps = 0

    def step(self, x: Tensor, y: Tensor) -> Tensor | None:
        loss = self.pipe.step(x if self._first else None, y if self._last else None)
        self._steps += 1
        (seconds,) = self.pipe.busy().values()
        if self._before is None and self._steps > 8:
            self._before = seconds
        elif self._before is not None:
            spent = seconds["elapsed"] - self._before["elapsed"]
            self.busy = (seconds["busy"] - self._before["busy"]) / spent
        return loss

    def close(self) -> None:
        self.pipe.flush()
        ((k, memory),) = self.pipe.memory().items()
        gradients = sum(p.nbytes for p in self.pipe.stages[0].parameters())
        held = memory["weights"] + memory["predicted"] + memory["optimizer"] + gradients
        self.memory = held + self.pipe.activations_peak()[k]
        self.keeps = str(self.pipe.keeps()[k])
        self.pipe.close()


def run(jobs: Sequence[Job], rounds: int, out: Path) -> None:
    """On every rank; the first writes what came of the jobs."""
    num_ranks = dist.get_world_size()
    outcomes = [Outcome([], [], [], []) for _ in jobs]
    for number in range(rounds):
        for place, job in enumerate(jobs):
            data = (
                [example(job.batch)] * 2
                if job.model is not None
                else [(torch.randn(32, 64), torch.randint(64, (32,)))] * 2
            )
            running = None

            def begin(job: Job = job) -> _Running:
                nonlocal running
                running = _Running(job)
                return running

            warmup = 4 * (num_ranks - 1) + 4
            turn = take_turn(begin, data, warmup=warmup, timed=job.timed)
            assert running is not None
            told: list[Any] = [None] * num_ranks
            dist.all_gather_object(told, (running.memory, running.busy, running.keeps))
            memory, busy, keeps = map(list, zip(*told, strict=True))
            outcomes[place] = Outcome([*outcomes[place].rounds_s, turn.last_rank_s], memory, busy, keeps)
        if dist.get_rank() == 0:
            print(f"K={num_ranks}: round {number + 1} of {rounds}", flush=True)
    if dist.get_rank() == 0:
        out.write_text(json.dumps([dataclasses.asdict(outcome) for outcome in outcomes]))
