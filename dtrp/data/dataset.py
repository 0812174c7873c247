"""A data set: labelled images in memory, split into training and test."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor

# Images (N, C, H, H) and their classes (N,).
Split: TypeAlias = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False, repr=False)
class Splits:
    """Samples (N, ...) and targets (N, ...) in memory, split into training and test."""

    samples = "examples"  # the word for them in messages; not a field
    is_text = False  # whether they are windows of tokens, with a target at each position; not a field
    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    def limit(self, train: int | None, test: int | None) -> Self:
        """The first samples of each split; all of them where the number is None or larger.

        Raises:
            ValueError: a number below 1.
        """
        for split, num in (("train", train), ("test", test)):
            if num is not None and num < 1:
                raise ValueError(f"{split}={num}: pass a number of {self.samples} of at least 1, or None for all")
        return dataclasses.replace(
            self,
            train_x=self.train_x[:train],
            train_y=self.train_y[:train],
            test_x=self.test_x[:test],
            test_y=self.test_y[:test],
        )

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of a sample."""
        return tuple(self.train_x.shape[1:])

    def to(self, device: torch.device | str) -> Self:
        """The same data on ``device``."""
        moved: dict[str, Any] = {name: t.to(device) for name, t in vars(self).items() if isinstance(t, Tensor)}
        return dataclasses.replace(self, **moved)


@dataclass(frozen=True, eq=False, repr=False)
class Dataset(Splits):
    """Square images and their classes.

    Args:
        name: name of the data set in tables and errors.
        train_x, test_x: images (N, C, H, H), uint8, or floats in 0..1.
        train_y, test_y: classes (N,), int64, in 0..num_classes - 1.
        num_classes: number of classes in both splits together.
        class_names: a name for each class; None where they have no names.
        mean, std: mean and standard deviation of each channel (C,), float32, over the whole training split scaled to
            0..1 (`limit` does not change them); see `channel_stats`.
        augment: whether a shifted or mirrored image is still of its class, so that training may crop and flip.
        border: number of rows and columns of zeros that were put around each image, on each side; the images of files
            (`dtrp predict`) are given the same.

    Raises:
        ValueError: other shapes or dtypes.
    """

    samples = "images"
    num_classes: int
    class_names: tuple[str, ...] | None
    mean: Tensor
    std: Tensor
    augment: bool
    border: int = 0

    def __post_init__(self) -> None:
        for message in self._mistakes():
            raise ValueError(message)

    def _mistakes(self) -> Iterator[str]:
        """Messages about wrong shapes, dtypes and classes."""
        for split, x, y in (("train", self.train_x, self.train_y), ("test", self.test_x, self.test_y)):
            if x.dim() != 4 or x.shape[2] != x.shape[3] or x.shape[1] != self.in_channels:
                yield f"{split}_x has shape {tuple(x.shape)}; pass square images (N, {self.in_channels}, H, H)"
            if x.dtype != torch.uint8 and not x.is_floating_point():
                yield f"{split}_x is {x.dtype}; pass uint8, or floats in 0..1"
            if y.shape != x.shape[:1] or y.dtype != torch.int64:
                yield f"{split}_y has shape {tuple(y.shape)} and is {y.dtype}; pass int64 of shape ({len(x)},)"
            if len(y) and not 0 <= int(y.min()) <= int(y.max()) < (most := self.num_classes):
                found = f"{int(y.min())}..{int(y.max())}"
                yield f"{split}_y holds {found} but num_classes={most}; pass classes in 0..{most - 1}"
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            yield f"{len(self.class_names)} class_names but num_classes={self.num_classes}; pass one a class"

    @property
    def in_channels(self) -> int:
        """C."""
        return len(self.mean)

    @property
    def image_size(self) -> int:
        """H, which equals W."""
        return self.train_x.shape[2]

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.train_x.shape[1:]))
        return (
            f"Dataset({self.name!r}, {len(self.train_x)} train, {len(self.test_x)} test, "
            f"{self.num_classes} classes, {shape} {str(self.train_x.dtype).removeprefix('torch.')})"
        )


def image_dataset(
    name: str, train: Split, test: Split, num_classes: int, class_names: tuple[str, ...] | None, *, augment: bool
) -> Dataset:
    """The data set of two splits, with the channel statistics of the training split."""
    return Dataset(name, *train, *test, num_classes, class_names, *channel_stats(train[0]), augment)


def channel_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of images scaled to 0..1; a constant channel's deviation is 1.

    >>> channel_stats(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1))
    (tensor([0.5000]), tensor([0.5000]))

    Returns:
        mean, std: (C,), float32. The deviation is that of the population, without Bessel's correction.
    """
    if x.dtype == torch.uint8:
        return level_stats(torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in x.unbind(1)]))
    var, mean = torch.var_mean(x.double(), dim=(0, 2, 3), correction=0)
    return _as_stats(mean, var)


def level_stats(counts: Tensor) -> tuple[Tensor, Tensor]:
    """The same of channels by the number of pixels of each level, (C, 256), int64."""
    levels = torch.arange(256, dtype=torch.float64, device=counts.device) / 255
    weights = counts.double() / counts.double().sum(1, keepdim=True)
    mean = weights @ levels
    return _as_stats(mean, (weights * (levels - mean[:, None]).square()).sum(1))


def _as_stats(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    std = var.sqrt().float()
    return mean.float(), torch.where(std > 0, std, 1.0)


def required(module: str, package: str, data: str) -> Any:
    """Import a module that only some data sets need.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as cause:
        raise ImportError(f"data {data!r} needs {package}, which is not installed; pip install 'dtrp[cli]'") from cause
