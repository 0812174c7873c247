"""Labelled images and text for the command line and the benchmarks, held in memory, and batches of them.

>>> data = load_data("random", image_size=8)
>>> x, y = next(batches(data.train_x, data.train_y, 64, dataset=data, seed=0, epoch=0, augment=data.augment))
>>> x.shape, y.shape
(torch.Size([64, 3, 8, 8]), torch.Size([64]))
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from ..did_you_mean import unknown
from ..lazy import lazy_names

if TYPE_CHECKING:
    from .dataset import Dataset
    from .loader import batches
    from .text import TextDataset, load_text

__all__ = ["Dataset", "TextDataset", "batches", "list_data", "load_data", "load_text"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Dataset": ".dataset",
        "TextDataset": ".text",
        "batches": ".loader",
        "load_text": ".text",
    },
)

_FIXED_SIZE = {"digits": 8, "cifar10": 32, "cifar100": 32}
_LARGEST = {"random": 256, "folder": 4096}
_FROM_DIR = ("cifar10", "cifar100", "folder")
_NAMES = ("digits", "cifar10", "cifar100", "folder", "random", "text")
_CONTEXT = 64


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

    ========  ===================================================  ===============  ======
    name      what                                                 images           files
    ========  ===================================================  ===============  ======
    digits    handwritten digits, part of scikit-learn             1,797, 1x8x8     none
    cifar10   10 classes of things and animals                     60,000, 3x32x32  yours
    cifar100  100 classes                                          60,000, 3x32x32  yours
    folder    your images, in one folder per class                 3x32x32          yours
    random    10 random patterns and noise, drawn from ``seed``    2,500, 3x32x32   none
    text      a text, to tell the next character                   none             yours
    ========  ===================================================  ===============  ======

    Nothing is downloaded.

    Args:
        name: one of `list_data`.
        data_dir: where the files are, for the data sets that have files; for text, the file. None: for CIFAR, the current
            folder.
        seed: of the images of random, and of the split of a folder that has none. The others do not depend on it.
        image_size: H and W, for folder and random. None: the data's own, or 32.
        context: characters of a window, for text. None: 64.

    Raises:
        ValueError: an unknown name (with the nearest right one), ``data_dir`` missing or not wanted, damaged files.
        FileNotFoundError: files that are not there, with what to download and where to put it.
        ImportError: a package that this data needs is not installed.
    """
    if name not in _NAMES:
        raise ValueError(unknown("data", name, _NAMES))
    if name == "folder" and data_dir is None:
        raise ValueError(
            "data 'folder' needs files; pass data_dir (--data-dir), a folder with train/<class>/ and test/<class>/"
        )
    if name == "text":
        if data_dir is None:
            raise ValueError("data 'text' needs a file; pass data_dir (--data-dir), any UTF-8 text")
        if image_size is not None:
            raise ValueError(f"image_size={image_size} but data 'text' has no images; leave image_size out")
        context = _CONTEXT if context is None else context
        if not isinstance(context, int) or context < 1:
            raise ValueError(f"context={context!r}: pass a whole number of at least 1")
        from .text import load_text

        return load_text(Path(data_dir).expanduser(), context)
    if context is not None:
        raise ValueError(
            f"context={context} but data {name!r} has no windows of text; leave context out, or take 'text'"
        )
    if name not in _FROM_DIR and data_dir is not None:
        raise ValueError(
            f"data {name!r} reads no files, but data_dir={str(data_dir)!r}; leave data_dir (--data-dir) out"
        )
    if image_size is not None:
        if not isinstance(image_size, int) or image_size < 1:
            raise ValueError(f"image_size={image_size!r}: pass a whole number of at least 1")
        most = _LARGEST.get(name, image_size)
        if image_size > most:
            raise ValueError(
                f"image_size={image_size}: the images of {name} are {most}x{most} at most, to fit into memory"
            )
        own = _FIXED_SIZE.get(name, image_size)
        if image_size != own:
            raise ValueError(f"image_size={image_size} but the images of {name} are {own}x{own}; leave image_size out")
    if name == "digits":
        from .digits import load_digits

        return load_digits()
    if name == "random":
        from .synthetic import load_random

        return load_random(seed, image_size or 32)
    place = Path(data_dir) if data_dir is not None else Path()
    if name == "folder":
        from .image_folder import load_folder

        return load_folder(place, seed, image_size or 32)
    from .cifar import load_cifar

    return load_cifar(name, place)
