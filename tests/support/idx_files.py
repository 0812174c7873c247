"""Small data sets in the four files of MNIST."""

from __future__ import annotations

import gzip
from pathlib import Path

import torch
from torch import Tensor

NUM = {"train": 40, "t10k": 20}


def images_of(split: str) -> Tensor:
    """Images of a split, (N, 28, 28), uint8."""
    draws = torch.Generator().manual_seed(NUM[split])
    return torch.randint(0, 256, (NUM[split], 28, 28), dtype=torch.uint8, generator=draws)


def labels_of(split: str) -> Tensor:
    """The classes of a split, (N,), uint8: all ten, in an order that is not theirs."""
    return (torch.arange(NUM[split]) * 7 % 10).to(torch.uint8)


def as_idx(numbers: Tensor) -> bytes:
    """Bytes of any shape as an IDX file."""
    sizes = b"".join(size.to_bytes(4, "big") for size in numbers.shape)
    return bytes([0, 0, 8, numbers.dim()]) + sizes + bytes(numbers.flatten().tolist())


def write_idx(folder: Path, *, gzipped: bool = False, dot: bool = False) -> Path:
    """The four files, under the names that they are published with, or with a dot in them, as some unpack them."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in NUM:
        for content, numbers in (("images", images_of(split)), ("labels", labels_of(split))):
            name = f"{split}-{content}{'.' if dot else '-'}idx{numbers.dim()}-ubyte"
            whole = as_idx(numbers)
            (folder / (name + ".gz" * gzipped)).write_bytes(gzip.compress(whole) if gzipped else whole)
    return folder
