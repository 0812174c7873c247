"""Handwritten digits that come with scikit-learn."""

from __future__ import annotations

import torch

from .dataset import Dataset, channel_stats, required


def load_digits() -> Dataset:
    """1,797 images of 1x8x8, ten classes: 1,438 to train, 359 to test.

    Of each class every fifth image, in scikit-learn's order, is for the test: a fixed split with equal shares.

    Source: Alpaydin and Kaynak, Optical recognition of handwritten digits (the test part), doi:10.24432/C50P49.
    """
    bunch = required("sklearn.datasets", "scikit-learn", "digits").load_digits()
    x = torch.from_numpy(bunch.images).float().div_(16)[:, None]
    y = torch.from_numpy(bunch.target).long()
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
