"""How commands end before their time: with a user's mistake, or because they were asked to stop."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

import click


class Stopped(BaseException):
    """A run was asked to stop, and has. Not an `Exception`, so that handlers of errors let it pass.

    Args:
        message: the line for the user.
        code: exit code of the command.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@contextmanager
def mistakes(*kinds: type[Exception]) -> Iterator[None]:
    """Report exceptions of these kinds as a user's mistake: their message, and exit code 2."""
    try:
        yield
    except kinds as error:
        raise click.ClickException(str(error)) from error


@contextmanager
def lost_terminal_ignored() -> Iterator[None]:
    """Drop what is written to a terminal that has been closed, from now on; the run goes on, or saves."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        with open(os.devnull, "wb") as nowhere:
            for standard_output in (1, 2):
                os.dup2(nowhere.fileno(), standard_output)
