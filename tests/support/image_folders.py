"""Folders of small images, every one different."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

CLASSES = ("ant", "bee", "cat")


def write_images(folder: Path, *, train: int = 11, test: int = 4, split: bool = True) -> Path:
    """Images of 3 classes as JPEG, ``train`` and ``test`` of each, of several sizes; without ``split`` in a folder a class."""
    draws = torch.Generator().manual_seed(5)
    for name in CLASSES:
        for part, num in (("train", train), ("test", test)) if split else (("", train),):
            place = folder / part / name
            place.mkdir(parents=True)
            for i in range(num):
                size = (20 + 3 * i, 34 - i)
                coarse = torch.randint(0, 256, (6 * 5 * 3,), generator=draws, dtype=torch.uint8)
                Image.frombytes("RGB", (6, 5), bytes(coarse.tolist())).resize(size).save(place / f"{i:02}.jpg")
    return folder


def damage(path: Path) -> None:
    """Cut the end of a file off, so that Pillow opens it and cannot decode it."""
    path.write_bytes(path.read_bytes()[:-200])
