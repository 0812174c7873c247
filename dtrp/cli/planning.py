"""The command ``dtrp plan``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..train.config import DATA_AND_MODEL, TrainConfig, option_words
from .endings import mistakes
from .option_types import SIZE, Name
from .options import DEFAULTS, together, train_options

if TYPE_CHECKING:
    from ..planning import Plan

_OPTIMIZER = ("optimizer", "momentum", "weight_decay")
_RUN_SETTINGS = (*DATA_AND_MODEL, *_OPTIMIZER, "method", "batch_size", "prediction", "device", "dtype", "threads")
# Options of the `dtrp train` that trains by a plan, beside the plan.
_REPEATED = (*(field for field in DATA_AND_MODEL if field not in ("data", "model")), *_OPTIMIZER, "dtype")
_AT_LEAST_1 = click.IntRange(min=1)

_search_options = together(
    click.option(
        "--latency", "latency_s", type=float, help="Seconds a message takes (as measured on this machine's loopback)."
    ),
    click.option(
        "--bandwidth", "bandwidth_bytes_s", type=SIZE, help="Of a link, bytes a second: 125MB, 10GB (as measured)."
    ),
    click.option(
        "--choose-lead/--keep-lead", default=True, help="Choose ahead and the order of a slot by the latency."
    ),
    click.option("--compensate", is_flag=True, help="Choose the mini-batch too, and what is kept."),
    click.option("--max-batch-size", type=_AT_LEAST_1, help="Largest mini-batch to try (32 times the base)."),
    click.option(
        "--max-delay",
        type=click.IntRange(min=0),
        help="In updates; met by more micro-batches, or by an order with less delay.",
    ),
    click.option(
        "--max-slowdown",
        type=click.FloatRange(min=0),
        help="Take the order with the least delay that is slower than the fastest by no more than this share (0.02).",
    ),
    click.option(
        "--lr-scaling",
        type=Name("lr scaling", ("linear", "sqrt", "none")),
        default="linear",
        help="With the mini-batch.",
    ),
)


@click.command(short_help="Measure a network, and choose cuts, batch size and what to keep.")
@train_options(*DATA_AND_MODEL, "method")
@click.option("--workers", "num_workers", type=_AT_LEAST_1, required=True, help="K, the number of workers.")
@click.option("--batch-size", type=_AT_LEAST_1, default=DEFAULTS.batch_size, help="The base mini-batch.")
@click.option(
    "--num-microbatches",
    type=_AT_LEAST_1,
    help="Parts of a mini-batch (1, or what --max-delay asks for or --compensate finds).",
)
@train_options(*_OPTIMIZER, "prediction")
@click.option(
    "--keep",
    type=Name("keep", ("auto", "graph", "input")),
    help="What stages keep (the method's; with --compensate auto).",
)
@click.option("--memory-limit", "memory_limit_bytes", type=SIZE, help="Of a worker: 800MB, 2GiB.")
@_search_options
@click.option("--device", default=DEFAULTS.device, help="Where to measure.")
@train_options("dtype")
@click.option("--threads", type=_AT_LEAST_1, default=1, help="CPU threads of a worker, and of the one worker.")
@click.option("--repeats", type=_AT_LEAST_1, default=7, help="Rounds of the measurement; 4 for a verdict.")
@click.option(
    "--neighbours",
    type=click.IntRange(min=0),
    help="Processes that work beside the measured one (on the CPU as many as there are other workers).",
)
@click.option("--out", type=click.Path(dir_okay=False), default="plan.json", help="The file to write.")
@click.option("--overwrite", is_flag=True, help="Replace it if it is there.")
def plan(out: str, *, overwrite: bool, **options: Any) -> None:
    """Measure a network and choose where to cut it, what to keep, how large a batch, and whether to pipeline at all.

    The plan is a small file that 'dtrp train --plan' and Pipeline(plan=...) take; it may be edited.
    """
    from ..train.from_plan import make_plan
    from .console import show_plan

    path = Path(out)
    if path.exists() and not overwrite:
        raise click.ClickException(f"{path} is there already; pass --overwrite, or another --out")
    if not path.absolute().parent.is_dir():
        raise click.ClickException(f"{path.absolute().parent} is no folder; make it, or pass another --out")
    config = TrainConfig(**{name: options.pop(name) for name in _RUN_SETTINGS})
    with mistakes(ValueError, TypeError, OSError, ImportError, RuntimeError):
        made = make_plan(config, say=lambda text: click.echo(f"{text} ...", err=True), **options)
        made.save(path)
    show_plan(made)
    click.echo(what_next(config, made, path))


def what_next(config: TrainConfig, made: Plan, path: Path) -> str:
    """Where the plan is, and the commands that follow from its verdict."""
    settings = {field.replace("_", "-"): getattr(config, field) for field in _REPEATED}
    train = " ".join(["dtrp train --data", config.data, "--model", config.model, *option_words(settings)])
    workers = f" --workers {made.num_workers}" if made.num_workers > 1 else ""
    by_plan = f"{train}{workers} --plan {path}"
    if made.verdict == "pipeline" or made.num_workers == 1:
        return f"written to {path}; train by it:\n  {by_plan}"
    alone = f"{train} --method bp --stages 1 --batch-size {made.batch_size}"
    if made.verdict == "one worker":
        return f"written to {path}; train on one worker:\n  {alone}\nand to compare, in a pipeline:\n  {by_plan}"
    return f"written to {path}; to compare a run of it with one worker:\n  {by_plan}\n  {alone}"
