"""What a run trains on and tests with: the interface that `dtrp train` knows data by, and data in memory behind it."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from ..typing import Json
from .dataset import Dataset
from .loader import batches
from .text import TextDataset

# The inputs of a mini-batch (B, ...) and its targets (B, ...), each None where a rank does not need them.
Batch: TypeAlias = tuple[Tensor | None, Tensor | None]

_TEST_BATCH = 500


class DataError(ValueError):
    """Data that failed in the middle of a run: a file that cannot be read, or a process that reads and has died."""


@dataclass(frozen=True)
class Part:
    """The part of every mini-batch that a rank needs.

    Args:
        inputs: whether it needs the inputs, as the first stage does.
        targets: whether it needs the targets, as the last stage does, and the first one where stages have losses.
        replica, num_replicas: which replica of how many it belongs to: of a mini-batch of training it gets its share,
            as `torch.tensor_split` divides, and of the mini-batches of a test every ``num_replicas``-th.
    """

    inputs: bool = True
    targets: bool = True
    replica: int = 0
    num_replicas: int = 1

    def of(self, batch: Tensor) -> Tensor:
        """This replica's share of a mini-batch (B, ...)."""
        return torch.tensor_split(batch, self.num_replicas)[self.replica]


WHOLE = Part()


@dataclass(frozen=True)
class DataFacts:
    """`Source.facts`: what a network is made by, and what its inputs and outputs mean."""

    name: str
    num_classes: int
    sample_shape: tuple[int, ...]
    is_text: bool
    class_names: tuple[str, ...] = ()
    reading: Mapping[str, Json] = field(default_factory=dict)

    @classmethod
    def of(cls, values: Mapping[str, Json]) -> DataFacts:
        """The facts as JSON has them."""
        tuples: dict[str, Json] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**tuples)


class Source(ABC):
    """Training and test data, as a stream of mini-batches.

    The samples of a mini-batch, and what is drawn for them, depend on seed, epoch and index alone: not on how many
    processes read, where the epoch was taken up again, or on the rank that asks.

    Attributes:
        samples: the word for samples in messages.
        name: name of the data set in tables and errors.
        num_train, num_test: number of training and of test samples.
        num_classes: number of classes; 0: not known.
        sample_shape: shape of a sample: (C, H, W) of an image, (T,) of text.
        is_text: whether samples are windows of tokens, with a target at each position.
        class_names: names of the classes; empty where they have none.
        skips: whether samples are read again, and left out, when an epoch is taken up in its middle.
        details: text about it for the first line of a run: its size, where it comes from; empty: nothing to say.
        damaged: files that could not be read and that others took the place of, with the reason.
    """

    name: str
    samples: str = "samples"
    num_train: int
    num_test: int
    num_classes: int
    sample_shape: tuple[int, ...]
    details: str = ""
    damaged: tuple[str, ...] = ()
    is_text: bool = False
    class_names: tuple[str, ...] = ()
    skips: bool = False

    @abstractmethod
    def train_batches(self, batch_size: int, *, epoch: int, start: int = 0, part: Part = WHOLE) -> Iterator[Batch]:
        """The mini-batches of an epoch, each training sample once; the last one may be smaller.

        Args:
            batch_size: samples in a mini-batch, of all replicas together.
            epoch: number of the epoch, from 0.
            start: number of samples of the epoch that have been trained on, a multiple of ``batch_size`` or all.
            part: what the caller needs. Where it needs nothing, the mini-batches are (None, None), as many.

        Raises:
            DataError: samples that cannot be had, before the mini-batch that would hold them.
        """

    @abstractmethod
    def test_batches(self, *, part: Part = WHOLE) -> Iterator[Batch]:
        """The test samples in their order, unchanged by chance, in mini-batches of a size that the source chooses."""

    @abstractmethod
    def example(self, num: int) -> tuple[Tensor, Tensor]:
        """A mini-batch of ``num`` training samples, which repeat where there are fewer; of one shape and dtype on all ranks."""

    def facts(self) -> dict[str, Json]:
        """What a network is made by, and what its inputs and outputs mean, as values that JSON can hold.

        ``reading`` says how a file becomes an input: ``mean`` and ``std`` of the channels, how images are fitted, and the
        ``border`` of zeros around them, where they have one; or ``characters``, whose places are the tokens.
        """
        return {
            "name": self.name,
            "num_classes": self.num_classes,
            "sample_shape": list(self.sample_shape),
            "is_text": self.is_text,
            "class_names": list(self.class_names),
            "reading": {},
        }

    def keep(self, path: Path) -> None:
        """Write what need not be found out again to a file in the folder of the run; most have nothing."""
        return

    def close(self) -> None:
        """End the processes that read; most have none."""
        return


class InMemory(Source):
    """Samples held in memory.

    Args:
        dataset: samples, on the device where the mini-batches are to be.
        seed: random seed of order, crops and flips.
        augment: whether to crop and flip training images.
        dtype: floating-point dtype of images.
    """

    def __init__(self, dataset: Dataset | TextDataset, *, seed: int, augment: bool, dtype: torch.dtype) -> None:
        self.dataset, self._seed, self._augment, self._dtype = dataset, seed, augment, dtype
        self.samples, self.is_text = dataset.samples, dataset.is_text
        self.class_names = tuple(getattr(dataset, "class_names", None) or ())
        self.name, self.num_classes, self.sample_shape = dataset.name, dataset.num_classes, dataset.sample_shape
        self.num_train, self.num_test = len(dataset.train_y), len(dataset.test_y)

    def train_batches(self, batch_size: int, *, epoch: int, start: int = 0, part: Part = WHOLE) -> Iterator[Batch]:
        data = self.dataset
        for x, y in batches(
            data.train_x, data.train_y, batch_size, dataset=data, seed=self._seed, epoch=epoch, augment=self._augment,
            dtype=self._dtype, images=part.inputs, start=start,
        ):  # fmt: skip
            yield (None if x is None else part.of(x)), (part.of(y) if part.targets else None)

    def test_batches(self, *, part: Part = WHOLE) -> Iterator[Batch]:
        data = self.dataset
        every = batches(
            data.test_x, data.test_y, _TEST_BATCH, dataset=data, seed=0, epoch=0, augment=False, shuffle=False,
            dtype=self._dtype, images=part.inputs,
        )  # fmt: skip
        for x, y in itertools.islice(every, part.replica, None, part.num_replicas):
            yield x, (y if part.targets else None)

    def example(self, num: int) -> tuple[Tensor, Tensor]:
        few = self.dataset.limit(max(1, min(num, self.num_train)), None)
        x, y = next(
            batches(few.train_x, few.train_y, num, dataset=few, seed=0, epoch=0, augment=False, dtype=self._dtype)
        )
        assert x is not None
        indices = torch.arange(num, device=x.device) % len(x)
        return x[indices], y[indices]

    def facts(self) -> dict[str, Json]:
        data = self.dataset
        if isinstance(data, TextDataset):
            return {**super().facts(), "reading": {"characters": data.characters}}
        border: dict[str, Json] = {"border": data.border} if data.border else {}
        reading: dict[str, Json] = {"mean": data.mean.tolist(), "std": data.std.tolist(), "fit": "whole", **border}
        return {**super().facts(), "reading": reading}
