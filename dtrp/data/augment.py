"""Random crops and flips for a batch of images at once.

Source: He et al., arXiv:1512.03385, section 4.2 (pad by 4, crop, flip).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tensors.rng import generator


class Crops(NamedTuple):
    """The random crop and flip of N images.

    Args:
        down, right: first row and column of the crop in the padded image, (N,), int64, in 0..2 * pad.
        flipped: whether the crop is mirrored left to right, (N,), bool.
    """

    down: Tensor
    right: Tensor
    flipped: Tensor


def padding(image_size: int) -> int:
    """Pixels of zeros on each side of an image: 4; fewer for images below 32, but at least 1.

    >>> [padding(size) for size in (8, 16, 32, 224)]
    [1, 2, 4, 4]
    """
    return min(4, max(1, image_size // 8))


def draw_crops(num: int, image_size: int, *, seed: int, epoch: int) -> Crops:
    """The crops of ``num`` images in an epoch. Image i gets the same crop whatever the order and the batch size."""
    draws = generator("crops", seed, epoch)
    places = 2 * padding(image_size) + 1
    down, right = torch.randint(places, (2, num), generator=draws, device="cpu")
    return Crops(down, right, torch.randint(2, (num,), generator=draws, device="cpu").bool())


def crop(x: Tensor, crops: Crops) -> Tensor:
    """Images (B, C, H, H), padded with zeros and cropped by ``crops`` of length B; a new tensor."""
    size = x.shape[-1]
    pad = padding(size)
    pixels = torch.arange(size, device=x.device)
    rows = crops.down[:, None] + pixels
    columns = crops.right[:, None] + torch.where(crops.flipped[:, None], pixels.flip(0), pixels)
    source = rows[:, :, None] * (size + 2 * pad) + columns[:, None, :]  # (B, H, H) into the padded image
    padded = F.pad(x, (pad, pad, pad, pad)).flatten(2)
    return padded.gather(2, source.flatten(1)[:, None].expand(-1, x.shape[1], -1)).view(x.shape)
