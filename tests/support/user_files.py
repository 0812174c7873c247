"""Python files of a user's, for ``--model``, ``--data`` and the like, in a folder of their own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def user_files(folder: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str]) -> Iterator[Path]:
    """Within it these files, by name, lie in ``folder``, which is the current one; their modules are forgotten after it."""
    for name, source in files.items():
        (folder / name).write_text(source)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if any(Path(file).stem in name for file in files):
            del sys.modules[name]
