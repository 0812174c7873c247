"""Tests a run's model on data: loss, metrics, the worst classes, and how many samples it takes a second."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...data import Source
from ...tensors.pytree import map_tensors, num_samples, tensors_in
from ...typing import Json
from .. import build
from ..config import TrainConfig, score_name
from ..scores.criterion import IGNORED, as_classes, means
from .loading import Model, TrainedRun

WORST = 5  # classes that are told
_DATA = ("data", "data_dir", "data_arg")


@dataclass(frozen=True)
class Evaluation:
    """What a test came to.

    Attributes:
        num_samples: number of samples.
        loss: mean loss.
        scores: metrics by name; the score of the run first.
        worst: (name of the class, share that was told rightly, number of samples) where that is below 1, the worst first.
        samples_per_s: of the model, without the reading of data.
    """

    num_samples: int
    loss: float
    scores: dict[str, float]
    worst: tuple[tuple[str, float, int], ...]
    samples_per_s: float


def test_config(run: TrainedRun, **changes: Any) -> TrainConfig:
    """The settings with which a run's model is tested.

    Args:
        run: the run.
        changes: settings that are not those of the run; None, or an empty tuple: the run's.
    """
    given = {name: value for name, value in changes.items() if value not in (None, ())}
    config = dataclasses.replace(run.config, out=str(run.folder), **given)
    reading = run.facts.reading
    if any(name in given for name in _DATA):
        shape = run.facts.sample_shape
        config = dataclasses.replace(
            config,
            data_dir=given.get("data_dir"),
            data_arg=given.get("data_arg", () if "data" in given else config.data_arg),
            image_size=shape[-1] if config.data == "folder" and len(shape) == 3 else None,
            stream=reading.get("fit") == "middle" if config.data == "folder" and "fit" in reading else None,
            listing=None,
            out=None,
        )
    if config.data == "folder" and len(reading.get("mean", ())) == 3:
        config = dataclasses.replace(config, mean=tuple(reading["mean"]), std=tuple(reading["std"]))
    return config


def evaluate(run: TrainedRun, source: Source, config: TrainConfig, device: torch.device | str = "cpu") -> Evaluation:
    """Test a run's model.

    Args:
        run: the run.
        source: data whose test split is taken, on ``device``.
        config: settings, of which loss and metrics count.
        device: where to compute.

    Raises:
        ValueError: data of other classes, or a model that does not take it.
    """
    _check_like(run, source)
    model, criterion = run.model(device), build.criterion_of(config, source)
    sums, right, count, busy_s = [], torch.zeros(0), torch.zeros(0), 0.0
    for x, y in source.test_batches():
        began = time.perf_counter()
        out = _output(model, x, device)
        busy_s += time.perf_counter() - began
        target = map_tensors(partial(Tensor.to, device=torch.device(device)), y)
        sums.append((criterion.judge(out, target), num_samples(target)))
        if not config.metric and not source.is_text:
            right, count = _by_class(right, count, out, target)
    found = means(judged for judged, _ in sums)
    score, total = score_name(config.metric), sum(num for _, num in sums)
    scores = {score: found.pop(score), **{name: value for name, value in found.items() if name != "loss"}}
    return Evaluation(total, found["loss"], scores, _worst(right, count, source), total / max(busy_s, 1e-9))


def _output(model: Model, x: Any, device: torch.device | str) -> Any:
    try:
        out = model(x)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors_in(x))
        raise ValueError(
            f"the model does not take inputs of shape {shapes}: {' '.join(str(error).split())[:300]}"
        ) from error
    if torch.device(device).type != "cpu":
        torch.get_device_module(torch.device(device)).synchronize()
    return out


def _check_like(run: TrainedRun, source: Source) -> None:
    """Refuse data whose labels mean something else than those of the run's data.

    Raises:
        ValueError: such data.
    """
    here, there = source.facts(), run.facts
    if here["class_names"] and there.class_names and tuple(here["class_names"]) != there.class_names:
        mine, theirs = _listed(here["class_names"]), _listed(there.class_names)
        raise ValueError(f"the classes of {source.name} are {mine}, and the run's {theirs}")
    if source.num_classes and there.num_classes and source.num_classes != there.num_classes:
        raise ValueError(f"{source.name} has {source.num_classes} classes, and the run's data {there.num_classes}")
    if here["reading"].get("characters") != there.reading.get("characters"):
        raise ValueError(f"{source.name} has other characters than the run's text, in which each is a class")


def _listed(names: Any) -> str:
    names = list(names)
    return ", ".join(names[:4]) + (f", ... ({len(names)})" if len(names) > 4 else "")


def _by_class(right: Tensor, count: Tensor, out: Any, target: Any) -> tuple[Tensor, Tensor]:
    """Numbers of samples of each class, and of those that were told rightly, with those of another mini-batch."""
    logits, classes = as_classes(out, target)
    kept = classes != IGNORED
    told = (logits.argmax(-1) == classes)[kept].double().cpu()
    labels, size = classes[kept].cpu(), max(len(count), logits.shape[-1])
    sums = []
    for before, weights in ((right, told), (count, torch.ones(len(labels), dtype=torch.float64))):
        new = torch.bincount(labels.flatten(), weights.flatten(), minlength=size)
        new[: len(before)] += before
        sums.append(new)
    return sums[0], sums[1]


def _worst(right: Tensor, count: Tensor, source: Source) -> tuple[tuple[str, float, int], ...]:
    shares = [(float(right[k] / n), k, int(n)) for k, n in enumerate(count.tolist()) if right[k] < n]
    names = source.class_names
    return tuple((names[k] if k < len(names) else str(k), share, n) for share, k, n in sorted(shares)[:WORST])


def as_json(found: Evaluation, run: TrainedRun) -> dict[str, Json]:
    """The numbers of a test, for a file."""
    worst = [{"class": name, "accuracy": share, "samples": num} for name, share, num in found.worst]
    return {"run": str(run.folder), "update": run.update, **dataclasses.asdict(found), "worst": worst}
