"""The folder of a run on disk."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from ..atomic_file import whole_file
from ..launch.join import launch_name
from ..saving import state_dict
from ..typing import Json
from .config import AUTO, AUTO_SAMPLES, SAVE_SETTINGS, TrainConfig, config_text, read_settings
from .user_code import digest, digests

DATA_FACTS = "data.json"  # what a network is made by, and what its inputs and outputs mean
_CODE = "code.json"  # digests of the user's files, by what the settings call them
_LEAST = "microbatch-samples"


def left_by(path: str, config: str, *, overwrite: bool) -> str | None:
    """What the folder of ``--out`` holds when a command is repeated, by the user or by torchrun after a failure.

    Args:
        path: the folder.
        config: text of the command's settings.
        overwrite: whether the command may replace a run.

    Returns:
        ``"unfinished"``: a run with these settings and with saves, which continues (with ``overwrite``, only if this
        launch has begun it); ``"begun"``: such a run without saves and without a finished epoch; ``"finished"``: a
        finished run of this launch; None: anything else.
    """
    folder = Path(path).expanduser()
    same_launch = (name := launch_name()) is not None and _text(folder / "launch") == name
    if (folder / "summary.json").exists():
        return "finished" if same_launch else None
    if (overwrite and not same_launch) or not _same(_settings(_text(folder / "config")), _settings(config)):
        return None
    if any(folder.glob("saves/update-*")):
        return "unfinished"
    return None if _text(folder / "metrics.jsonl") else "begun"


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def _settings(config: str) -> dict[str, Json] | None:
    """The settings in a text, but for those of saves; None where it has none."""
    values = read_settings(config)
    return values and {key: value for key, value in values.items() if key.replace("-", "_") not in SAVE_SETTINGS}


def _same(begun: dict[str, Json] | None, given: dict[str, Json] | None) -> bool:
    """Whether a run has been begun by these settings; it has a number where they leave the micro-batches open."""
    if begun is not None and given is not None and given["num-microbatches"] == AUTO and _LEAST in begun:
        given = {_LEAST: AUTO_SAMPLES, **given, "num-microbatches": begun["num-microbatches"]}
    return begun == given


def changed_code(folder: Path) -> list[str]:
    """The functions that a run's settings name whose source files have changed since the run began."""
    try:
        began = json.loads((folder / _CODE).read_text())
    except (OSError, ValueError):
        return []
    return [reference for reference, found in began.items() if digest(reference) not in (None, found)]


class RunFolder:
    """The folder of ``--out``: ``config``, ``metrics.jsonl`` and ``model.pt`` after the last finished epoch.

    ``data.json`` has the facts of the run's data that its model needs. Where settings name functions of the user's,
    ``code.json`` has digests of their files.

    A finished run also has ``summary.json``. ``saves`` holds checkpoints (`dtrp.train.autosave`), and ``launch`` names
    the torchrun that has started the ranks, if any. The folder appears, whole, after the first epoch or with the first
    save, and replaces what was there.

    Args:
        path: the folder.
        overwrite: whether a run that is there may be replaced.
        resume: whether to continue the run that is there.

    Attributes:
        resumes: whether a run continues.
        facts: `dtrp.data.Source.facts` of the run's data; None: they are not written.

    Raises:
        ValueError: no run to resume, a folder that may not be replaced, or a place that cannot be written.
    """

    def __init__(self, path: str, *, overwrite: bool, resume: bool = False) -> None:
        self.path = Path(path).expanduser().absolute()
        self.resumes = self._exists = resume
        self.facts: dict[str, Json] | None = None
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

    @classmethod
    def open(cls, config: TrainConfig) -> RunFolder:
        """The folder for a run with these settings; it continues a run that the same command has begun there."""
        path = str(config.out)
        left = left_by(path, config_text(config), overwrite=config.overwrite)
        return cls(path, overwrite=config.overwrite or left == "begun", resume=config.resume or left == "unfinished")

    def division(self, config: TrainConfig) -> dict[str, Json]:
        """The fields of `TrainConfig` that say how mini-batches are cut: of the run that goes on, else of ``config``."""
        fields = ("num_microbatches", "microbatch_samples")
        begun = _settings(_text(self.path / "config")) if self.resumes and config.num_microbatches == AUTO else None
        if begun is None:
            return {field: getattr(config, field) for field in fields}
        return {field: begun.get(field.replace("_", "-")) for field in fields}

    def write(self, config: str, metrics: dict[str, Json], model: dict[str, Tensor]) -> None:
        """Write the line of a finished epoch, and the model."""
        with self._existing(config) as folder:
            state_dict.write_model(model, folder / "model.pt")
            with open(folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(metrics) + "\n")

    def begin(self, config: str) -> None:
        """Make the folder before the first epoch has ended, for a save; it has no metrics yet."""
        with self._existing(config):
            pass

    @contextmanager
    def _existing(self, config: str) -> Iterator[Path]:
        """The folder to write to. A new one takes its place, and that of an old run, when the context ends well."""
        if self._exists:
            yield self.path
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.", dir=self.path.parent))
        try:
            (folder / "config").write_text(config)
            if code := digests(read_settings(config) or {}):
                (folder / _CODE).write_text(json.dumps(code, indent=1))
            if self.facts is not None:
                (folder / DATA_FACTS).write_text(json.dumps(self.facts))
            (folder / "metrics.jsonl").touch()
            _sign(folder)
            yield folder
            folder.chmod(0o755)
            replaced = folder.with_name(folder.name + ".old")
            if self.path.exists():
                self.path.rename(replaced)
            folder.rename(self.path)
            if replaced.exists():
                shutil.rmtree(replaced)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._exists = True

    def go_on(self, config: str, metrics: list[dict[str, Json]]) -> None:
        """Continue a run after the epochs in ``metrics``: later epochs will be trained again."""
        with whole_file(self.path / "config") as file:
            file.write(config.encode())
        with whole_file(self.path / "metrics.jsonl") as file:
            file.write("".join(json.dumps(line) + "\n" for line in metrics).encode())
        if self.facts is not None and not (self.path / DATA_FACTS).exists():
            with whole_file(self.path / DATA_FACTS) as file:
                file.write(json.dumps(self.facts).encode())
        (self.path / "summary.json").unlink(missing_ok=True)
        _sign(self.path)

    def finish(self, summary: dict[str, Json]) -> None:
        """Write ``summary.json``, which marks the run as finished."""
        with whole_file(self.path / "summary.json") as file:
            file.write(json.dumps(summary, indent=1).encode())


def _sign(folder: Path) -> None:
    """Write the name of the launch that works in the folder; remove that of an earlier one."""
    name = launch_name()
    if name is None:
        (folder / "launch").unlink(missing_ok=True)
        return
    with whole_file(folder / "launch") as file:
        file.write(name.encode())


def _is_run(path: Path) -> bool:
    """Whether a path is an empty folder, or the folder of a run."""
    return path.is_dir() and (
        not any(path.iterdir()) or all((path / name).is_file() for name in ("config", "metrics.jsonl"))
    )
