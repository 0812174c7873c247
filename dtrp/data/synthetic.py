"""Random images, for tests and for trying the program out."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..tensors.rng import generator
from .dataset import Dataset, Split, image_dataset

_CLASSES, _TRAIN, _TEST = 10, 2_000, 500


def load_random(seed: int, image_size: int) -> Dataset:
    """2,000 training and 500 test images, uint8 (3, image_size, image_size), in ten classes of equal size.

    An image is the smooth random pattern of its class, and noise: 0.5 + 0.15 pattern + 0.2 noise, clamped to 0..1, in
    units of 255. The pattern is 4x4 normal numbers, enlarged; the noise is a normal number per pixel and channel.
    """
    draws = generator("random", seed)
    coarse = torch.randn(_CLASSES, 3, 4, 4, generator=draws, dtype=torch.float32)
    patterns = F.interpolate(coarse, size=(image_size, image_size), mode="bilinear", align_corners=True)

    def split(num: int) -> Split:
        y = torch.arange(num) % _CLASSES
        noise = torch.randn(num, 3, image_size, image_size, generator=draws, dtype=torch.float32)
        x = 0.5 + 0.15 * patterns[y] + 0.2 * noise
        return (x.clamp(0, 1) * 255).round().to(torch.uint8), y

    train, test = split(_TRAIN), split(_TEST)  # in this order, which decides what is drawn
    return image_dataset("random", train, test, _CLASSES, None, augment=False)
