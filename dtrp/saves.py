"""The saves of a run on disk: when one is due, which are kept, and from which one goes on.

RUN/saves/update-00000120/      in the middle of an epoch: exact, what is in flight too
RUN/saves/update-00000200/      at an epoch's end, when nothing is in flight: portable, for any number of stages
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .pipeline import Pipeline
from .saving import Checkpoint, CheckpointError, inspect


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


class Saves:
    """Those of one run.

    Args:
        run: its folder.
        keep_last: how many of the last ones are kept; the best one is kept beside them.
        tidies: whether this process, of those that train together, makes the folder and lets go of old ones.
    """

    def __init__(self, run: Path, keep_last: int, *, tidies: bool = True) -> None:
        self._tidies = tidies
        self._folder = run / "saves"
        self._keep_last = keep_last

    def write(self, pipe: Pipeline, position: Position, *, portable: bool) -> None:
        """Save, on all ranks, and let go of what need not be kept."""
        if self._tidies:
            self._folder.mkdir(exist_ok=True)
        # As text, since a loss may be nan, which JSON has not.
        extra = {"position": json.dumps(dataclasses.asdict(position))}
        pipe.save(self._path(pipe.num_updates), portable=portable, extra=extra)
        if self._tidies:
            best = self._path(position.best[0]) if position.best else None
            for path in self._all()[self._keep_last :]:
                if path != best:
                    shutil.rmtree(path, ignore_errors=True)

    def resume(self, pipe: Pipeline, *, num_replicas: int) -> tuple[Position, list[str]]:
        """Load the newest save that is whole and fits; where the run was, and what there is to say about it.

        Raises:
            CheckpointError: there is none.
        """
        notes: list[str] = []
        own = (pipe.method.name, pipe.num_stages, pipe.num_microbatches, num_replicas)
        for path, found in self._usable(notes):
            theirs = (found.method, found.num_stages, found.num_microbatches, found.num_replicas)
            if found.kind == "exact" and theirs != own:
                notes.append(
                    f"{path.name} holds what was in flight in another pipeline; the last portable save is taken"
                )
                continue
            try:
                extra = pipe.load(path)
            except CheckpointError as error:
                notes.append(f"{path.name} is left aside: {error}")
                continue
            said = json.loads(extra["position"])
            position = Position(**{**said, "best": tuple(said["best"]) if said["best"] else None})
            how = "what was in flight included" if found.kind == "exact" else "from a portable save"
            notes.append(f"going on after update {pipe.num_updates}, {how}")
            return position, notes
        raise CheckpointError(
            f"{self._folder.parent} has no save to go on from" + "".join(f"; {note}" for note in notes)
        )

    def _usable(self, notes: list[str]) -> Iterator[tuple[Path, Checkpoint]]:
        for path in self._all():
            try:
                found = inspect(path)
                json.loads(found.extra["position"])
            except (CheckpointError, TypeError, KeyError, ValueError) as error:
                notes.append(f"{path.name} is left aside: {error}")
            else:
                yield path, found

    def _all(self) -> list[Path]:
        """Newest first."""
        return sorted(self._folder.glob("update-*"), reverse=True)

    def _path(self, update: int) -> Path:
        return self._folder / f"update-{update:08d}"
