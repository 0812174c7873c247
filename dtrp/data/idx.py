"""MNIST and Fashion-MNIST, in the four IDX files that both are published in.

Sources: LeCun, Bottou, Bengio and Haffner, Gradient-based learning applied to document recognition, Proceedings of the
IEEE, 1998; Xiao, Rasul and Vollgraf, Fashion-MNIST, arXiv:1708.07747.
"""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
import torch.nn.functional as F
from torch import Tensor

from .dataset import Dataset, Split, channel_stats

_SIZE, _BORDER = 28, 2  # pixels of an image, and of the border on each of its sides
_NUM_CLASSES = 10
_UNSIGNED_BYTE = 8  # code of the type of a file's numbers
_SPLITS = ("train", "t10k")
_CHUNK = 2**20  # bytes read at a time
_GZIP = b"\x1f\x8b"  # with which a gzipped file begins, whatever its name


@dataclass(frozen=True)
class _Published:
    """Where one of the two is published, the folders in which other programs keep it, and what its classes are."""

    source: str
    folders: tuple[str, ...]
    class_names: tuple[str, ...]
    augment: bool


_PUBLISHED = {
    "mnist": _Published(
        source="the MNIST page of Yann LeCun (yann.lecun.com/exdb/mnist) or one of its copies",
        folders=("mnist", "MNIST/raw"),
        class_names=tuple("0123456789"),
        augment=False,  # a mirrored digit is none
    ),
    "fashion-mnist": _Published(
        source="the repository zalandoresearch/fashion-mnist on GitHub",
        folders=("fashion-mnist", "FashionMNIST/raw"),
        class_names=(
            "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
        ),
        augment=True,
    ),
}  # fmt: skip


def load_idx(name: str, data_dir: Path) -> Dataset:
    """mnist or fashion-mnist, uint8 (N, 1, 32, 32), as the files have them: 60,000 and 10,000 images in the official ones.

    The images of 28 x 28 pixels have a border of two zeros on each side, so that networks for 32 x 32 take them.

    Args:
        name: ``"mnist"`` or ``"fashion-mnist"``.
        data_dir: folder of the four files, gzipped or not, or the one that holds it as ``mnist`` or ``MNIST/raw``
            (``fashion-mnist``, ``FashionMNIST/raw``).

    Raises:
        FileNotFoundError: a file that is not there.
        ValueError: a file that is damaged, or holds something else.
    """
    published = _PUBLISHED[name]
    places = [data_dir, *(data_dir / folder for folder in published.folders)]
    folder = next((place for place in places if any(_found(place, *split) for split in _files())), data_dir)
    train, test = (_read_split(folder, split, published) for split in _SPLITS)
    return Dataset(
        name,
        *train,
        *test,
        num_classes=_NUM_CLASSES,
        class_names=published.class_names,
        **dict(zip(("mean", "std"), channel_stats(train[0]), strict=True)),
        augment=published.augment,
        border=_BORDER,
    )


def _files() -> list[tuple[str, str, int]]:
    """Split, content and number of dimensions of the four files."""
    return [(split, content, dims) for split in _SPLITS for content, dims in (("images", 3), ("labels", 1))]


def _found(folder: Path, split: str, content: str, dims: int) -> Path | None:
    """One of the four files, under the name that it is published with or the one that some programs unpack it to."""
    names = (f"{split}-{content}-idx{dims}-ubyte", f"{split}-{content}.idx{dims}-ubyte")
    files = (folder / (name + ending) for name in names for ending in ("", ".gz"))
    return next((file for file in files if file.is_file()), None)


def _read_split(folder: Path, split: str, published: _Published) -> Split:
    paths = []
    for content, dims in (("images", 3), ("labels", 1)):
        path = _found(folder, split, content, dims)
        if path is None:
            name = f"{split}-{content}-idx{dims}-ubyte"
            others = ", ".join(f"{s}-{c}-idx{d}-ubyte.gz" for s, c, d in _files())
            raise FileNotFoundError(
                f"no file {folder / name}, nor {name}.gz; download {others} from {published.source}, and pass the folder "
                "that then holds them as data_dir (--data-dir)"
            )
        paths.append(path)
    images, labels = _read(paths[0], (_SIZE, _SIZE)), _read(paths[1], ())
    if len(images) != len(labels):
        raise ValueError(
            f"{paths[0]} holds {len(images)} images but {paths[1]} {len(labels)} labels; take both from one data set"
        )
    if int(labels.max()) >= _NUM_CLASSES:
        found = f"{int(labels.min())}..{int(labels.max())}"
        raise ValueError(f"{paths[1]}: the labels are {found}, and not in 0..{_NUM_CLASSES - 1}; {_AGAIN}")
    return F.pad(images[:, None], (_BORDER,) * 4), labels.long()


_AGAIN = "the file is damaged, or of another data set; download it again"


def _read(path: Path, shape: tuple[int, ...]) -> Tensor:
    """The bytes in a file, uint8 (N, *shape), N at least 1."""
    dims = 1 + len(shape)
    start = bytes([0, 0, _UNSIGNED_BYTE, dims])
    try:
        with open(path, "rb") as file:
            gzipped = file.read(len(_GZIP)) == _GZIP
        with gzip.open(path) if gzipped else open(path, "rb") as file:
            head = file.read(4 + 4 * dims)
            if len(head) < 4 + 4 * dims or not head.startswith(start):
                raise ValueError(
                    f"{path}: begins with {head[:4].hex()!r}, and not with {start.hex()!r}, as an IDX file of bytes in "
                    f"{dims} dimension{'s' * (dims > 1)} does; {_AGAIN}"
                )
            num, *sizes = (int.from_bytes(head[i : i + 4], "big") for i in range(4, len(head), 4))
            if tuple(sizes) != shape or num < 1:
                wanted = " x ".join(("N", *map(str, shape)))
                raise ValueError(f"{path}: holds {' x '.join(map(str, (num, *sizes)))}, and not {wanted}; {_AGAIN}")
            expected = num * math.prod(shape)
            content = _read_at_most(file, expected + 1)  # one more, which must not be there
    except (EOFError, gzip.BadGzipFile, zlib.error) as cause:
        raise ValueError(f"{path}: cannot be read ({type(cause).__name__}: {cause}); {_AGAIN}") from cause
    if len(content) != expected:
        more = "more than " * (len(content) > expected)
        length = min(len(content), expected)
        raise ValueError(f"{path}: has {more}{length} bytes where its head says {expected}; {_AGAIN}")
    return torch.frombuffer(content, dtype=torch.uint8).view(num, *shape)


def _read_at_most(file: IO[bytes] | gzip.GzipFile, num_bytes: int) -> bytearray:
    """So many bytes, or all there are. A damaged head may ask for more than memory holds, so it takes none in advance."""
    content = bytearray()
    while len(content) < num_bytes and (part := file.read(min(num_bytes - len(content), _CHUNK))):
        content += part
    return content
