"""The batches of an epoch, which depend on the seed and the epoch alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ..tensors.rng import epoch_order
from ..validation import whole
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
    """The normalized batches of an epoch, on the device of ``x``.

    Each image comes once, so the last batch may be smaller.

    Order and crops depend on ``seed`` and ``epoch`` only: they are drawn on the CPU, by separate generators. So a run
    that stopped within an epoch continues with the images that are left, with ``start``. For testing,
    ``shuffle=False, augment=False`` gives every image unchanged, in the order of ``x``.

    Args:
        x: images (N, C, H, H), uint8 or floats in 0..1, from a split of ``dataset``; or windows of text (N, context),
            int64, which are not normalized.
        y: classes of the images (N,), int64; or the next characters (N, context), int64.
        batch_size: images in a batch.
        dataset: data set whose ``mean`` and ``std`` normalize the images.
        seed: random seed of the order and the crops.
        epoch: number of the epoch, from 0.
        augment: whether to pad with zeros by 4 (less for images below 32), crop at random and mirror with probability
            1/2. The zeros surround the normalized image, so they are the mean colour.
        shuffle: whether each epoch has an order of its own; False: the order of ``x``.
        dtype: floating-point dtype of the image batches.
        images: whether to make the images; a worker that only computes the loss needs none.
        start: number of images of the epoch that have been seen: a multiple of ``batch_size``, or all of them.

    Returns:
        An iterator over (images (B, C, H, H), or None, and classes (B,)).

    Raises:
        ValueError: ``x`` and ``y`` of different lengths, ``batch_size`` below 1, a ``dtype`` that is no float.
    """
    if len(x) != len(y):
        raise ValueError(f"x has {len(x)} images but y has {len(y)} classes; pass one class an image")
    whole("batch_size", batch_size)
    check_start(start, len(x), batch_size)
    if not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype}: normalized images need a float; pass torch.float32")
    order = epoch_order(len(x), seed=seed, epoch=epoch) if shuffle else torch.arange(len(x), device="cpu")
    left = order[start:].to(x.device if images else y.device)
    chosen = (indices for indices in torch.split(left, min(batch_size, max(1, len(left)))) if len(indices))
    if not images:
        return ((None, y[indices]) for indices in chosen)
    if isinstance(dataset, TextDataset):
        return ((x[indices], y[indices]) for indices in chosen)
    crops = draw_crops(len(x), x.shape[-1], seed=seed, epoch=epoch) if augment else None
    return _image_batches(x, y, chosen, dataset, crops, dtype)


def check_start(start: int, num: int, batch_size: int) -> None:
    """Refuse a start within an epoch of ``num`` samples that is not between two mini-batches."""
    if not 0 <= start <= num or (start % batch_size and start != num):
        raise ValueError(
            f"start={start} with {num} images in batches of {batch_size}: pass a multiple of batch_size, as many as were seen"
        )


def _image_batches(
    x: Tensor, y: Tensor, chosen: Iterable[Tensor], dataset: Dataset, crops: Crops | None, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalized and cropped images with their classes, for each tensor of indices (B,) in ``chosen``."""
    if crops is not None:
        crops = Crops(*(t.to(x.device) for t in crops))
    for indices in chosen:
        images = normalize(x[indices], dataset.mean, dataset.std, dtype)
        if crops is not None:
            images = crop(images, Crops(*(t[indices] for t in crops)))
        yield images.to(dtype), y[indices]


def normalize(images: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Images less their mean, by their deviation, in float64 if ``dtype`` is, else in float32; a new tensor.

    Args:
        images: (B, C, H, H), uint8, or floats in 0..1.
        mean: of each channel (C,), of images scaled to 0..1.
        std: deviation of each.
        dtype: what the images are to become.
        out: where they are to be; None: in a new tensor.
    """
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    # Tensors, not numbers: CUDA divides by a number through its reciprocal, unlike the CPU in the last bit.
    unit = 255 if images.dtype == torch.uint8 else 1
    mean, std = ((stat.to(images.device, exact) * unit)[:, None, None] for stat in (mean, std))
    if out is not None and out.dtype == exact:
        return out.copy_(images).sub_(mean).div_(std)
    found = (images.to(exact) - mean) / std
    return found if out is None else out.copy_(found)
