"""The end of a run that was asked to stop."""

from __future__ import annotations


class Stopped(BaseException):
    """The run was asked to stop and did. No error, as `KeyboardInterrupt` is none: who notes errors and goes on lets it pass."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code
