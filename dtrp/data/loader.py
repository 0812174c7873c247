"""Batches of a data set, each epoch's a function of the seed and the epoch alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..tensors.rng import epoch_order
from .augment import Crops, crop, draw_crops
from .dataset import Dataset
from .text import TextDataset


def batches(
    x: Tensor,
    y: Tensor,
    batch_size: int,
    *,
    dataset: Dataset | TextDataset,
    seed: int,
    epoch: int,
    augment: bool,
    shuffle: bool = True,
    dtype: torch.dtype = torch.float32,
    images: bool = True,
    start: int = 0,
) -> Iterator[tuple[Tensor | None, Tensor]]:
    """One epoch, in normalized batches, on the device of ``x``; each image once, so the last batch may be smaller.

    Order and crops depend on ``seed`` and ``epoch`` only (the crops not on ``batch_size`` either): they are drawn on
    the CPU, by generators of their own. So a run that stopped within an epoch goes on from the images that are left,
    with ``start``. For a test, ``shuffle=False, augment=False``: every image in its order, as it is.

    Args:
        x: images (N, C, H, H), uint8 or floats in 0..1: a split of ``dataset``, or a part of one; or windows of text
            (N, context), which come as they are.
        y: their classes (N,); or the characters that follow (N, context).
        batch_size: images a batch.
        dataset: gives ``mean`` and ``std``.
        seed: of the run.
        epoch: counted from 0.
        augment: pad with zeros by 4 (less for images below 32), crop at random, mirror every second one at random. The
            zeros are put around the normalized image, so they are the mean colour.
        shuffle: a new order every epoch, or the order of ``x``.
        dtype: of the images.
        images: whether to make them; a worker that only compares with the classes needs none.
        start: images of the epoch that have been seen: a multiple of ``batch_size``, or all of them.

    Returns:
        An iterator over (images (B, C, H, H), or None, and classes (B,)).

    Raises:
        ValueError: ``x`` and ``y`` of different lengths, ``batch_size`` below 1, a ``dtype`` that is no float.
    """
    if len(x) != len(y):
        raise ValueError(f"x has {len(x)} images but y has {len(y)} classes; pass one class an image")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r}: pass a whole number of at least 1")
    if not 0 <= start <= len(x) or (start % batch_size and start != len(x)):
        raise ValueError(
            f"start={start} with {len(x)} images in batches of {batch_size}: pass a multiple of batch_size, as many as were seen"
        )
    if not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype}: normalized images need a float; pass torch.float32")
    order = epoch_order(len(x), seed=seed, epoch=epoch) if shuffle else torch.arange(len(x), device="cpu")
    crops = draw_crops(len(x), x.shape[-1], seed=seed, epoch=epoch) if augment and images else None
    if not images:
        order = order.to(y.device)
        return ((None, y[chosen]) for chosen in torch.split(order[start:], batch_size) if len(chosen))
    if isinstance(dataset, TextDataset):
        order = order[start:].to(x.device)
        return ((x[chosen], y[chosen]) for chosen in torch.split(order, batch_size) if len(chosen))
    return _batches(x, y, batch_size, order, crops, dataset, dtype, start)


def _batches(
    x: Tensor,
    y: Tensor,
    batch_size: int,
    order: Tensor,
    crops: Crops | None,
    dataset: Dataset,
    dtype: torch.dtype,
    first: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    # Tensors, not numbers: CUDA divides by a number through its reciprocal, unlike the CPU in the last bit.
    unit = 255 if x.dtype == torch.uint8 else 1
    mean = (dataset.mean.to(x.device, exact) * unit)[:, None, None]
    std = (dataset.std.to(x.device, exact) * unit)[:, None, None]
    order = order.to(x.device)
    if crops is not None:
        crops = Crops(*(t.to(x.device) for t in crops))
    for start in range(first, len(x), batch_size):
        chosen = order[start : start + batch_size]
        images = (x[chosen].to(exact) - mean) / std
        if crops is not None:
            images = crop(images, Crops(*(t[chosen] for t in crops)))
        yield images.to(dtype), y[chosen]
