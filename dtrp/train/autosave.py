"""The saves of a run on disk: when one is due, which are kept, and from which one goes on.

RUN/saves/update-00000120/      in the middle of an epoch: exact, what is in flight too
RUN/saves/update-00000200/      at an epoch's end, when nothing is in flight: portable, for any number of stages
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..pipeline import Pipeline
from ..saving import Checkpoint, CheckpointError, state_dict
from ..saving.checks import OtherOptions
from ..saving.folder import is_ours
from ..saving.manifest import glance


@dataclass
class Position:
    """Where a run is, beyond what its pipeline holds.

    Attributes:
        epoch: from 0.
        samples: of that epoch that have been trained on.
        loss_sum, learned: of the losses of those samples, and how many had a finite one.
        trained_s, elapsed_s: of the epoch's training, and of the run.
        metrics: of the finished epochs.
        best: (update, accuracy) of the best of them.
    """

    epoch: int = 0
    samples: int = 0
    loss_sum: float = 0.0
    learned: float = 0.0
    trained_s: float = 0.0
    elapsed_s: float = 0.0
    metrics: list[dict[str, Any]] = field(default_factory=list)
    best: tuple[int, float] | None = None

    @classmethod
    def read(cls, text: Any) -> Position:
        """What `Saves.write` has written.

        Raises:
            ValueError: it is something else.
        """
        try:
            said = json.loads(text)
            at = cls(**{**said, "best": tuple(said["best"]) if said["best"] else None})
            right = all(type(n) is int and n >= 0 for n in (at.epoch, at.samples))
            right &= all(type(n) in (int, float) for n in (at.loss_sum, at.learned, at.trained_s, at.elapsed_s))
            right &= isinstance(at.metrics, list) and len(at.metrics) == at.epoch
            right &= at.best is None or list(map(type, at.best)) == [int, float]
        except (TypeError, ValueError, KeyError, RecursionError):
            right = False
        if not right:
            raise ValueError("it does not say where the run was")
        return at


_UNITS_S = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class SaveEvery:
    """When a save within an epoch is due: every so many updates, or seconds."""

    updates: int | None = None
    seconds: float | None = None

    @classmethod
    def of(cls, text: str | int | None) -> SaveEvery:
        """``500``: updates; ``90s``, ``5m``, ``1.5h``: time; None: never.

        Raises:
            ValueError: anything else.
        """
        if text is None:
            return cls()
        match = re.fullmatch(r"([0-9]+)|([0-9]+(?:\.[0-9]*)?)([smh])", str(text).strip())
        if match and match[1] and int(match[1]):
            return cls(updates=int(match[1]))
        if match and match[2] and float(match[2]):
            return cls(seconds=float(match[2]) * _UNITS_S[match[3]])
        raise ValueError(f"--save-every {text}: a number of updates, like 500, or a time, like 90s, 5m or 1h")


class Saves:
    """Those of one run.

    Args:
        run: its folder.
        keep_last: how many of the last ones are kept; the best one is kept beside them.
        tidies: whether this process, of those that train together, makes the folder and lets go of old ones.
        every: when one is due within an epoch.
    """

    def __init__(self, run: Path, keep_last: int, *, tidies: bool = True, every: SaveEvery | None = None) -> None:
        self._tidies = tidies
        self._every = every or SaveEvery()
        self._since = time.monotonic()  # of the last save
        self._folder = run / "saves"
        self._keep_last = keep_last

    @property
    def late(self) -> bool:
        """Whether the time for a save has come, by the clock of this process."""
        return self._every.seconds is not None and time.monotonic() - self._since >= self._every.seconds

    def due(self, update: int) -> bool:
        """Whether a save is due after an update, on every rank."""
        return self._every.updates is not None and update % self._every.updates == 0

    def write(self, pipe: Pipeline, position: Position, *, portable: bool) -> None:
        """Save, on all ranks, and let go of what need not be kept."""
        if self._tidies:
            self._folder.mkdir(exist_ok=True)
        # As text, since a loss may be nan, which JSON has not.
        extra = {"position": json.dumps(dataclasses.asdict(position))}
        path = self._path(pipe.num_updates)
        if self._tidies and (path.is_symlink() or (path.exists() and not is_ours(path))):
            path.rename(path.with_name(f"aside-{path.name}-{time.time_ns()}"))  # it was left aside when the run went on
        pipe.save(path, portable=portable, extra=extra)
        self._since = time.monotonic()
        if self._tidies:
            for path in self._folder.glob(".update-*"):  # of a process that died while it saved
                shutil.rmtree(path, ignore_errors=True)
            best = self._path(position.best[0]) if position.best else None
            for path in self._all()[self._keep_last :]:
                if path != best:
                    shutil.rmtree(path, ignore_errors=True)

    def resume(
        self, pipe: Pipeline, *, num_replicas: int, check: Callable[[Position], None] = lambda position: None
    ) -> tuple[Position, list[str]]:
        """Load the newest save that is whole and fits; where the run was, and what there is to say about it.

        The options of the optimizers, learning rates too, stay those that ``pipe`` was made with.

        Args:
            pipe: to load it into.
            num_replicas: of the run.
            check: raises ValueError where the run cannot go on from a position.

        Raises:
            CheckpointError: there is none.
        """
        notes: list[str] = []
        own = (pipe.method.name, pipe.num_stages, pipe.num_microbatches, num_replicas)
        options = [state_dict.options_of(stage) for stage in pipe._engine.stages]
        for path, found, position in self._readable(notes, check):
            theirs = (found.method, found.num_stages, found.num_microbatches, found.num_replicas)
            if found.kind == "exact" and theirs != own:
                notes.append(
                    f"{path.name} holds what was in flight in another pipeline; the last portable save is taken"
                )
                continue
            try:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    pipe.load(path)
            except CheckpointError as error:
                if pipe._broken is not None:
                    raise
                notes.append(f"{path.name} is left aside: {error}")
                continue
            notes += [str(each.message) for each in caught if not isinstance(each.message, OtherOptions)]
            for stage, own_options in zip(pipe._engine.stages, options, strict=True):
                state_dict.set_options(stage, own_options)
            how = "what was in flight included" if found.kind == "exact" else "from a portable save"
            notes.append(f"going on after update {pipe.num_updates}, {how}")
            return position, notes
        raise CheckpointError(
            f"{self._folder.parent} has no save to go on from" + "".join(f"; {note}" for note in notes)
        )

    def _readable(
        self, notes: list[str], check: Callable[[Position], None]
    ) -> Iterator[tuple[Path, Checkpoint, Position]]:
        """Those whose manifests are whole; the other files are checked by `Pipeline.load`."""
        for path in self._all():
            try:
                found = glance(path)
                position = Position.read(found.extra.get("position") if isinstance(found.extra, dict) else None)
                if path != self._path(found.num_updates):
                    raise ValueError(f"it says that it is of update {found.num_updates}")
                check(position)
            except ValueError as error:
                notes.append(f"{path.name} is left aside: {error}")
            else:
                yield path, found, position

    def _all(self) -> list[Path]:
        """Newest first."""
        return sorted(self._folder.glob("update-*"), reverse=True)

    def _path(self, update: int) -> Path:
        return self._folder / f"update-{update:08d}"
