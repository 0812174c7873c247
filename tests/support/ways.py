"""Every way to bring a pipeline to a state; whatever it saves there must load, and go on to the bit."""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers import pipeline, scheduler, sgd
from torch import Tensor, nn

METHODS = ("dtrp", "spectrain", "fdg", "bp", "dtr")
Feed = Callable[[Any, Tensor, Tensor], Any]  # one step of a pipeline; the losses that it returns here
Chain = tuple[str, ...]


def batch(n: int, *, spoiled: bool = False) -> tuple[Tensor, Tensor]:
    """Mini-batch n, of 7 samples and 6 features; where it is spoiled its loss is not finite."""
    generator = torch.Generator().manual_seed(n)
    x, y = torch.randn(7, 6, generator=generator), torch.randint(3, (7,), generator=generator)
    return (x * math.nan if spoiled else x), y


class Ways:
    """The ways of a kind of pipeline.

    Args:
        make: a new one each time, of other weights; with ``on_nonfinite="skip"``.
        feed: a step.
        infer: evaluates.
        folder: for checkpoints, the same one on all ranks.
    """

    def __init__(self, make: Callable[[], Any], feed: Feed, infer: Callable[[Any, Tensor], Any], folder: Path) -> None:
        self._make, self._feed, self._infer, self._folder = make, feed, infer, folder
        source = make()
        self._steps(source, 4)
        source.save(folder / "exact")
        source.flush()
        self._state = source.state_dict()
        source.save(folder / "portable", portable=True)
        source.close()

    def _steps(self, pipe: Any, count: int, **kind: bool) -> list[Any]:
        return [self._feed(pipe, *batch(pipe.num_updates, **kind)) for _ in range(count)]

    def _arrive(self, pipe: Any, way: str) -> None:
        if way == "steps":
            self._steps(pipe, 2)
        elif way == "warm start":
            pipe.flush()
            pipe.load_state_dict(self._state)
        elif way in ("exact", "portable"):
            pipe.load(self._folder / way)
        elif way == "skip":
            self._steps(pipe, 1, spoiled=True)
        elif way == "flush":
            pipe.flush()
        elif way == "infer":
            self._infer(pipe, batch(0)[0])

    def _go_on(self, pipe: Any) -> list[Any]:
        losses = self._steps(pipe, 3)
        pipe.flush()
        found = [losses, pipe.state_dict(), [stage.version for stage in pipe._engine.stages], pipe.skipped_updates()]
        pipe.close()
        return found

    def check(self, chain: Chain, *, portable: bool) -> None:
        """Arrive by ``chain``, save, and go on; and load, and go on."""
        pipe = self._make()
        for way in chain:
            self._arrive(pipe, way)
        pipe.save(self._folder / "saved", portable=portable)
        want = self._go_on(pipe)
        again = self._make()
        again.load(self._folder / "saved")
        found = self._go_on(again)
        assert_alike(found[:3] if portable else found, want[:3] if portable else want, f"{chain}, portable={portable}")
        assert set(want[2]) == {want[1]["num_updates"]}, "every stage has made one update for each mini-batch"


def bare() -> nn.Sequential:
    """No buffers, which a mini-batch that is left out would spoil."""
    return nn.Sequential(
        nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Dropout(0.2), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)
    )


def of_pipelines(method: str, parts: int, folder: Path, num_stages: int) -> Ways:
    """Those of `dtrp.Pipeline`."""
    return Ways(
        lambda: pipeline(
            bare(), num_stages=num_stages, method=method, num_microbatches=parts, on_nonfinite="skip", timeout_s=30.0
        ),
        lambda pipe, x, y: pipe.step(x, y),
        lambda pipe, x: pipe.infer(x),
        folder,
    )


def of_schedules(method: str, parts: int, folder: Path, num_stages: int) -> Ways:
    """Those of `ScheduleDTRP`, on ranks."""
    from drop_in_programs import by_hand, cross_entropy, rank

    from dtrp.pipelining import ScheduleDTRP

    if not dist.is_initialized():
        dist.init_process_group("gloo")

    def make() -> ScheduleDTRP:
        module = nn.Sequential(OrderedDict(list(bare().named_children())[rank() * 4 :][:4]))
        return ScheduleDTRP(
            by_hand(module), sgd, parts, cross_entropy, method=method, lr_scheduler=scheduler, seed=7,
            on_nonfinite="skip", timeout_s=30.0,
        )  # fmt: skip

    def feed(schedule: ScheduleDTRP, x: Tensor, y: Tensor) -> Any:
        losses: list[Tensor] = []
        schedule.step(x, **({"target": y, "losses": losses} if rank() == num_stages - 1 else {}))
        return losses

    return Ways(make, feed, lambda schedule, x: schedule.eval(x), folder)


WAYS = ("steps", "warm start", "exact", "portable", "skip", "flush", "infer")
CHAINS: list[Chain] = [
    (),
    *((way,) for way in WAYS),
    *itertools.product(WAYS, WAYS),
    *itertools.product(WAYS, WAYS, WAYS),
]


def spread(place: int, places: int, lengths: Iterable[int] = (1, 2)) -> list[Chain]:
    """One in ``places`` of the chains of these lengths, and what the defect was found by."""
    chosen = [chain for chain in CHAINS if len(chain) in lengths]
    return [*dict.fromkeys([("warm start", "steps"), *chosen[place::places]])]


def assert_alike(a: Any, b: Any, where: str) -> None:
    """Equal to the bit, however deep; what is nan is nan."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_alike(a[key], b[key], f"{where}, {key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_alike(x, y, f"{where}, {i}")
    elif isinstance(a, Tensor):
        assert torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0)), where
    else:
        assert a == b, where
