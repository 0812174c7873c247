"""Tells several callbacks, in order, and names one of the user's that fails."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..results import EpochMetrics, TrainResult
from ..user_code import UserCodeError, call_function, explained, load_function
from .protocol import Callback, RunStart, Update

_METHODS = ("start", "update", "epoch", "save", "finish")


class Named(Callback):
    """A callback of the user's, whose exceptions name it.

    Args:
        reference: what ``--callback`` names.
        callback: an object with some of the methods of `Callback`.
    """

    def __init__(self, reference: str, callback: Any) -> None:
        self._reference, self._callback = reference, callback

    def start(self, run: RunStart) -> None:
        self._tell("start", run)

    def update(self, update: Update) -> None:
        self._tell("update", update)

    def epoch(self, metrics: EpochMetrics, stages: Mapping[str, float]) -> None:
        self._tell("epoch", metrics, stages)

    def save(self, update: int) -> None:
        self._tell("save", update)

    def finish(self, result: TrainResult | None) -> None:
        self._tell("finish", result)

    def _tell(self, method: str, *arguments: Any) -> None:
        act = getattr(self._callback, method, None)
        if act is None:
            return
        try:
            act(*arguments)
        except Exception as error:
            raise UserCodeError(
                f"--callback {self._reference}, {method}: {explained(error, self._reference)}"
            ) from error


def load_callback(reference: str) -> Named:
    """The callback that an option names: a class that is made without arguments, or a function that returns one.

    Raises:
        ValueError: it cannot be loaded, or made, or has none of the methods.
    """
    made = load_function("--callback", reference)
    if inspect.isclass(made) or not _is_callback(made):
        made = call_function("--callback", reference, {})
    if not _is_callback(made):
        raise ValueError(
            f"--callback {reference} is a {type(made).__name__} without start, update, epoch, save and finish; name a subclass of "
            "dtrp.Callback, or a function that returns one"
        )
    return Named(reference, made)


def _is_callback(value: Any) -> bool:
    return any(callable(getattr(value, method, None)) for method in _METHODS)


class Told(Callback):
    """All callbacks of a run.

    Args:
        callbacks: callbacks in the order in which they are told.
    """

    def __init__(self, callbacks: Iterable[Callback]) -> None:
        self._callbacks: Sequence[Callback] = tuple(callbacks)
        self._begun: list[Callback] = []  # those that have been told of the start, and not of the end

    def start(self, run: RunStart) -> None:
        for callback in self._callbacks:
            self._begun.append(callback)
            callback.start(run)

    def update(self, update: Update) -> None:
        for callback in self._callbacks:
            callback.update(update)

    def epoch(self, metrics: EpochMetrics, stages: Mapping[str, float]) -> None:
        for callback in self._callbacks:
            callback.epoch(metrics, stages)

    def save(self, update: int) -> None:
        for callback in self._callbacks:
            callback.save(update)

    def finish(self, result: TrainResult | None) -> None:
        """Tell all that have been told of the start, whatever others raise; the first exception is raised then."""
        failed: list[Exception] = []
        while self._begun:
            try:
                self._begun.pop(0).finish(result)
            except Exception as error:
                failed.append(error)
        if failed:
            raise failed[0]

    def fail(self) -> list[str]:
        """Tell all that the run has not come to its end; messages about those that fail at that."""
        messages = []
        while self._begun:
            try:
                self.finish(None)
            except Exception as error:
                messages.append(f"{error}")
        return messages
