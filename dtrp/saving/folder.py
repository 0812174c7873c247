"""A folder that is replaced by a complete new one, or stays as it is.

::

    write into .NAME.new  ->  NAME becomes .NAME.old  ->  .NAME.new becomes NAME  ->  .NAME.old goes

A process that dies before the second rename leaves the old folder, which `inspect` finds under either name.
``.NAME.new`` is locked while it is written, so that two runs that save to the same place do not mix their files.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

from .manifest import METADATA, NAME, CheckpointError, is_manifest, previous

# The files that a save writes, and those that it leaves if it dies.
_OURS = re.compile(rf"{re.escape(NAME)}|{re.escape(METADATA)}(\.tmp)?|__\d+_\d+\.distcp|\.{re.escape(NAME)}\..+")


class Replacement:
    """A new folder beside ``folder``, which is written first and then takes its place.

    Args:
        folder: new, empty, or an earlier checkpoint.

    Attributes:
        new: the folder to write into.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.new, self._old = folder, folder.with_name(f".{folder.name}.new"), previous(folder)
        self._lock: int | None = None

    def begin(self) -> None:
        """Make the new folder, empty and locked.

        Raises:
            CheckpointError: ``folder`` is something else than a checkpoint, or another process is saving to it.
        """
        folder = self.folder
        for path in (folder, self.new, self._old):
            if path.is_symlink() or (path.exists() and not is_ours(path)):
                raise CheckpointError(
                    f"{path} exists and is no checkpoint; choose another name, nothing is overwritten"
                )
        folder.parent.mkdir(parents=True, exist_ok=True)
        if self.new.exists():  # of a save that died, or of one that goes on
            self._take_lock()
            shutil.rmtree(self.new)
            self.close()
        if self._old.exists():
            if folder.exists():  # the last save died when only the removal was left
                shutil.rmtree(self._old)
            else:
                self._old.rename(folder)
        try:
            self.new.mkdir()
        except FileExistsError:
            raise self._taken() from None
        self._take_lock()

    def replace(self) -> None:
        """Put the new folder, which is complete, in the place of ``folder``."""
        _sync(self.new)
        if self.folder.exists():
            self.folder.rename(self._old)
        try:
            self.new.rename(self.folder)
            _sync(self.folder.parent)
        except BaseException:
            self._back()
            raise
        shutil.rmtree(self._old, ignore_errors=True)

    def _back(self) -> None:
        if self.folder.exists():
            self.folder.rename(self.new)
        if self._old.exists():
            self._old.rename(self.folder)

    def discard(self) -> None:
        """Remove the new folder, if it is this process's."""
        if self._lock is not None:
            shutil.rmtree(self.new, ignore_errors=True)

    def close(self) -> None:
        """Release the lock, so that others can save to ``folder``."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _take_lock(self) -> None:
        """Lock the new folder against other processes; the lock of a process that dies is released."""
        import fcntl  # of POSIX

        try:
            self._lock = os.open(self.new, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_taken = os.stat(self.new).st_ino != os.fstat(self._lock).st_ino
        except OSError as error:
            # On a file system without such locks saving goes on without one.
            is_taken = error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.ENOENT)
        if is_taken:
            self.close()
            raise self._taken()

    def _taken(self) -> CheckpointError:
        return CheckpointError(f"another process is saving to {self.folder}; give each run a folder of its own")


def _sync(folder: Path) -> None:
    """Put a folder's entries on the disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def is_ours(path: Path) -> bool:
    """Whether it is an empty folder, or holds what a save has written, complete or not, and nothing else."""
    if not path.is_dir():
        return False
    names = {entry.name for entry in path.iterdir()}
    # A file called manifest.json alone may be anybody's.
    return all(map(_OURS.fullmatch, names)) and (names != {NAME} or is_manifest(path / NAME))
