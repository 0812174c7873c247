"""Data sets for the command line and the benchmarks: labelled images and text, held in memory, and batches of them.

>>> data = load_data("random", image_size=8)
>>> x, y = next(batches(data.train_x, data.train_y, 64, dataset=data, seed=0, epoch=0, augment=data.augment))
>>> x.shape, y.shape
(torch.Size([64, 3, 8, 8]), torch.Size([64]))
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from ..lazy import lazy_names
from ..validation import unknown, whole

if TYPE_CHECKING:
    from .dataset import Dataset
    from .loader import batches
    from .source import DataError, InMemory, Part, Source
    from .streaming.streamed import StreamedImages, stream_folder
    from .supplied.supplied import SuppliedData, open_supplied
    from .text import TextDataset, load_text

__all__ = [
    "DataError", "Dataset", "InMemory", "Part", "Source", "StreamedImages", "SuppliedData", "TextDataset",
    "batches", "list_data", "load_data", "load_text", "open_supplied", "stream_folder",
]  # fmt: skip

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "DataError": ".source",
        "Dataset": ".dataset",
        "InMemory": ".source",
        "Part": ".source",
        "Source": ".source",
        "StreamedImages": ".streaming.streamed",
        "SuppliedData": ".supplied.supplied",
        "TextDataset": ".text",
        "batches": ".loader",
        "load_text": ".text",
        "open_supplied": ".supplied.supplied",
        "stream_folder": ".streaming.streamed",
    },
)

_NAMES = ("digits", "cifar10", "cifar100", "folder", "random", "text", "mnist", "fashion-mnist")
_WITHOUT_FILES = ("digits", "random")
_NEEDED_FILES = {
    "folder": "files; pass data_dir (--data-dir), a folder with train/<class>/ and test/<class>/",
    "text": "a file; pass data_dir (--data-dir), any UTF-8 text",
}
_FIXED_SIZE = {"digits": 8, "cifar10": 32, "cifar100": 32, "mnist": 32, "fashion-mnist": 32}  # H and W
_LARGEST_SIZE = {"random": 256, "folder": 4096}
_DEFAULT_SIZE, _DEFAULT_CONTEXT = 32, 64


def list_data() -> list[str]:
    """The names that `load_data` knows."""
    return list(_NAMES)


def load_data(
    name: str,
    data_dir: str | PathLike[str] | None = None,
    *,
    seed: int = 0,
    image_size: int | None = None,
    context: int | None = None,
) -> Dataset | TextDataset:
    """The data set called ``name``.

    =============  ===================================================  ===============  ======
    name           what                                                 images           files
    =============  ===================================================  ===============  ======
    digits         handwritten digits, part of scikit-learn             1,797, 1x8x8     none
    cifar10        10 classes of things and animals                     60,000, 3x32x32  yours
    cifar100       100 classes                                          60,000, 3x32x32  yours
    mnist          handwritten digits                                   70,000, 1x32x32  yours
    fashion-mnist  10 classes of clothes                                70,000, 1x32x32  yours
    folder         your images, in one folder per class                 3x32x32          yours
    random         10 random patterns and noise, drawn from ``seed``    2,500, 3x32x32   none
    text           a text, to tell the next character                   none             yours
    =============  ===================================================  ===============  ======

    Nothing is downloaded.

    Args:
        name: one of `list_data`.
        data_dir: folder of the data's files; for text, the file. None: for CIFAR and the MNISTs, the current folder.
        seed: random seed for the images of random, and for the split of a folder that has none. The others do not
            depend on it.
        image_size: H and W of the images, for folder and random. None: 32.
        context: characters in a window, for text. None: 64.

    Raises:
        ValueError: an unknown name (with the nearest right one), ``data_dir`` missing or not wanted, damaged files.
        FileNotFoundError: files that are not there, with what to download and where to put it.
        ImportError: a package that this data needs is not installed.
    """
    check_request(name, data_dir, image_size=image_size, context=context)
    from .cifar import load_cifar
    from .digits import load_digits
    from .idx import load_idx
    from .image_folder import load_folder
    from .synthetic import load_random
    from .text import load_text

    place = Path(data_dir or "")
    if name == "text":
        return load_text(place.expanduser(), context or _DEFAULT_CONTEXT)
    if name == "folder":
        return load_folder(place, seed, image_size or _DEFAULT_SIZE)
    if name == "random":
        return load_random(seed, image_size or _DEFAULT_SIZE)
    if name == "digits":
        return load_digits()
    return load_cifar(name, place) if name.startswith("cifar") else load_idx(name, place.expanduser())


def check_request(
    name: str, data_dir: str | PathLike[str] | None, *, image_size: int | None = None, context: int | None = None
) -> None:
    """Refuse what `load_data` refuses before it looks for files.

    Raises:
        ValueError: see there.
    """
    if name not in _NAMES:
        raise ValueError(unknown("data", name, _NAMES))
    if data_dir is None and name in _NEEDED_FILES:
        raise ValueError(f"data {name!r} needs {_NEEDED_FILES[name]}")
    if data_dir is not None and name in _WITHOUT_FILES:
        raise ValueError(
            f"data {name!r} reads no files, but data_dir={str(data_dir)!r}; leave data_dir (--data-dir) out"
        )
    _check_sizes(name, image_size, context)


def _check_sizes(name: str, image_size: int | None, context: int | None) -> None:
    """Refuse a size that the data set has no choice of, or that is out of range."""
    if context is not None and name != "text":
        raise ValueError(
            f"context={context} but data {name!r} has no windows of text; leave context out, or take 'text'"
        )
    if image_size is not None and name == "text":
        raise ValueError(f"image_size={image_size} but data 'text' has no images; leave image_size out")
    for label, size in (("image_size", image_size), ("context", context)):
        if size is not None:
            whole(label, size)
    if image_size is None:
        return
    largest, fixed = _LARGEST_SIZE.get(name, image_size), _FIXED_SIZE.get(name, image_size)
    if image_size > largest:
        raise ValueError(
            f"image_size={image_size}: the images of {name} are {largest}x{largest} at most, to fit into memory"
        )
    if image_size != fixed:
        raise ValueError(f"image_size={image_size} but the images of {name} are {fixed}x{fixed}; leave image_size out")
