"""The saves of a run: when they are due, which are kept, and from which a run resumes.

RUN/saves/update-00000120/      in the middle of an epoch: exact, with the batches in flight
RUN/saves/update-00000200/      at the end of an epoch, with nothing in flight: portable, for any number of stages
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

from ..pipeline import Pipeline
from ..saving import Checkpoint, CheckpointError, state_dict
from ..saving.checks import OtherOptions
from ..saving.folder import is_ours
from ..saving.manifest import PartlyLoadedError, glance
from ..typing import Json
from .results import EpochMetrics


@dataclass
class Position:
    """The progress of a run that its pipeline does not hold.

    Attributes:
        epoch: number of the epoch, from 0.
        samples: number of its samples that have been trained on.
        loss_sum, learned: sum of the finite losses of these samples, and the number of finite losses.
        trained_s, elapsed_s: seconds of training in the epoch, and of the whole run.
        metrics: metrics of the finished epochs.
        best: (update, accuracy) of the best of these epochs.
    """

    epoch: int = 0
    samples: int = 0
    loss_sum: float = 0.0
    learned: float = 0.0
    trained_s: float = 0.0
    elapsed_s: float = 0.0
    metrics: list[EpochMetrics] = field(default_factory=list)
    best: tuple[int, float] | None = None

    @classmethod
    def read(cls, text: Json) -> Position:
        """A position from the text that `Saves.write` has written.

        Raises:
            ValueError: another text.
        """
        try:
            values = json.loads(text)
            values["metrics"] = [EpochMetrics(**line) for line in values["metrics"]]
            values["best"] = values["best"] and tuple(values["best"])
            position = cls(**values)
            numbers = [position.loss_sum, position.learned, position.trained_s, position.elapsed_s]
            for metrics in position.metrics:
                numbers += [value for name, value in vars(metrics).items() if name != "scores"]
                numbers += metrics.scores.values()
            right = all(type(n) is int and n >= 0 for n in (position.epoch, position.samples))
            right &= all(type(n) in (int, float) for n in numbers) and len(position.metrics) == position.epoch
            right &= position.best is None or list(map(type, position.best)) == [int, float]
        except (TypeError, ValueError, KeyError, AttributeError, RecursionError):
            right = False
        if not right:
            raise ValueError("it does not say where the run was")
        return position


_UNITS_S = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class SaveEvery:
    """The interval of saves within an epoch, in updates or in seconds; both None: no such saves."""

    updates: int | None = None
    seconds: float | None = None

    @classmethod
    def parse(cls, text: str | int | None) -> SaveEvery:
        """``500``: updates; ``90s``, ``5m``, ``1.5h``: time; None: no saves within an epoch.

        Raises:
            ValueError: any other text.
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
    """The saves of a run.

    Args:
        run: folder of the run.
        keep_last: number of latest saves to keep; that of the best epoch is kept as well.
        tidies: whether this process, of all ranks, makes the folder and removes old saves.
        every: interval of saves within an epoch.

    Attributes:
        extra: what was given to `write` with the save that the run has been resumed from.
    """

    def __init__(self, run: Path, keep_last: int, *, tidies: bool = True, every: SaveEvery | None = None) -> None:
        self._tidies = tidies
        self._every = every or SaveEvery()
        self._saved_at = time.monotonic()
        self._folder = run / "saves"
        self._keep_last = keep_last
        self.extra: Json = None

    @property
    def late(self) -> bool:
        """Whether a save is due by the clock of this process."""
        return self._every.seconds is not None and time.monotonic() - self._saved_at >= self._every.seconds

    def due(self, update: int) -> bool:
        """Whether a save is due after an update; the same on every rank."""
        return self._every.updates is not None and update % self._every.updates == 0

    def write(self, pipe: Pipeline, position: Position, *, portable: bool, extra: Json = None) -> None:
        """Save, on all ranks, and remove saves that need not be kept; ``extra`` comes back in the attribute."""
        if self._tidies:
            self._folder.mkdir(exist_ok=True)
        # As text, since a loss may be nan, which the manifest cannot hold.
        content = {"position": json.dumps(dataclasses.asdict(position))}
        path = self._path(pipe.num_updates)
        if self._tidies and (path.is_symlink() or (path.exists() and not is_ours(path))):
            # Not a save; `resume` has passed over it.
            path.rename(path.with_name(f"aside-{path.name}-{time.time_ns()}"))
        pipe.save(path, portable=portable, extra=content if extra is None else {**content, "extra": extra})
        self._saved_at = time.monotonic()
        if self._tidies:
            unfinished = self._folder.glob(".update-*")  # left by a process that died while it saved
            best = self._path(position.best[0]) if position.best else None
            for path in (*unfinished, *(old for old in self._all()[self._keep_last :] if old != best)):
                shutil.rmtree(path, ignore_errors=True)

    def resume(
        self, pipe: Pipeline, *, num_replicas: int, check: Callable[[Position], None] = lambda position: None
    ) -> tuple[Position, list[str]]:
        """Load the newest save that is whole and fits.

        The options of the optimizers, learning rates included, stay those that ``pipe`` was made with.

        Args:
            pipe: pipeline to load the save into.
            num_replicas: number of replicas of the run.
            check: function that raises ValueError for a position from which the run cannot continue.

        Returns:
            The position of the run, and notes for the user.

        Raises:
            CheckpointError: no save fits.
        """
        notes: list[str] = []
        shape = (pipe.method.name, pipe.num_stages, pipe.num_microbatches, pipe.microbatch_samples, num_replicas)
        options = list(map(state_dict.options_of, pipe.optimizers))
        for path, save, position in self._readable(notes, check):
            counts = save.num_stages, save.num_microbatches, save.microbatch_samples, save.num_replicas
            saved_shape = (save.method, *counts)
            if save.kind == "exact" and saved_shape != shape:
                notes.append(
                    f"{path.name} holds what was in flight in another pipeline; the last portable save is taken"
                )
                continue
            try:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    pipe.load(path)
            except PartlyLoadedError:
                raise
            except CheckpointError as error:
                notes.append(f"{path.name} is left aside: {error}")
                continue
            notes += [str(warning.message) for warning in caught if not isinstance(warning.message, OtherOptions)]
            for optimizer, scheduler, made_with in zip(pipe.optimizers, pipe.lr_schedulers, options, strict=True):
                state_dict.set_options(optimizer, scheduler, made_with)
            how = "what was in flight included" if save.kind == "exact" else "from a portable save"
            notes.append(f"going on after update {pipe.num_updates}, {how}")
            self.extra = save.extra.get("extra")
            return position, notes
        raise CheckpointError(
            f"{self._folder.parent} has no save to go on from" + "".join(f"; {note}" for note in notes)
        )

    def _readable(
        self, notes: list[str], check: Callable[[Position], None]
    ) -> Iterator[tuple[Path, Checkpoint, Position]]:
        """The saves with a whole manifest; `Pipeline.load` checks the other files."""
        for path in self._all():
            try:
                save = glance(path)
                position = Position.read(save.extra.get("position") if isinstance(save.extra, dict) else None)
                if path != self._path(save.num_updates):
                    raise ValueError(f"it says that it is of update {save.num_updates}")
                check(position)
            except ValueError as error:
                notes.append(f"{path.name} is left aside: {error}")
            else:
                yield path, save, position

    def _all(self) -> list[Path]:
        """The paths of all saves, newest first."""
        return sorted(self._folder.glob("update-*"), reverse=True)

    def _path(self, update: int) -> Path:
        return self._folder / f"update-{update:08d}"
