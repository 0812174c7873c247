"""CIFAR-10 and CIFAR-100 in their Python layout.

Source: Krizhevsky, Learning multiple layers of features from tiny images, University of Toronto, 2009.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..tensors.pickles import ForbiddenName, Record, Unpickler
from .dataset import Dataset, channel_stats


@dataclass(frozen=True)
class _Layout:
    """Where one of the two keeps what: its archive and folder, its files, and the keys in them."""

    archive: str
    folder: str
    train: tuple[str, ...]
    test: str
    meta: str
    labels: str
    names: str
    num_classes: int


_LAYOUTS = {
    "cifar10": _Layout(
        archive="cifar-10-python.tar.gz",
        folder="cifar-10-batches-py",
        train=tuple(f"data_batch_{i}" for i in range(1, 6)),
        test="test_batch",
        meta="batches.meta",
        labels="labels",
        names="label_names",
        num_classes=10,
    ),
    "cifar100": _Layout(
        archive="cifar-100-python.tar.gz",
        folder="cifar-100-python",
        train=("train",),
        test="test",
        meta="meta",
        labels="fine_labels",
        names="fine_label_names",
        num_classes=100,
    ),
}
_PIXELS = 3 * 32 * 32


def load_cifar(name: str, data_dir: Path) -> Dataset:
    """cifar10 or cifar100, uint8 (N, 3, 32, 32), as the files have them: 50,000 and 10,000 images in the official ones.

    Args:
        name: ``"cifar10"`` or ``"cifar100"`` (its 100 fine classes).
        data_dir: the official archive's folder, or the one that holds it.

    Raises:
        FileNotFoundError: a file that is not there.
        ValueError: a file that is damaged, or asks for more than arrays and containers.
    """
    layout = _LAYOUTS[name]
    folder = data_dir / layout.folder
    if not folder.is_dir() and any((data_dir / file).is_file() for file in (*layout.train, layout.test, layout.meta)):
        folder = data_dir
    for file in (*layout.train, layout.test, layout.meta):
        if not (folder / file).is_file():
            raise FileNotFoundError(
                f"no file {folder / file}; download {layout.archive} from the CIFAR page of the University of Toronto, "
                f"unpack it, and pass the folder that then holds {layout.folder} as data_dir (--data-dir)"
            )
    train = [_read_images(folder / file, layout) for file in layout.train]
    train_x = torch.cat([x for x, _ in train])
    train_y = torch.cat([y for _, y in train])
    test_x, test_y = _read_images(folder / layout.test, layout)
    mean, std = channel_stats(train_x)
    return Dataset(
        name=name,
        train_x=train_x,
        train_y=train_y,
        test_x=test_x,
        test_y=test_y,
        num_classes=layout.num_classes,
        class_names=_read_names(folder / layout.meta, layout),
        mean=mean,
        std=std,
        augment=True,
    )


def _read_images(path: Path, layout: _Layout) -> tuple[Tensor, Tensor]:
    content = _read_pickle(path)
    data, labels = _entry(content, "data", path), _entry(content, layout.labels, path)
    try:
        if not isinstance(data, _Array):
            raise ValueError(f"a {type(data).__name__}")
        raw, (num, pixels), by_column = data.bytes_and_shape()
        if pixels != _PIXELS:
            raise ValueError(f"uint8 of shape {(num, pixels)}")
    except ValueError as found:
        raise ValueError(
            f"{path}: 'data' is {found}, and not uint8 of shape (rows, {_PIXELS}); {_again(layout)}"
        ) from None
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise ValueError(f"{path}: {layout.labels!r} is not a list of whole numbers; {_again(layout)}")
    if len(labels) != num or not labels:
        raise ValueError(f"{path}: {num} rows of 'data' but {len(labels)} {layout.labels!r}; {_again(layout)}")
    if min(labels) < 0 or max(labels) >= layout.num_classes:
        raise ValueError(
            f"{path}: {layout.labels!r} are {min(labels)}..{max(labels)}, and not in 0..{layout.num_classes - 1}; "
            f"{_again(layout)}"
        )
    flat = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    table = flat.view(pixels, num).T.contiguous() if by_column else flat.view(num, pixels)
    return table.view(num, 3, 32, 32), torch.tensor(labels)


def _read_names(path: Path, layout: _Layout) -> tuple[str, ...]:
    names = _entry(_read_pickle(path), layout.names, path)
    if not isinstance(names, list) or not all(isinstance(name, bytes | str) for name in names):
        raise ValueError(f"{path}: {layout.names!r} is not a list of names; {_again(layout)}")
    if len(names) != layout.num_classes:
        raise ValueError(f"{path}: {len(names)} {layout.names!r}, and not {layout.num_classes}; {_again(layout)}")
    return tuple(name.decode("latin1") if isinstance(name, bytes) else name for name in names)


def _entry(content: object, key: str, path: Path) -> Any:
    """A dict's entry, its keys bytes (written by Python 2) or str."""
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, and not a dict; is it a CIFAR file?")
    for form in (key.encode(), key):
        if form in content:
            return content[form]
    raise ValueError(f"{path}: has no {key!r} among {sorted(map(str, content))[:8]}; is it a CIFAR file?")


def _again(layout: _Layout) -> str:
    return f"the file is damaged; unpack {layout.archive} again"


# -- pickles --------------------------------------------------------------------------------------------


class _NumberType(Record):
    """Stands for `numpy.dtype`. Its state is byte order and alignment: a byte has neither."""


class _Array(Record):
    """Stands for what NumPy's ``_reconstruct`` returns: an empty array, whose state comes next."""

    def bytes_and_shape(self) -> tuple[bytes, tuple[int, int], bool]:
        """Its bytes, its shape, and whether they lie column by column.

        Raises:
            ValueError: it is not uint8 of two dimensions, with a message that continues "'data' is ...".
        """
        if not isinstance(self.state, tuple) or len(self.state) != 5:
            raise ValueError("an unfinished array")
        _, shape, number, by_column, raw = self.state
        code = next(iter(number.arguments), None) if isinstance(number, _NumberType) else None
        code = code.decode("latin1") if isinstance(code, bytes) else code
        if code != "u1" or not isinstance(raw, bytes):
            raise ValueError(f"an array of type {code!r}" if isinstance(code, str) else "an array of no type")
        if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError("uint8 without a shape")
        if len(shape) != 2:
            raise ValueError(f"uint8 of shape {shape}")
        if len(raw) != shape[0] * shape[1]:
            raise ValueError(f"uint8 of shape {shape} but {len(raw)} bytes")
        return raw, (shape[0], shape[1]), bool(by_column)


def _read_pickle(path: Path) -> object:
    def encode(text: str, encoding: str) -> bytes:
        """Stands for ``_codecs.encode``, by which Python 3 writes bytes in protocol 2; a new one each time."""
        if encoding != "latin1":
            raise ValueError("bytes of another encoding than latin1")
        return text.encode("latin1")

    stand_ins = {
        ("numpy.core.multiarray", "_reconstruct"): _Array,
        ("numpy._core.multiarray", "_reconstruct"): _Array,
        ("numpy", "ndarray"): "ndarray",  # an argument of _reconstruct
        ("numpy", "dtype"): _NumberType,
        ("_codecs", "encode"): encode,
    }
    try:
        return Unpickler(path.read_bytes(), stand_ins, encoding="bytes").load()
    except ForbiddenName as forbidden:
        raise ValueError(
            f"{path}: asks for {forbidden}, which no CIFAR file needs; refused, and nothing of it was run. Take the "
            "official file (or write yours with pickle protocol 2, 3 or 4)"
        ) from None
    except OSError:
        raise
    except Exception as cause:  # a damaged pickle can raise anything
        raise ValueError(
            f"{path}: cannot be read ({type(cause).__name__}: {cause}); the file is damaged, unpack its archive again"
        ) from cause
