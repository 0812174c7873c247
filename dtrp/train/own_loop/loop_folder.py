"""`RunFolder`: the folder that `dtrp report` reads, for a training loop of the user's."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from torch import Tensor

from ...atomic_file import whole_file
from ...methods import Method, get_method, list_methods
from ...pipeline import Pipeline
from ...typing import Json
from ...validation import is_number, is_whole, unknown, whole
from .. import run_folder
from ..autosave import Position, Saves
from ..config import CHOICES, PROGRAM
from ..results import EpochMetrics, described_run, summarize_stages

T = TypeVar("T")
_UPDATES = "updates.jsonl"
# Settings that the pipeline says, of which all but the method may be others when a run goes on.
_OF_THE_PIPELINE = ("method", "prediction", "ahead", "order", "stages", "num-microbatches", "microbatch-samples")


class _Update(NamedTuple):
    """An update that has not been written down; the loss may still be computed."""

    number: int
    loss: Tensor
    samples: int
    values: dict[str, float]

    def line(self) -> dict[str, Json]:
        return {"update": self.number, "loss": float(self.loss), "samples": self.samples, **self.values}


class RunFolder:
    """The folder of a run of a training loop of one's own: what `dtrp report` shows of it, and saves to go on from.

    It is in the form of ``dtrp train --out``: ``config``, ``metrics.jsonl`` (a line an epoch), ``model.pt`` after the last
    epoch, ``saves``, and at the end ``summary.json``; and ``updates.jsonl`` has a line an update. Every rank makes it and
    calls the same methods in the same order. The first rank writes; a save is written by all ranks, which see the same
    file system. A run that was killed and goes on ends with the weights and the lines, but for times, of one that was
    not::

        run = dtrp.RunFolder("runs/mine", pipe, settings={"lr": 0.1})
        state = run.load()  # None: a new run
        if state is not None:
            sampler.load_state_dict(state)
        while sampler.epoch < 10:
            for x, y in loader:
                run.update(pipe.step(x, y), len(x))
                sampler.advance(len(x))
                if pipe.num_updates % 100 == 0:
                    run.save(sampler.state_dict())
            pipe.flush()
            run.epoch(*evaluated(pipe))  # (loss, accuracy) on test data
            run.save(sampler.state_dict())
        run.finish()

    Args:
        path: the folder. A run with the same settings that is there is gone on with, from its last save.
        pipe: the pipeline that trains.
        settings: what the report shows of the run, and tells runs apart by: text, numbers, booleans and lists of them, by
            name. What ``dtrp train`` has options for is best named like them: ``data``, ``model``, ``lr``,
            ``batch-size``. What the pipeline knows (method, stages, micro-batches) is added.
        overwrite: replace the run that is there, with its saves.
        keep_last: the number of latest saves to keep; a save of the best epoch is kept as well.
        best: whether the ``"highest"`` or the ``"lowest"`` test accuracy is the best.

    Attributes:
        path: the folder.
        notes: what `load` has to say of the saves.

    Raises:
        TypeError, ValueError, OSError: settings that cannot be written down, or a folder that may not be written to,
            with what to change; on every rank.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        pipe: Pipeline,
        *,
        settings: Mapping[str, Json] | None = None,
        overwrite: bool = False,
        keep_last: int = 2,
        best: Literal["highest", "lowest"] = "highest",
    ) -> None:
        if best not in CHOICES["best"]:
            raise ValueError(unknown("best", best, CHOICES["best"]))
        self._settings = {"data": "own", "model": "own", "seed": pipe.seed, **_checked(settings or {}), **_of(pipe)}
        self._text = _as_yaml({PROGRAM: shlex.join(["python", *sys.argv]), **self._settings})
        self.path = Path(path).expanduser().absolute()
        self.notes: list[str] = []
        self._pipe, self._sign = pipe, -1 if best == "lowest" else 1
        mine = uuid.uuid4().hex
        ranks = pipe.gather(mine)  # replica by replica, stage by stage
        self._writes = ranks[0] == mine
        self._teller = 0 if len(ranks) == 1 else pipe.num_stages - 1  # the rank of the first replica that has the loss
        self._tells = ranks[self._teller] == mine
        self._num_replicas = max(1, len(ranks) // pipe.num_stages)
        self._saves = Saves(self.path, whole("keep_last", keep_last), tidies=self._writes)
        self._goes_on = self._by_writer(lambda: self._open(overwrite=overwrite, seed_given="seed" in (settings or {})))
        self._position = Position()
        self._pending: list[_Update] = []
        self._began = self._since = self._last = time.perf_counter()

    @property
    def num_epochs(self) -> int:
        """The number of finished epochs."""
        return self._position.epoch

    @property
    def metrics(self) -> list[dict[str, Json]]:
        """The lines of the finished epochs; the same on every rank."""
        return [metrics.line() for metrics in self._position.metrics]

    @property
    def best(self) -> tuple[int, float] | None:
        """(number of updates, accuracy) of the best epoch; None before the first. The same on every rank."""
        return self._position.best

    def load(self) -> Json:
        """Go on from the newest save that is whole and fits the pipeline: `Pipeline.load`, and the lines of then.

        Returns:
            The ``extra`` that was given to `save`; None for a new run.

        Raises:
            dtrp.CheckpointError: no save fits; on every rank.
        """
        if not self._goes_on:
            return None
        self._position, notes = self._saves.resume(self._pipe, num_replicas=self._num_replicas)
        self.notes += notes
        self._by_writer(self._go_on)
        self._goes_on, self._pending = False, []
        self._began = time.perf_counter() - self._position.elapsed_s
        self._since = self._last = time.perf_counter()
        return self._saves.extra

    def update(self, loss: Tensor | None, num_samples: int, **values: float) -> None:
        """Note a step. It is written down with the next `save` or `epoch`, and an accelerator is not waited for until then.

        Args:
            loss: what `Pipeline.step` has returned.
            num_samples: samples of the mini-batch, in all replicas.
            values: other numbers for its line of ``updates.jsonl``, such as the learning rate.
        """
        self._check_loaded()
        self._last = time.perf_counter()
        if self._tells:
            if loss is None:
                raise TypeError("loss is None; pass what pipe.step() has returned on this rank")
            self._pending.append(
                _Update(self._pipe.num_updates, loss.detach(), whole("num_samples", num_samples), values)
            )

    def epoch(
        self, test_loss: float | Tensor | None, test_accuracy: float | Tensor | None, **scores: float | Tensor | None
    ) -> dict[str, Json]:
        """End an epoch, after ``pipe.flush()``: write its line, and ``model.pt``.

        Args:
            test_loss: on data that the run does not learn from. It matters where the output of `Pipeline.infer` is known,
                on the last rank of the first replica, and so do the other numbers.
            test_accuracy: of the same data, in 0..1, or whatever the run shall be judged by; nan where there is none.
            scores: other numbers for the line, by name.

        Returns:
            The line, on every rank: what decides of the run is the same on all.

        Raises:
            TypeError, ValueError, OSError: no numbers, no update in the epoch, or a file that cannot be written; on
                every rank.
            RuntimeError: micro-batches are in flight.
        """
        self._check_loaded()
        if any(self._pipe.gather(self._pipe.in_flight)):
            raise RuntimeError("micro-batches are in flight; call pipe.flush() before the test and epoch()")
        given = {"test_loss": test_loss, "test_accuracy": test_accuracy, **scores}
        numbers = self._take({name: _number(value) for name, value in given.items()})
        if wrong := [name for name, number in numbers.items() if number is None]:
            raise TypeError(
                f"{wrong[0]} is no number on the rank that hosts the last stage; pass a float, or a tensor with one"
            )
        position = self._position
        if not position.samples:
            raise ValueError("no update since the epoch before; call update() after every step")
        metrics = EpochMetrics(
            epoch=position.epoch + 1,
            update=self._pipe.num_updates,
            train_loss=position.loss_sum / max(1.0, position.learned),
            test_loss=numbers.pop("test_loss"),
            test_accuracy=numbers.pop("test_accuracy"),
            samples_per_s=position.samples / max(position.trained_s, 1e-9),
            elapsed_s=position.elapsed_s,
            scores=numbers,
        )
        model = self._pipe.model_state_dict_on_first()
        self._by_writer(lambda: self._files.write(self._text, metrics.line(), model or {}))
        best = position.best
        if best is None or self._sign * metrics.test_accuracy > self._sign * best[1]:
            best = metrics.update, metrics.test_accuracy
        epochs = [*position.metrics, metrics]
        self._position = Position(metrics.epoch, elapsed_s=position.elapsed_s, metrics=epochs, best=best)
        self._since = time.perf_counter()
        return metrics.line()

    def save(self, extra: Json = None, *, portable: bool = False) -> None:
        """Save, as `Pipeline.save` does, with what is in flight or flushed first; older saves than are kept are removed.

        Args:
            extra: what `load` is to return, as JSON has it: the sampler's state, what the loop has counted. That of the
                first rank is kept.
            portable: flush, and save what does not depend on the number of stages.

        Raises:
            dtrp.CheckpointError: it could not be written; on every rank, and the run can go on.
        """
        self._check_loaded()
        self._take({})
        self._saves.write(self._pipe, self._position, portable=portable, extra=extra)
        self._since = time.perf_counter()

    def finish(self) -> None:
        """End the run: write ``summary.json``, by which the report knows it as finished.

        Raises:
            ValueError: it has no epoch; on every rank.
        """
        self._check_loaded()
        if not self._position.metrics:
            raise ValueError("the run has no epoch; call epoch() at the end of each")
        ranks = self._pipe.gather(summarize_stages(self._pipe))
        stages = {stage.stage: stage for rank in reversed(ranks) for stage in rank}  # the first replica's remain

        def write() -> None:
            samples = [json.loads(line)["samples"] for line in (self.path / _UPDATES).read_text().splitlines()]
            config = {name.replace("-", "_"): value for name, value in self._settings.items()}
            mean = sum(samples) / max(1, len(samples))
            self._files.finish(
                described_run(config, self._position.metrics, [stages[k] for k in sorted(stages)], batch_size=mean)
            )

        self._by_writer(write)

    # -- the files, on the first rank ---------------------------------------------------------------------

    def _open(self, *, overwrite: bool, seed_given: bool) -> bool:
        """Make the folder, or find a run in it; whether there is one to go on with."""
        has_content = self.path.is_dir() and any(self.path.iterdir())
        if has_content and not overwrite:
            if not all((self.path / name).is_file() for name in ("config", "metrics.jsonl")):
                raise ValueError(f"{self.path} exists and is no run; choose another name")
            if other := self._differing(seed_given=seed_given):
                raise ValueError(
                    f"{self.path} holds a run of other settings ({other}); choose another name, or pass overwrite=True"
                )
            if any(self.path.glob("saves/update-*")):
                self._files = run_folder.RunFolder(str(self.path), overwrite=False, resume=True)
                return True
            if (self.path / "metrics.jsonl").stat().st_size:
                raise ValueError(
                    f"{self.path} holds a run without a save to go on from; choose another name, or pass overwrite=True"
                )
        try:
            self._files = run_folder.RunFolder(str(self.path), overwrite=True)
        except ValueError as error:
            raise ValueError(str(error).removeprefix("--out ")) from None
        self._files.begin(self._text)
        (self.path / _UPDATES).touch()
        return False

    def _differing(self, *, seed_given: bool) -> str:
        """The differences between the settings of the run that is there and these."""
        import yaml

        try:
            begun = yaml.safe_load((self.path / "config").read_text())
        except (UnicodeDecodeError, yaml.YAMLError):
            begun = None
        if not isinstance(begun, dict) or PROGRAM not in begun:
            return "none of a training loop of one's own"
        passed = {PROGRAM, *_OF_THE_PIPELINE[1:]} | (set() if seed_given else {"seed"})
        names = [name for name in {**begun, **self._settings} if name not in passed]
        differing = [name for name in names if begun.get(name) != self._settings.get(name)]
        return ", ".join(f"{name} {begun.get(name)} and not {self._settings.get(name)}" for name in differing)

    def _go_on(self) -> None:
        """Drop what has been written after the save."""
        self._files.go_on(self._text, self.metrics)
        path = self.path / _UPDATES
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        kept = [line for line in lines if _number_of(line) <= self._pipe.num_updates]
        with whole_file(path) as file:
            file.write("".join(kept).encode())

    def _append(self, updates: list[dict[str, Json]]) -> None:
        with open(self.path / _UPDATES, "a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in updates))

    # -- what the ranks tell each other -------------------------------------------------------------------

    def _take(self, numbers: dict[str, float | None]) -> dict[str, float]:
        """Take the updates since the last call into the position, on every rank, and write them down.

        Returns:
            The numbers of the rank that has the loss.
        """
        told = None
        if self._tells:
            times = self._last - self._since, time.perf_counter() - self._began
            told = [update.line() for update in self._pending], numbers, times
        updates, numbers, (trained_s, elapsed_s) = self._pipe.gather(told)[self._teller]  # type: ignore[misc]
        self._pending = []
        position = self._position
        for line in updates:
            position.samples += line["samples"]
            if math.isfinite(line["loss"]):
                position.loss_sum += line["loss"] * line["samples"]
                position.learned += line["samples"]
        position.trained_s += max(0.0, trained_s)
        position.elapsed_s = elapsed_s
        self._since = self._last = time.perf_counter()
        self._by_writer(lambda: self._append(updates))
        return numbers  # type: ignore[return-value]

    def _by_writer(self, job: Callable[[], T]) -> T:
        """What ``job`` returns on the first rank; if it fails there, every rank raises."""
        told: tuple[T | None, str | None, bool] | None = None
        failed: Exception | None = None
        if self._writes:
            try:
                told = job(), None, False
            except (OSError, ValueError) as error:
                failed, told = error, (None, str(error), isinstance(error, OSError))
        result = self._pipe.gather(told)[0]
        assert result is not None
        value, reason, is_os_error = result
        if failed is not None:
            raise failed
        if reason is not None:
            raise (OSError if is_os_error else ValueError)(reason)
        return value  # type: ignore[return-value]

    def _check_loaded(self) -> None:
        if self._goes_on:
            raise RuntimeError(
                f"{self.path} holds a run that this one goes on with; call load() first, or pass overwrite=True"
            )


def _checked(settings: Mapping[str, Json]) -> dict[str, Json]:
    """The caller's settings by the names of options.

    Raises:
        TypeError, ValueError: what cannot stand in a file of settings.
    """
    checked: dict[str, Json] = {}
    for key, value in settings.items():
        name = str(key).replace("_", "-")
        if name in (PROGRAM, *_OF_THE_PIPELINE):
            raise ValueError(f"settings has {key!r}, which the pipeline says; leave it out")
        entries = list(value) if isinstance(value, (list, tuple)) else value
        for entry in entries if isinstance(entries, list) else [entries]:
            if not (entry is None or isinstance(entry, (str, bool)) or is_number(entry)):
                raise TypeError(
                    f"settings[{key!r}] holds a {type(entry).__name__}; pass text, finite numbers, booleans, or lists of them"
                )
        if name == "seed" and not is_whole(entries, 0):
            raise ValueError(f"settings['seed'] is {entries!r}; pass a whole number from 0 on")
        if entries is not None:
            checked[name] = entries
    return checked


def _of(pipe: Pipeline) -> dict[str, Json]:
    """What a pipeline says of a run: only what is not the method's own."""
    row = pipe.method
    usual = get_method(row.name) if row.name in list_methods() else row
    settings = {"method": row.name, "stages": pipe.num_stages, "num-microbatches": pipe.num_microbatches}
    if pipe.microbatch_samples > 1:
        settings["microbatch-samples"] = pipe.microbatch_samples
    return settings | _changed(row, usual)


def _changed(row: Method, usual: Method) -> dict[str, Json]:
    changed: dict[str, Json] = {}
    if row.predict is not usual.predict and row.predict != usual.predict:
        known = row.predict is None or isinstance(row.predict, str)
        changed["prediction"] = (row.predict or "none") if known else type(row.predict).__name__
    if row.ahead != usual.ahead:
        changed["ahead"] = row.ahead
    if row.backward_first != usual.backward_first:
        changed["order"] = "backward-first" if row.backward_first else "forward-first"
    return changed


def _as_yaml(settings: dict[str, Json]) -> str:
    try:
        import yaml
    except ImportError as error:
        raise ImportError("the folder of a run holds YAML; install the extra: pip install 'dtrp[cli]'") from error
    text: str = yaml.safe_dump(settings, sort_keys=False, width=math.inf)
    return text


def _number(value: float | Tensor | None) -> float | None:
    """A number from the caller; None for anything else."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        return None


def _number_of(line: str) -> float:
    """The update of a line; infinity for half a line, of a process that was killed."""
    try:
        return float(json.loads(line)["update"])
    except (ValueError, KeyError, TypeError):
        return math.inf
