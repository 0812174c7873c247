"""One contender's run in processes of its own: so many updates, and accuracies from copies of its weights on the way.

::

    clock    |-- set up --|-- update 1 .. e --|-- e+1 .. 2e --| ... |-- last --|  stopped
    rank r                            copy of its stages       copy         copy
                                                                               accuracies of all copies

A rank copies its stages, buffers and all, when they have made e, 2e, ... updates, and notes the time. The copies of e updates
are a model; its time is that of the last rank to make them. Nobody waits for a test: accuracies are computed when the
clock has stopped, for every contender alike. What the clock covers is everything between the ranks being ready, with data and
network in memory, and the last update: pipelines, wrappers and optimizers are made, images cropped, messages sent.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from contenders import Contender, start
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from turns import environment

from dtrp.data import load_data
from dtrp.data.augment import Crops, crop, draw_crops
from dtrp.data.dataset import Dataset
from dtrp.data.loader import normalize
from dtrp.models import get_model
from dtrp.tensors.rng import epoch_order
from dtrp.train import lr_factor

TEST_BATCH = 500


@dataclass(frozen=True)
class Setting:
    """What is trained, the same for all contenders.

    Args:
        data, data_dir, limit_train, limit_test: as of ``dtrp train``.
        image_size: of ``random`` data; None: its own.
        model: as of ``dtrp train``.
        batch: samples of a mini-batch, over all ranks; what is left over at the end of an epoch is left out.
        epochs: passes over the training images.
        copies: how many times the accuracy is looked at, at equal distances.
        lr, momentum, weight_decay: of SGD.
        warmup: updates of linear warm-up; the rate falls to 0 in half a cosine.
        dtype: of weights and images.
    """

    data: str = "cifar10"
    data_dir: str | None = None
    limit_train: int | None = 20000
    limit_test: int | None = 5000
    image_size: int | None = None
    model: str = "resnet14-8"
    batch: int = 128
    epochs: int = 4
    copies: int = 24
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: int = 100
    dtype: str = "float32"

    def load(self) -> Dataset:
        data = load_data(self.data, self.data_dir, image_size=self.image_size).limit(self.limit_train, self.limit_test)
        assert isinstance(data, Dataset)
        return data

    def new_model(self, data: Dataset, seed: int) -> nn.Sequential:
        """The same weights on every rank."""
        torch.manual_seed(seed)
        channels, size, _ = data.sample_shape
        return get_model(self.model, channels, data.num_classes, image_size=size).to(getattr(torch, self.dtype))

    def updates(self, data: Dataset) -> int:
        return self.epochs * (len(data.train_x) // self.batch)

    def recorded(self) -> dict[str, Any]:
        """What a row says of it."""
        return {name: value for name, value in asdict(self).items() if name != "data_dir"}


@dataclass
class Recorder:
    """The copies that a rank makes of its stages, and when.

    Args:
        stages: by number, those that this rank trains.
        every: updates from one copy to the next.
        total: updates of the run.
    """

    stages: dict[int, nn.Module]
    every: int
    total: int
    updates: int = 0
    times: dict[int, float] = field(default_factory=dict)
    states: dict[int, dict[int, dict[str, Tensor]]] = field(default_factory=dict)

    def after_update(self, *_: Any) -> None:
        """Called behind every step of the rank's optimizer."""
        self.updates += 1
        if self.updates % self.every == 0 or self.updates == self.total:
            self.states[self.updates] = {
                index: {name: tensor.clone() for name, tensor in stage.state_dict().items()}
                for index, stage in self.stages.items()
            }
            self.times[self.updates] = time.perf_counter()


def shares(
    data: Dataset, setting: Setting, seed: int, share: slice, *, images: bool = True
) -> Iterator[tuple[Tensor | None, Tensor]]:
    """A rank's part of each mini-batch: order and crops are those of `dtrp.data.batches`, of all ranks' parts together."""
    dtype = getattr(torch, setting.dtype)
    whole = len(data.train_x) // setting.batch * setting.batch
    for epoch in range(setting.epochs):
        order = epoch_order(len(data.train_x), seed=seed, epoch=epoch)[:whole]
        crops = draw_crops(len(data.train_x), data.sample_shape[-1], seed=seed, epoch=epoch) if data.augment else None
        for indices in torch.split(order, setting.batch):
            mine = indices[share]
            x = normalize(data.train_x[mine], data.mean, data.std, dtype) if images else None
            if x is not None and crops is not None:
                x = crop(x, Crops(*(values[mine] for values in crops)))
            yield None if x is None else x.to(dtype), data.train_y[mine]


def hosted(contender: Contender, num_stages: int, rank: int, num_ranks: int) -> list[int]:
    """The numbers of the stages that a rank trains."""
    if contender.engine in ("plain", "ddp"):
        return list(range(num_stages))
    return [index for index in range(num_stages) if contender.host(index, num_ranks) == rank]


def train(contender: Contender, cuts: Sequence[int], seed: int, setting: Setting) -> dict[str, Any]:
    """Train and look at the accuracies; collective. The same answer on every rank.

    Returns:
        ``updates``, and at each of them ``times_s`` and ``test_accuracy``; ``losses``: of every mini-batch, over all its
        samples; ``total_s``: the whole run, its end included.
    """
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    data = setting.load()
    layers = list(setting.new_model(data, seed))
    stages = [nn.Sequential(*layers[first:end]) for first, end in itertools.pairwise([0, *cuts, len(layers)])]
    mine = hosted(contender, len(stages), rank, num_ranks)
    total = setting.updates(data)
    recorder = Recorder({index: stages[index] for index in mine}, max(1, total // setting.copies), total)

    def optimizer(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        made = torch.optim.SGD(
            params, lr=setting.lr, momentum=setting.momentum, weight_decay=setting.weight_decay, foreach=True
        )
        made.register_step_post_hook(recorder.after_update)
        return made

    def scheduler(of: torch.optim.Optimizer) -> LambdaLR:
        return LambdaLR(of, lr_factor("cosine", setting.warmup, total))

    part = setting.batch // num_ranks if contender.engine == "ddp" else setting.batch
    share = slice(rank * part, (rank + 1) * part) if contender.engine == "ddp" else slice(None)
    example = torch.zeros(part, *data.sample_shape, dtype=getattr(torch, setting.dtype))
    images = contender.engine in ("plain", "ddp") or rank == contender.host(0, num_ranks)
    dist.barrier()
    begin = time.perf_counter()
    running = start(contender, stages, optimizer, cross_entropy, example, scheduler)
    # A rank without the first stage is given no images; what it is given in their place it does not look at.
    given = (running.step(example if x is None else x, y) for x, y in shares(data, setting, seed, share, images=images))
    losses = [loss for loss in given if loss is not None]
    running.close()
    end = time.perf_counter()
    assert recorder.updates == total, f"{recorder.updates} updates of {total} on rank {rank}"
    everyone: list[Any] = [None] * num_ranks
    dist.all_gather_object(everyone, (begin, end, recorder.times, recorder.states, [float(loss) for loss in losses]))
    begins, ends, times, states, all_losses = zip(*everyone, strict=True)
    first = min(begins)
    reported = [values for values in all_losses if values]
    return {
        "updates": list(recorder.times),
        "times_s": [max(stamps[n] for stamps in times) - first for n in recorder.times],
        "total_s": max(ends) - first,
        "test_accuracy": accuracies(stages, states, list(recorder.times), data, setting),
        "losses": [sum(values) / len(values) for values in zip(*reported, strict=True)],
    }


def accuracies(
    stages: Sequence[nn.Module],
    states: Sequence[dict[int, Any]],
    updates: Sequence[int],
    data: Dataset,
    setting: Setting,
) -> list[float]:
    """Of the copies at each number of updates; the ranks share the work. Of a stage that several ranks have, the first counts."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    found: dict[int, float] = {}
    for n in updates[rank::num_ranks]:
        for copies in reversed(states):
            for index, state in copies[n].items():
                stages[index].load_state_dict(state)
        found[n] = accuracy(nn.Sequential(*stages), data, setting)
    everyone: list[Any] = [None] * num_ranks
    dist.all_gather_object(everyone, found)
    together = {n: value for part in everyone for n, value in part.items()}
    return [together[n] for n in updates]


def accuracy(model: nn.Module, data: Dataset, setting: Setting) -> float:
    """The share of test images whose class the model names."""
    model.eval()
    right = 0
    with torch.inference_mode():
        for x, y in zip(data.test_x.split(TEST_BATCH), data.test_y.split(TEST_BATCH), strict=True):
            images = normalize(x, data.mean, data.std, getattr(torch, setting.dtype))
            right += int((model(images).argmax(1) == y).sum())
    return right / len(data.test_x)


@dataclass(frozen=True)
class Run:
    """One contender with one seed over one link, and where its row goes."""

    link: str
    contender: Contender
    cuts: tuple[int, ...]
    seed: int
    setting: Setting
    out: Path
    latency_ms: float = 0.0


def work(run: Run, link: Any = None) -> None:
    """Train, and add the row; runs on every rank. ``link``: that which the ranks have been put on, if any."""
    load = os.getloadavg()[0]
    result = train(run.contender, run.cuts, run.seed, run.setting)
    if dist.get_rank() == 0:
        world = dist.get_world_size()
        losses = result.pop("losses")
        bounds = itertools.pairwise([0, *result["updates"]])
        row = {
            "link": run.link,
            "latency_ms": run.latency_ms,
            "contender": run.contender.name,
            "num_microbatches": run.contender.num_microbatches,
            "ranks": world,
            "cuts": list(run.cuts),
            "delay": run.contender.delay(world),
            "seed": run.seed,
            **{
                name: [round(v, 4) for v in value] if isinstance(value, list) else value
                for name, value in result.items()
            },
            "train_loss": [sum(losses[a:b]) / (b - a) for a, b in bounds],
            "setting": run.setting.recorded(),
            "at": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "load_before": load,
            **environment(),
        }
        with run.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
