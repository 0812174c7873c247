"""Images as a network takes them: decoded, cropped and resized, each by draws of its own.

Training: a random part of the image, 0.08 to 1 of its area and of a ratio from 3/4 to 4/3, resized, and mirrored with
probability 1/2 (Szegedy et al., arXiv:1409.4842). Test: the shorter side becomes 256/224 of the size, and the middle
counts.

The whole image is decoded. (JPEG can be decoded at a half, a quarter or an eighth of its size, Pillow's draft mode, which
is faster for large images and gives other pixels.)
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..image_folder import UnreadableImageError, decoded
from .listing import Images

if TYPE_CHECKING:
    from PIL.Image import Image, Transpose

_SCALE, _RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
_ATTEMPTS = 10  # to draw a part that lies within the image
_KEPT = 224 / 256  # of the shorter side, in the test

# Left, upper, right and lower border in the image's pixels.
Box: TypeAlias = tuple[float, float, float, float]


class Request(NamedTuple):
    """Images that are to be decoded together.

    Args:
        split: 0: training; 1: test.
        epoch: number of the epoch, from 0.
        augment: whether they are cropped and mirrored at random.
        indices: their indices in the split.
    """

    split: int
    epoch: int
    augment: bool
    indices: Sequence[int]


class Decoded(NamedTuple):
    """What became of a request.

    Args:
        pixels: uint8 (B, H, W, 3).
        damaged: messages about files in whose place others were read.
        error: message about a file that could not be read, and that ends the run; None: all could.
    """

    pixels: Tensor
    damaged: tuple[str, ...] = ()
    error: str | None = None


@dataclass(frozen=True, eq=False)
class Decoder:
    """Decodes the images of a folder; it has no state, so that any process may do it.

    Args:
        splits: training and test images.
        image_size: H and W of what it returns.
        seed: random seed of crops and flips.
        skip_damaged: whether another image of the class takes the place of one that cannot be read.
    """

    splits: tuple[Images, Images]
    image_size: int
    seed: int
    skip_damaged: bool

    def __getitem__(self, request: Request) -> Decoded:
        pixels, damaged = bytearray(), []
        try:
            for index in request.indices:
                for other in self._in_turn(request, index):
                    try:
                        pixels += self._read(request, index, other)
                        break
                    except UnreadableImageError as error:
                        damaged.append(str(error))
                        if not self.skip_damaged:
                            raise
                else:
                    raise ValueError(
                        f"no image of the class of {self.splits[request.split].path(index)} can be read; {damaged[0]}"
                    )
        except ValueError as error:  # as a value, since the loader would add a traceback
            return Decoded(torch.empty(0), error=_whole_message(error))
        shape = (len(request.indices), self.image_size, self.image_size, 3)
        return Decoded(torch.frombuffer(pixels, dtype=torch.uint8).view(shape), tuple(damaged))

    def _read(self, request: Request, index: int, other: int) -> bytes:
        """The pixels of image ``other`` in the place of ``index``, whose draws it gets."""
        draws = _draws("crop", self.seed, request.epoch, index)
        size = self.image_size

        def make(image: Image) -> bytes:
            return _augmented(image, size, draws) if request.augment else _resized(image, size, middle(*image.size))

        return decoded(self.splits[request.split].path(other), make)

    def _in_turn(self, request: Request, index: int) -> Iterator[int]:
        """The image itself, and those of its class that may take its place: from a drawn one on, in their order."""
        yield index
        labels = self.splits[request.split].labels
        peers = (labels == labels[index]).nonzero().flatten().tolist()
        first = int(_draws("replace", self.seed, request.epoch, index).random() * len(peers))
        for peer in (*peers[first:], *peers[:first]):
            if peer != index:
                yield peer


def _whole_message(error: ValueError) -> str:
    skip = ", or pass --skip-damaged" if isinstance(error, UnreadableImageError) else ""
    return f"{error}{skip}"


def _draws(*key: int | str) -> random.Random:
    """Random numbers that depend on ``key`` alone."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    return random.Random(int.from_bytes(digest, "little"))


def _augmented(image: Image, size: int, draws: random.Random) -> bytes:
    from PIL.Image import Transpose

    box = random_part(*image.size, draws)
    flipped = draws.random() < 0.5
    return _resized(image, size, box, Transpose.FLIP_LEFT_RIGHT if flipped else None)


def centred(image: Image, size: int) -> bytes:
    """The middle of an image as in a test: its pixels, (size, size, channels)."""
    return _resized(image, size, middle(*image.size))


def _resized(image: Image, size: int, box: Box, transpose: Transpose | None = None) -> bytes:
    from PIL.Image import Resampling

    small = image.resize((size, size), Resampling.BILINEAR, box)
    pixels: bytes = (small if transpose is None else small.transpose(transpose)).tobytes()
    return pixels


def random_part(width: int, height: int, draws: random.Random) -> Box:
    """A part of an image, of a random area, ratio and place; where none fits, its middle, of a ratio within the bounds."""
    low, high = map(math.log, _RATIO)
    for _ in range(_ATTEMPTS):
        area = width * height * (_SCALE[0] + (_SCALE[1] - _SCALE[0]) * draws.random())
        ratio = math.exp(low + (high - low) * draws.random())
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, upper = int(draws.random() * (width - w + 1)), int(draws.random() * (height - h + 1))
            return left, upper, left + w, upper + h
    w, h = min(width, max(1, round(height * _RATIO[1]))), min(height, max(1, round(width / _RATIO[0])))
    left, upper = (width - w) // 2, (height - h) // 2
    return left, upper, left + w, upper + h


def middle(width: int, height: int) -> Box:
    """The square in the middle that is left of an image whose shorter side is scaled to 256/224 of the square's."""
    side = _KEPT * min(width, height)
    left, upper = (width - side) / 2, (height - side) / 2
    return left, upper, left + side, upper + side
