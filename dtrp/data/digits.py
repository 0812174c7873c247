"""Handwritten digits that come with scikit-learn."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from .dataset import Dataset, channel_stats, required


def load_digits() -> Dataset:
    """1,797 images of 1x8x8, ten classes: 1,438 to train, 359 to test.

    Of each class every fifth image, in scikit-learn's order, is for the test: a fixed split with equal shares.

    Source: Alpaydin and Kaynak, Optical recognition of handwritten digits (the test part), doi:10.24432/C50P49.
    """
    table = _table()
    x = table[:, :-1].float().div_(16).view(-1, 1, 8, 8)
    y = table[:, -1].long()
    position = torch.empty_like(y)  # of an image among those of its class
    for digit in range(10):
        members = (y == digit).nonzero().flatten()
        position[members] = torch.arange(len(members))
    test = position % 5 == 2
    mean, std = channel_stats(x[~test])
    return Dataset(
        name="digits",
        train_x=x[~test],
        train_y=y[~test],
        test_x=x[test],
        test_y=y[test],
        num_classes=10,
        class_names=tuple("0123456789"),
        mean=mean,
        std=std,
        augment=False,
    )


def _table() -> Tensor:
    """An image a line, its 64 pixels (0 to 16) and its class, (1797, 65), float64.

    From the file that scikit-learn reads, where it is: to import scikit-learn takes longer than a small run.
    """
    np = required("numpy", "numpy", "digits")
    package = importlib.util.find_spec("sklearn")
    if package is not None and package.origin is not None:
        path = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
        if path.is_file():
            return torch.from_numpy(np.loadtxt(path, delimiter=","))
    bunch = required("sklearn.datasets", "scikit-learn", "digits").load_digits()
    return torch.from_numpy(np.column_stack([bunch.data, bunch.target]))
