"""The end of a run that was asked to stop."""

from __future__ import annotations


class Stopped(BaseException):
    """A run was asked to stop, and has. Like `KeyboardInterrupt` no `Exception`, so handlers that note errors let it pass.

    Args:
        message: the line for the user.
        code: exit code of the command.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code
