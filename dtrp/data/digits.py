"""Handwritten digits that come with scikit-learn."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .dataset import Dataset, image_dataset, required


def load_digits() -> Dataset:
    """1,797 images of 1x8x8, ten classes: 1,438 to train, 359 to test.

    Every fifth image of each class, in scikit-learn's order, is a test image: a fixed split with equal shares.

    Source: Alpaydin and Kaynak, Optical recognition of handwritten digits (the test part), doi:10.24432/C50P49.
    """
    table = _table()
    x = table[:, :-1].float().div_(16).view(-1, 1, 8, 8)
    y = table[:, -1].long()
    position = F.one_hot(y).cumsum(0).gather(1, y[:, None])[:, 0] - 1  # of an image among those of its class
    test = position % 5 == 2
    return image_dataset("digits", (x[~test], y[~test]), (x[test], y[test]), 10, tuple("0123456789"), augment=False)


def _table() -> Tensor:
    """A row per image: 64 pixels (0 to 16) and the class; (1797, 65), float64.

    Read from scikit-learn's file where there is one: importing scikit-learn takes longer than a small run.
    """
    np = required("numpy", "numpy", "digits")
    package = importlib.util.find_spec("sklearn")
    if package is not None and package.origin is not None:
        path = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
        if path.is_file():
            return torch.from_numpy(np.loadtxt(path, delimiter=","))
    bunch = required("sklearn.datasets", "scikit-learn", "digits").load_digits()
    return torch.from_numpy(np.column_stack([bunch.data, bunch.target]))
