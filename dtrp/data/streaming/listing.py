"""The images of a folder with a folder per class: which files count, in a few bytes a file, and kept in a file.

On disk: a line that says what the file is, a line of JSON, the names of all images in a row, and where each ends::

    dtrp listing 1
    {"root": "/data", "folders": ["train/blue", ...], "counts": [4, ...], ..., "checksum": 123}
    0.png1.png2.png...
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import sys
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...atomic_file import whole_file
from ...tensors.rng import generator

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_MAGIC = b"dtrp listing 1\n"


@dataclass(frozen=True, eq=False)
class Listing:
    """The image files of a folder, by class.

    Args:
        root: the folder, absolute.
        folders: those of classes, relative to ``root``: all of the training split, then all of the test, if there is
            one; each in the order of the names of the classes.
        counts: number of images in each of them.
        names: the images' names, in the same order and then in that of their names, one after the other.
        ends: where each name ends in ``names``.
        has_test: whether there is a test split.
        unread: what is not read and why, as text; empty: all is.
        stamps: of every folder that was looked into, relative to ``root``, when it was last modified (in ns) and its
            number of entries.
        stats: mean and deviation of the channels, by what they were measured on; see `Listing.with_stats`.
    """

    root: str
    folders: tuple[str, ...]
    counts: tuple[int, ...]
    names: bytes = field(repr=False)
    ends: array[int] = field(repr=False)
    has_test: bool
    unread: str
    stamps: dict[str, tuple[int, int]] = field(repr=False)
    stats: dict[str, list[list[float]]]

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, sorted."""
        return tuple(name for split, name in map(os.path.split, self.folders) if split in ("", "train"))

    def path(self, index: int) -> str:
        """The file of an image."""
        begin = self.ends[index - 1] if index else 0
        folder = bisect_right(self._starts, index) - 1
        return os.path.join(self.root, self.folders[folder], os.fsdecode(self.names[begin : self.ends[index]]))

    @cached_property
    def _starts(self) -> list[int]:
        """The index of the first image of each folder. No folder is empty."""
        return [0, *itertools.accumulate(self.counts)][:-1]

    def is_current(self) -> bool:
        """Whether every folder is as it was: neither modified since, nor of another number of entries."""
        try:
            return all(_stamp(os.path.join(self.root, folder)) == stamp for folder, stamp in self.stamps.items())
        except OSError:
            return False

    def with_stats(self, key: str, mean: Tensor, std: Tensor) -> Listing:
        """The same with mean and deviation (C,) that were measured on what ``key`` says."""
        return dataclasses.replace(self, stats={**self.stats, key: [mean.tolist(), std.tolist()]})

    def splits(self, seed: int) -> tuple[Images, Images]:
        """Training and test images. Without a test split, a fifth of each class, drawn by ``seed``, is the test.

        Raises:
            ValueError: a class of a single image, where the images are to be split.
        """
        train: dict[int, Tensor] = {}
        test: dict[int, Tensor] = {}
        labels = {name: label for label, name in enumerate(self.classes)}
        for folder, start, count in zip(self.folders, self._starts, self.counts, strict=True):
            split, name = os.path.split(folder)
            if self.has_test:
                files = torch.arange(start, start + count, dtype=torch.int32)
                (train if split == "train" else test)[labels[name]] = files
                continue
            if count < 2:
                path = os.path.join(self.root, name)
                raise ValueError(f"{path} has 1 image, and training and test need one each; add at least 1")
            order = torch.randperm(count, generator=generator("split", seed, name), device="cpu").int() + start
            num_test = max(1, round(count / 5))
            test[labels[name]], train[labels[name]] = order[:num_test], order[num_test:]
        return Images.of(self, train), Images.of(self, test)


@dataclass(frozen=True, eq=False)
class Images:
    """The images of a split, the first of each class, then the second of each, and so on.

    Args:
        listing: where their files are found.
        files: number of the file in ``listing``, (N,), int32.
        labels: class of each, (N,), int32.
    """

    listing: Listing = field(repr=False)
    files: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)

    @classmethod
    def of(cls, listing: Listing, by_class: dict[int, Tensor]) -> Images:
        """The images of each class, in turns."""
        order, labels = in_turns({label: len(files) for label, files in by_class.items()})
        return cls(listing, torch.cat(list(by_class.values()))[order], labels)

    def __len__(self) -> int:
        return len(self.files)

    def limit(self, num: int | None) -> Images:
        """The first of them."""
        return dataclasses.replace(self, files=self.files[:num].clone(), labels=self.labels[:num].clone())

    def path(self, index: int) -> str:
        """The file of an image."""
        return self.listing.path(int(self.files[index]))


def in_turns(counts: dict[int, int]) -> tuple[Tensor, Tensor]:
    """The order of samples that lie class after class, in which classes take turns, and the classes in that order.

    >>> order, labels = in_turns({0: 2, 3: 1})
    >>> order.tolist(), labels.tolist()
    ([0, 2, 1], [0, 3, 0])
    """
    numbers = torch.tensor(list(counts.values()))
    labels = torch.tensor(list(counts), dtype=torch.int32).repeat_interleave(numbers)
    turns = torch.cat([torch.arange(number, dtype=torch.int32) for number in counts.values()])
    order = torch.argsort(turns.long() * (int(labels.max()) + 1) + labels)
    return order, labels[order]


# -- reading a folder -----------------------------------------------------------------------------------


def list_folder(data_dir: Path) -> Listing:
    """The images of ``data_dir``; see `dtrp.data.image_folder.load_folder` for which are.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no classes, a class without images, a class in the test that training does not have.
    """
    if not data_dir.is_dir():
        raise FileNotFoundError(
            f"no folder {data_dir}; pass data_dir (--data-dir), a folder with train/<class>/ and test/<class>/"
        )
    reader = _Reader(data_dir)
    train_dir = data_dir / "train"
    test_dir = next((path for path in (data_dir / "test", data_dir / "val") if path.is_dir()), None)
    if train_dir.is_dir():
        if test_dir is None:
            instead = f"add {data_dir / 'test'}, or pass {train_dir} as data_dir, to split it 80/20"
            raise ValueError(f"{data_dir} has train but no test (or val); {instead}")
        reader.look_into(data_dir)
        train, test = reader.read_classes(train_dir), reader.read_classes(test_dir)
        for name in sorted(set(test) - set(train)):
            raise ValueError(
                f"{test_dir} has class {name!r}, which {train_dir} has not; remove it there, or add it here"
            )
    elif test_dir is not None:
        raise ValueError(f"{data_dir} has {test_dir.name} but no train; add {train_dir}")
    else:
        reader.read_classes(data_dir)
    return reader.listing(has_test=test_dir is not None)


class _Reader:
    """What is found in a folder, as it is found."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._names, self._ends = bytearray(), array("Q")
        self._counts: dict[str, int] = {}
        self._stamps: dict[str, tuple[int, int]] = {}
        self._others: list[Path] = []  # what is no image of a class; folders that were looked into are among it

    def look_into(self, folder: Path) -> list[str]:
        """The names of what is in a folder that holds folders."""
        modified = os.stat(folder).st_mtime_ns
        names = os.listdir(folder)
        self._note(folder, modified, len(names), names)
        return names

    def read_classes(self, folder: Path) -> list[str]:
        """Read the folders in ``folder``, each a class; their names."""
        classes = sorted(name for name in self.look_into(folder) if name[0] != "." and (folder / name).is_dir())
        if not classes:
            raise ValueError(f"{folder} has no folders, one per class; put the images into {folder / '<class>'}")
        for name in classes:
            self._read_class(folder / name)
        return classes

    def _read_class(self, folder: Path) -> None:
        modified = os.stat(folder).st_mtime_ns
        images: list[str] = []
        others: list[str] = []
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                is_image = name.lower().endswith(ENDINGS) and name[0] != "." and entry.is_file()
                (images if is_image else others).append(name)
        if not images:
            found = _by_reason([path for name in others for path in _files_below(folder / name)], folder)
            raise ValueError(
                f"{folder} has no images ({', '.join(ENDINGS)}){found and ', but ' + found}; add some, or remove the folder"
            )
        images.sort()
        for name in images:
            self._names += os.fsencode(name)
            self._ends.append(len(self._names))
        self._counts[self._note(folder, modified, len(images) + len(others), others)] = len(images)

    def _note(self, folder: Path, modified: int, num_entries: int, others: list[str]) -> str:
        """Note what a folder has now, and what in it is no image of a class; its path relative to the root."""
        relative = os.path.relpath(folder, self._root)
        self._stamps[relative] = (modified, num_entries)
        self._others += [folder / name for name in others]
        return relative

    def listing(self, *, has_test: bool) -> Listing:
        """What was found, when all has been read."""
        read = {self._root / folder for folder in self._stamps}
        others = sorted(path for other in self._others if other not in read for path in _files_below(other))
        return Listing(
            root=os.path.abspath(self._root),
            folders=tuple(self._counts),
            counts=tuple(self._counts.values()),
            names=bytes(self._names),
            ends=self._ends,
            has_test=has_test,
            unread=_by_reason(others, self._root),
            stamps=self._stamps,
            stats={},
        )


def _stamp(folder: str) -> tuple[int, int]:
    """When a folder was last modified, and its number of entries."""
    with os.scandir(folder) as entries:
        return os.stat(folder).st_mtime_ns, sum(1 for _ in entries)


def _files_below(path: Path) -> Iterator[Path]:
    """A file itself, and the files below a folder; a hidden folder, or a link to a folder, counts as a file."""
    if path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
        for name in os.listdir(path):
            yield from _files_below(path / name)
    else:
        yield path


def _by_reason(files: Sequence[Path], folder: Path) -> str:
    """Files of ``folder`` that are not read, as text: by reason, how many and the first few names."""

    def reason(path: Path) -> str:
        if path.name.startswith("."):
            return "hidden"
        if not path.is_file():
            return "no files"
        return "in no class's own folder" if path.suffix.lower() in ENDINGS else "with another ending"

    groups = [(why, list(paths)) for why, paths in itertools.groupby(sorted(files, key=reason), reason)]
    return "; ".join(
        f"{len(paths)} {why} ({', '.join(str(path.relative_to(folder)) for path in paths[:3])}{', ...' * (len(paths) > 3)})"
        for why, paths in groups
    )


# -- on disk --------------------------------------------------------------------------------------------


def write_listing(listing: Listing, path: Path) -> None:
    """Write a listing; the file is whole at any time.

    Raises:
        ValueError: there is another file.
        OSError: it cannot be written.
    """
    if path.exists() and not _may_be_listing(path):
        raise ValueError(f"{path} is there and is no listing of images; choose another name for --listing")
    ends = array("Q", listing.ends)
    if sys.byteorder == "big":
        ends.byteswap()
    parts = (listing.names, ends.tobytes())
    header = {name: getattr(listing, name) for name in _IN_HEADER}
    header |= {"sizes": list(map(len, parts)), "checksum": _checksum(parts)}
    with whole_file(path) as file:
        file.write(_MAGIC + json.dumps(header).encode() + b"\n")
        for part in parts:
            file.write(part)


def read_listing(path: Path, data_dir: Path) -> tuple[Listing | None, str]:
    """The listing of ``data_dir`` in a file, if it is whole and the folder has not changed; else None, and why.

    Raises:
        ValueError: a file that is no listing.
    """
    if not path.exists():
        return None, ""
    if not _may_be_listing(path):
        raise ValueError(f"{path} is no listing of images; choose another name for --listing")
    try:
        listing = _read(path)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OSError, RuntimeError) as error:
        return None, f"{path} is damaged ({type(error).__name__}); {data_dir} is listed anew"
    if listing.root != os.path.abspath(data_dir):
        return None, f"{path} lists {listing.root}; {data_dir} is listed anew"
    if not listing.is_current():
        return None, f"{data_dir} has changed since it was listed; it is listed anew"
    return listing, ""


_IN_HEADER = ("root", "folders", "counts", "has_test", "unread", "stamps", "stats")


def _read(path: Path) -> Listing:
    """The listing in a file.

    Raises:
        ValueError, KeyError, TypeError: it is damaged.
    """
    with open(path, "rb") as file:
        file.read(len(_MAGIC))
        header: dict[str, Any] = json.loads(file.readline())
        names, raw_ends = parts = tuple(file.read(size) for size in header["sizes"])
    ends = array("Q")
    ends.frombytes(raw_ends)
    if sys.byteorder == "big":
        ends.byteswap()
    values = {name: header[name] for name in _IN_HEADER}
    values |= {name: tuple(values[name]) for name in ("folders", "counts")}
    values["stamps"] = {str(folder): (int(modified), int(num)) for folder, (modified, num) in values["stamps"].items()}
    listing = Listing(names=names, ends=ends, **values)
    if _checksum(parts) != header["checksum"] or not _is_sound(listing):
        raise ValueError("another content than was written")
    return listing


def _is_sound(listing: Listing) -> bool:
    """Whether names are where it says, every one that of a file below the root, and statistics are three numbers."""
    ends = torch.frombuffer(listing.ends, dtype=torch.int64)
    folders = [*listing.folders, *listing.stamps]
    numbers = [value for pair in listing.stats.values() for values in pair for value in values]
    return (
        sum(listing.counts) == len(ends)
        and min(listing.counts) > 0
        and int(ends[-1]) == len(listing.names)
        and bool((ends.diff(prepend=ends.new_zeros(1)) > 0).all())
        and b"/" not in listing.names
        and all(os.path.normpath(folder) == folder and folder[:1] not in ("/", "") for folder in folders)
        and not any(folder.split(os.sep)[0] == ".." for folder in folders)
        and len(numbers) == 6 * len(listing.stats)
        and all(isinstance(value, float) and 0 <= value <= 1 for value in numbers)
    )


def _may_be_listing(path: Path) -> bool:
    """Whether a path is a listing, be it damaged, or an empty file; no device, pipe or folder is touched."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(len(_MAGIC)) in (_MAGIC, b"")


def _checksum(parts: Sequence[bytes]) -> int:
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    return checksum
