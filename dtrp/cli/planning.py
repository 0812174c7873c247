"""``dtrp plan``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from ..train.config import TrainConfig, option_name
from .option_types import Bytes, Name
from .options import CHOICE_TYPES, DATA, DEFAULTS, together, train_options

# What a plan and a run have in common.
_OF_THE_RUN = (
    "data", "data_dir", "image_size", "model", "layers", "width", "heads", "context", "channels_last", "method", "batch_size",
    "optimizer", "momentum", "weight_decay", "prediction", "device", "dtype", "threads",
)  # fmt: skip
# What `make_plan` calls as the command line does.
_AS_THEY_ARE = (
    "num_microbatches", "keep", "choose_lead", "compensate", "max_batch_size", "max_delay", "lr_scaling", "repeats",
    "neighbours",
)  # fmt: skip
# What 'dtrp train' is told again beside the plan.
_TOLD_AGAIN = (
    "data_dir",
    "image_size",
    "layers",
    "width",
    "heads",
    "context",
    "optimizer",
    "momentum",
    "weight_decay",
    "dtype",
)


_search_options = together(
    click.option("--latency", type=float, help="Seconds a message takes (as measured on this machine's loopback)."),
    click.option("--bandwidth", type=Bytes(), help="Of a link, bytes a second: 125MB, 10GB (as measured)."),
    click.option(
        "--choose-lead/--keep-lead", default=True, help="Choose ahead and the order of a slot by the latency."
    ),
    click.option("--compensate", is_flag=True, help="Choose the mini-batch too, and what is kept."),
    click.option("--max-batch-size", type=click.IntRange(min=1), help="Largest mini-batch to try (32 times the base)."),
    click.option("--max-delay", type=click.IntRange(min=0), help="In updates; met by more micro-batches."),
    click.option(
        "--lr-scaling",
        type=Name("lr scaling", ("linear", "sqrt", "none")),
        default="linear",
        help="With the mini-batch.",
    ),
)


@click.command(short_help="Measure a network, and choose cuts, batch size and what to keep.")
@click.option("--data", type=DATA, default=DEFAULTS.data, help="Data set, for the shape of a batch.")
@click.option("--data-dir", type=click.Path(), help="Where the data set lies.")
@train_options("image_size", "model", "layers", "width", "heads", "context", "channels_last", "method")
@click.option("--workers", type=click.IntRange(min=1), required=True, help="K: how many there are.")
@click.option("--batch-size", type=click.IntRange(min=1), default=DEFAULTS.batch_size, help="The base mini-batch.")
@click.option(
    "--num-microbatches",
    type=click.IntRange(min=1),
    help="Parts of a mini-batch (1, or what --max-delay asks for or --compensate finds).",
)
@train_options("optimizer")
@click.option("--momentum", type=float, default=DEFAULTS.momentum, help="Of sgd; 0: it has no state.")
@click.option("--weight-decay", type=float, default=DEFAULTS.weight_decay, help="As of 'dtrp train'.")
@train_options("prediction")
@click.option(
    "--keep",
    type=Name("keep", ("auto", "graph", "input")),
    help="What stages keep (the method's own; with --compensate auto).",
)
@click.option("--memory-limit", type=Bytes(), help="Of a worker: 800MB, 2GiB.")
@_search_options
@click.option("--device", default=DEFAULTS.device, help="Where to measure.")
@click.option("--dtype", type=CHOICE_TYPES["dtype"], default=DEFAULTS.dtype, help="As of 'dtrp train'.")
@click.option(
    "--threads", type=click.IntRange(min=1), default=1, help="CPU threads of a worker, and of the one worker."
)
@click.option("--repeats", type=click.IntRange(min=1), default=7, help="Rounds of the measurement.")
@click.option(
    "--neighbours",
    type=click.IntRange(min=0),
    help="Processes that work beside the measured one (on the CPU as many as there are other workers).",
)
@click.option("--out", type=click.Path(dir_okay=False), default="plan.json", help="The file to write.")
@click.option("--overwrite", is_flag=True, help="Replace it if it is there.")
def plan(**options: Any) -> None:
    """Measure a network and choose where to cut it, what to keep, how large a batch, and whether to.

    The plan is a small file that 'dtrp train --plan' and Pipeline(plan=...) take; it may be edited.
    """
    from ..train.from_plan import make_plan
    from .console import show_plan

    out = Path(options["out"])
    if out.exists() and not options["overwrite"]:
        raise click.ClickException(f"{out} is there already; pass --overwrite, or another --out")
    if not out.absolute().parent.is_dir():
        raise click.ClickException(f"{out.absolute().parent} is no folder; make it, or pass another --out")
    config = TrainConfig(**{name: options[name] for name in _OF_THE_RUN})
    try:
        made = make_plan(
            config,
            say=lambda text: click.echo(f"{text} ...", err=True),
            num_workers=options["workers"],
            memory_limit_bytes=options["memory_limit"],
            latency_s=options["latency"],
            bandwidth_bytes_s=options["bandwidth"],
            **{name: options[name] for name in _AS_THEY_ARE},
        )
        made.save(out)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        raise click.ClickException(str(error)) from error
    show_plan(made)
    click.echo(f"written to {out}; train by it:\n  {_training_command(config, options)}")


def _training_command(config: TrainConfig, options: Mapping[str, Any]) -> str:
    """The ``dtrp train`` that trains by the plan."""
    told = [f"{option_name(name)} {options[name]}" for name in _TOLD_AGAIN if options[name] != getattr(DEFAULTS, name)]
    told += ["--channels-last"] if config.channels_last else []
    told += [f"--workers {options['workers']}"] if options["workers"] > 1 else []
    return " ".join([f"dtrp train --data {config.data} --model {config.model}", *told, f"--plan {options['out']}"])
