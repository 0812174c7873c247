"""How many workers a run has, and so how many stages; and what a run whose workers may fail needs."""

from __future__ import annotations

import re

from ..launch.ranks import launched
from .config import TrainConfig


def worker_range(text: str) -> tuple[int, int]:
    """``2:4`` as (2, 4): the fewest workers that a run goes on with, and the most.

    Raises:
        ValueError: anything else.
    """
    match = re.fullmatch(r"\s*([0-9]{1,6}):([0-9]{1,6})\s*", text)
    least, most = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= least <= most:
        raise ValueError(f"--workers {text}: a number, like 4, or the fewest and the most, like 2:4")
    return least, most


def fixed_stages(stages: int | str | None) -> int | None:
    """A number of stages; None where it is chosen."""
    return stages if isinstance(stages, int) else None


def workers_per_replica(config: TrainConfig, num_processes: int | None = None) -> int:
    """K, when each stage has a worker of its own.

    Args:
        config: what says ``workers`` and ``replicas``.
        num_processes: how many torchrun has started, if it has.

    Raises:
        ValueError: they do not make up as many; or the stages are another number.
    """
    stages = fixed_stages(config.stages) if config.cuts is None else len(config.cuts) + 1
    if isinstance(config.workers, str):
        least, most = worker_range(config.workers)
        if num_processes is None or not least <= num_processes <= most:
            raise ValueError(f"--workers {config.workers}, and {num_processes or 'none'} were started")
        num_workers: int | None = num_processes
    else:
        num_workers = config.workers
    if num_workers is None:
        num_workers = num_processes // config.replicas if num_processes is not None else stages
    if num_workers is None:
        raise ValueError(f"--replicas {config.replicas} without --workers; say how many workers a replica has")
    if num_processes is not None and num_workers * config.replicas != num_processes:
        raise ValueError(
            f"--workers {num_workers} and --replicas {config.replicas} make {num_workers * config.replicas} processes, and "
            f"{num_processes} were started; start as many (torchrun --nproc-per-node {num_workers * config.replicas})"
        )
    if stages is not None and stages != num_workers:
        raise ValueError(
            f"{stages} stages and --workers {num_workers}: each worker has one stage; leave --stages out, or make them equal"
        )
    return num_workers


def check_workers(config: TrainConfig) -> None:
    """What a run whose workers may fail needs, and what one whose stages may change cannot have."""
    if isinstance(config.workers, str):
        worker_range(config.workers)
    if isinstance(config.stages, str) and config.stages != "auto":
        raise ValueError(f"--stages {config.stages}: a number, or auto: as many as there are workers")
    restarts = config.max_restarts or isinstance(config.workers, str)
    if restarts and not (config.out and config.keep_last):
        name = f"--workers {config.workers}" if isinstance(config.workers, str) else "--max-restarts"
        lacks = "--out" if not config.out else "saves (--keep-last 0)"
        raise ValueError(f"{name} without {lacks}: a restart goes on from the last save; pass --out, and keep some")
    if config.max_restarts is not None and config.workers is None and not launched():
        raise ValueError("--max-restarts without --workers: one process has nobody to start it again; pass --workers")
    if not config.elastic:
        return
    if config.workers is None and not launched():
        raise ValueError("--stages auto without --workers: say how many there are, or may be: --workers 2:4")
    each = config.keep is not None and "," in config.keep
    for name, given in (
        (f"--stages {config.stages}", config.stages not in (None, "auto")),
        ("--cuts", config.cuts is not None),
        ("--plan", config.plan is not None),
        (f"--keep {config.keep}", each),
        (f"--replicas {config.replicas}", config.replicas > 1),
    ):
        if given:
            auto = "--stages auto" if config.stages == "auto" else f"--workers {config.workers}"
            raise ValueError(f"{name} with {auto}, where the number of stages may change; leave one of them out")
