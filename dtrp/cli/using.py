"""The commands ``dtrp evaluate``, ``dtrp predict`` and ``dtrp export``: what a run's model says, and its weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from ..train.config import METRICS
from .endings import mistakes
from .option_types import Name, NameOrReference
from .options import NAME_TYPES, together

_at = click.option(
    "--at",
    default="last",
    help="Weights: the last that were written, those of the best epoch (best), or a number of updates.",
)
_where = together(
    click.option("--device", default="cpu", help="Where to compute."),
    click.option("--threads", type=click.IntRange(min=1), help="CPU threads (torch's default)."),
)


def _loading(run: str, at: str, threads: int | None) -> Any:
    """The run in a folder; a mistake is one line."""
    import torch

    from ..train.trained.loading import TrainedRun

    if threads is not None:
        torch.set_num_threads(threads)
    with mistakes(ValueError, OSError, ImportError):
        return TrainedRun.open(run, at)


def _shown(run: Any) -> str:
    return f"{run.config.model} on {run.facts.name}, after update {run.update}"


@click.command(short_help="Test a run's model, on its data or on other data.")
@click.argument("run", type=click.Path())
@_at
@click.option("--data", type=NAME_TYPES["data"], help="Other data (the run's), as 'dtrp train' takes it.")
@click.option("--data-arg", multiple=True, help="name=value: an argument of its function, once for each.")
@click.option("--data-dir", type=click.Path(), help="Where it lies.")
@click.option("--limit-test", type=click.IntRange(min=1), help="Use the first N test samples.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Samples in a mini-batch of your own data (the run's).")
@click.option("--loader-workers", type=click.IntRange(min=0), help="Processes that read (the run's).")
@click.option("--metric", type=NameOrReference("metric", METRICS), multiple=True, help="Metrics (the run's).")
@_where
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON instead.")
def evaluate(run: str, *, at: str, device: str, threads: int | None, as_json: bool, **changes: Any) -> None:
    """Test a run's model in one process: loss, accuracy or the run's metrics, the worst classes, and samples a second.

    RUN is a folder that 'dtrp train --out' has written; its run may be unfinished.
    """
    from ..train import build
    from ..train.config import score_text
    from ..train.trained import evaluation

    trained = _loading(run, at, threads)
    with mistakes(ValueError, OSError, ImportError, RuntimeError):
        config = evaluation.test_config(trained, **changes)
        chosen = build.find_devices(device)[0]
        notes: list[str] = []
        source = build.open_source(config, notes.append, chosen)
        try:
            found = evaluation.evaluate(trained, source, config, chosen)
        finally:
            source.close()
    if as_json:
        click.echo(json.dumps(evaluation.as_json(found, trained)))
        return
    for note in notes:
        click.echo(note, err=True)
    others = f" with {source.name}" if source.name != trained.facts.name else ""
    click.echo(f"{_shown(trained)}{others}: {found.num_samples} test {source.samples}")
    scores = "  ".join(f"{name} {score_text(name, value)}" for name, value in found.scores.items())
    click.echo(f"loss {found.loss:.4f}  {scores}")
    if found.worst:
        listed = ", ".join(f"{name} {share:.1%} of {num}" for name, share, num in found.worst)
        click.echo(f"the worst classes: {listed}")
    click.echo(f"{found.samples_per_s:.0f} samples/s on {chosen}, without reading them")


@click.command(short_help="Tell the classes of image files, or go on with a text.")
@click.argument("run", type=click.Path())
@click.argument("files", nargs=-1, required=True, type=click.Path(allow_dash=True))
@_at
@click.option("--top", type=click.IntRange(min=1), default=3, help="Classes told of each image.")
@click.option("--length", type=click.IntRange(min=1), default=200, help="Characters with which a text goes on.")
@click.option(
    "--temperature", type=click.FloatRange(min=0), default=1.0, help="Of the draws; 0: the likeliest character."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of the draws.")
@_where
def predict(
    run: str, files: tuple[str, ...], *, at: str, device: str, threads: int | None, top: int, **drawing: Any
) -> None:
    """The likeliest classes of image files with their probabilities, or how text files ('-': what is piped in) go on.

    Images are treated as in the run's test. Of data of your own the test data's method from_file(path) returns x.
    """
    from ..train import build
    from ..train.trained import prediction

    trained = _loading(run, at, threads)
    with mistakes(ValueError, OSError, ImportError, RuntimeError):
        if trained.facts.is_text:
            model = trained.model(build.find_devices(device)[0])
            for name in files:
                text = sys.stdin.read() if name == "-" else Path(name).read_bytes().decode()
                click.echo(text + prediction.continuation(model, text, trained, **drawing))
            return
        read = prediction.reader_of(trained)
        model, chosen = trained.model(build.find_devices(device)[0]), build.find_devices(device)[0]
        inputs = [(name, read(name)) for name in files] if len(files) < 2 else ((name, read(name)) for name in files)
        for name, x in inputs:
            told = prediction.probabilities(model, x.to(chosen), trained)[:top]
            click.echo(f"{name}: " + ", ".join(f"{word} {share:.1%}" for word, share in told))


@click.command(short_help="Write a run's weights as a plain state dict.")
@click.argument("run", type=click.Path())
@_at
@click.option("--format", "name", type=Name("format", ("torch", "safetensors")), default="torch", help="Of the file.")
@click.option(
    "--out", type=click.Path(dir_okay=False), help="The file to write (the run's name, in the current folder)."
)
@click.option("--overwrite", is_flag=True, help="Replace it if it is there.")
def export(run: str, *, at: str, name: str, out: str | None, overwrite: bool) -> None:
    """Write a run's weights as a state dict that loads into the plain model: no dtrp is needed there."""
    from ..train.trained import exporting

    with mistakes(ValueError):
        exporting.check_format(name)
    path = Path(out or Path(run).expanduser().resolve().name + exporting.SUFFIXES[name])
    if path.exists() and not overwrite:
        raise click.ClickException(f"{path} is there already; pass --overwrite, or another --out")
    if not path.absolute().parent.is_dir():
        raise click.ClickException(f"{path.absolute().parent} is no folder; make it, or pass another --out")
    trained = _loading(run, at, None)
    with mistakes(ValueError, OSError, ImportError):
        num = exporting.export(trained, path, name)
    load = f"torch.load({str(path)!r})" if name == "torch" else f"safetensors.torch.load_file({str(path)!r})"
    click.echo(f"{_shown(trained)}: {num} tensors, written to {path}\n  model.load_state_dict({load})")
