"""What went wrong in a stage, and where; or on another rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .schedule import Action


def message_of(error: BaseException) -> str:
    """``str(error)``, whatever a class of the caller's makes of that."""
    try:
        return str(error)
    except Exception as failed:
        return f"<its message cannot be shown: {type(failed).__name__}>"


class StageError(RuntimeError):
    """What went wrong in a stage: which one, at which micro-batch, and (``__cause__``) why.

    Attributes:
        stage, microbatch, minibatch: where; ``microbatch`` is None in an update.
    """

    def __init__(self, stage: int, action: Action, minibatch: int, cause: BaseException) -> None:
        self.stage = stage
        self.minibatch = minibatch
        self.microbatch = None if action.kind == "U" else action.index
        doing = {
            "F": f"forward of micro-batch {action.index}",
            "B": f"backward of micro-batch {action.index}",
            "R": f"backward of micro-batch {action.index}, its forward repeated",
            "I": f"backward of micro-batch {action.index}, first part",
            "W": f"backward of micro-batch {action.index}, second part",
            "U": "update",
        }[action.kind]
        super().__init__(
            f"stage {stage}, {doing} (mini-batch {minibatch}): {type(cause).__name__}: {message_of(cause)}"
        )

    @classmethod
    def told(cls, text: str, stage: int, microbatch: int | None, minibatch: int) -> StageError:
        """What another worker's StageError said, without its cause."""
        error = cls.__new__(cls)
        RuntimeError.__init__(error, text)
        error.stage, error.microbatch, error.minibatch = stage, microbatch, minibatch
        return error


class PlanError(ValueError):
    """A plan that cannot be made, with what would be possible; or a plan that does not fit."""


class WorkerError(RuntimeError):
    """Another rank ended the run; the message names it and says why."""


class WaitTimeoutError(WorkerError, TimeoutError):
    """A rank waited longer than ``timeout_s`` for another."""


@contextmanager
def naming(stage: int, action: Action, minibatch: int) -> Iterator[None]:
    """The context in which an exception other than a `WorkerError` becomes a `StageError`, which says where."""
    try:
        yield
    except (StageError, WorkerError):
        raise
    except Exception as error:
        raise StageError(stage, action, minibatch, error) from error
