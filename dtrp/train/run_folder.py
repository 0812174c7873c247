"""A run on disk."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ..atomic_file import whole_file
from ..launch.ranks import launch_name
from ..saving import state_dict
from .config import with_defaults

_ABOUT_SAVES = ("save-every", "keep-last")  # settings that do not change what is trained


def left_by(path: str, config: str, *, overwrite: bool) -> str | None:
    """Whose work the folder of ``--out`` holds, where a command is given again, by a user or by torchrun after a failure.

    Args:
        path: of the folder.
        config: the command's settings.
        overwrite: whether it may replace a run.

    Returns:
        ``"unfinished"``: of a run with these settings, which is gone on with (with ``overwrite``, only if this launch has
        begun it); ``"begun"``: the same, but there is nothing yet to go on from, nor to lose; ``"finished"``: this launch's
        own; None: none of these.
    """
    folder = Path(path).expanduser()
    own = (name := launch_name()) is not None and _text(folder / "launch") == name
    if (folder / "summary.json").exists():
        return "finished" if own else None
    if (overwrite and not own) or _settings(_text(folder / "config")) != _settings(config):
        return None
    if any(folder.glob("saves/update-*")):
        return "unfinished"
    return None if _text(folder / "metrics.jsonl") else "begun"


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def _settings(config: str) -> Any:
    import yaml

    try:
        values = yaml.safe_load(config)
    except yaml.YAMLError:
        return None
    if not isinstance(values, dict):
        return None
    return {k: v for k, v in with_defaults(values).items() if k not in _ABOUT_SAVES}


class RunFolder:
    """``--out``: ``config``, ``metrics.jsonl`` and ``model.pt``, all three as of the last finished epoch.

    At the end of the run ``summary.json`` comes beside them; ``saves`` holds checkpoints (`dtrp.train.autosave`); ``launch`` says
    which torchrun has started the ranks, if one has.

    The folder appears, whole, when the first epoch is through, or with the first save; what it replaces goes then.
    ``resume`` takes up the run that is in it.
    """

    def __init__(self, path: str, *, overwrite: bool, resume: bool = False) -> None:
        self.path = Path(path).expanduser().absolute()
        self._made = resume
        if resume:
            if not (self.path / "config").is_file():
                raise ValueError(f"--resume {path} is no run of dtrp train; name the folder of one")
            return
        if self.path.exists() and not overwrite:
            raise ValueError(f"--out {path} exists; choose another name, or pass --overwrite to replace it")
        if self.path.exists() and not _is_run(self.path):
            raise ValueError(f"--out {path} exists and is no run of dtrp train; nothing is overwritten")
        parent = next(p for p in self.path.parents if p.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise ValueError(f"--out {path}: {parent} cannot be written to; choose another place")

    def write(self, config: str, metrics: dict[str, Any], model: dict[str, Tensor]) -> None:
        """An epoch is through: its line, and the model as it is now."""
        if self._made:
            state_dict.write_model(model, self.path / "model.pt")
            self._append(self.path, metrics)
            return
        with self._appearing(config) as folder:
            state_dict.write_model(model, folder / "model.pt")
            self._append(folder, metrics)

    def begin(self, config: str) -> None:
        """Make the folder before an epoch is through, for a save; it has no metrics yet."""
        if not self._made:
            with self._appearing(config):
                pass

    @contextmanager
    def _appearing(self, config: str) -> Iterator[Path]:
        """A folder to fill, which takes its place, and that of what it replaces, when the context ends well."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.", dir=self.path.parent))
        try:
            (folder / "config").write_text(config)
            (folder / "metrics.jsonl").touch()
            _sign(folder)
            yield folder
            folder.chmod(0o755)
            if self.path.exists():
                old = folder.with_name(folder.name + ".old")
                self.path.rename(old)
                folder.rename(self.path)
                shutil.rmtree(old)
            else:
                folder.rename(self.path)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._made = True

    def go_on(self, config: str, metrics: list[dict[str, Any]]) -> None:
        """Take a run up again where these epochs were through: what came after them is trained again."""
        with whole_file(self.path / "config") as file:
            file.write(config.encode())
        with whole_file(self.path / "metrics.jsonl") as file:
            file.write("".join(json.dumps(line) + "\n" for line in metrics).encode())
        (self.path / "summary.json").unlink(missing_ok=True)
        _sign(self.path)

    def finish(self, summary: dict[str, Any]) -> None:
        """The run is through; ``summary.json`` says so, whole or not at all."""
        with whole_file(self.path / "summary.json") as file:
            file.write(json.dumps(summary, indent=1).encode())

    @staticmethod
    def _append(folder: Path, metrics: dict[str, Any]) -> None:
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(metrics) + "\n")


def _sign(folder: Path) -> None:
    """Say which launch works in the folder, if one does."""
    name = launch_name()
    if name is None:
        (folder / "launch").unlink(missing_ok=True)
        return
    with whole_file(folder / "launch") as file:
        file.write(name.encode())


def _is_run(path: Path) -> bool:
    """Whether it is an empty folder, or one that a run made."""
    return path.is_dir() and (
        not any(path.iterdir()) or all((path / name).is_file() for name in ("config", "metrics.jsonl"))
    )
