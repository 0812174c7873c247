"""A folder that is replaced by a whole new one or stays as it is.

::

    write into .NAME.new  ->  NAME becomes .NAME.old  ->  .NAME.new becomes NAME  ->  .NAME.old goes

A process that dies before the second rename leaves the old one, which `inspect` finds under either name.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from .manifest import NAME, CheckpointError, previous


def begin(folder: Path) -> Path:
    """A new, empty folder beside ``folder``, to be written.

    Raises:
        CheckpointError: ``folder`` is something else than a checkpoint.
    """
    if previous(folder).exists():
        if folder.exists():  # the last save died when all was done but this
            shutil.rmtree(previous(folder))
        else:
            previous(folder).rename(folder)
    if folder.is_symlink() or (folder.exists() and not _may_go(folder)):
        raise CheckpointError(f"{folder} exists and is no checkpoint; choose another name, nothing is overwritten")
    folder.parent.mkdir(parents=True, exist_ok=True)
    discard(folder)
    new = beside(folder)
    new.mkdir()
    return new


def beside(folder: Path) -> Path:
    """Where a new one is written."""
    return folder.with_name(f".{folder.name}.new")


def discard(folder: Path) -> None:
    """Remove a new one that is not to be."""
    shutil.rmtree(beside(folder), ignore_errors=True)


def replace(folder: Path) -> None:
    """The new one, which is whole, takes the place of ``folder``."""
    new, old = beside(folder), previous(folder)
    sync(new)
    if folder.exists():
        folder.rename(old)
        try:
            new.rename(folder)
        except BaseException:
            _back(old, folder)
            raise
    else:
        new.rename(folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _back(old: Path, folder: Path) -> None:
    old.rename(folder)


def sync(folder: Path) -> None:
    """Put a folder's entries on the disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _may_go(folder: Path) -> bool:
    """Whether it is an empty folder, or one that a save has made."""
    return folder.is_dir() and (not any(folder.iterdir()) or (folder / NAME).is_file())
