"""The command line: ``dtrp`` and its commands."""

from __future__ import annotations

import sys

import click
import rich  # noqa: F401  (commands import it when they run; a missing package is to be reported at once)

from .. import __version__
from ..validation import nearest
from .comparing import compare, report
from .endings import Stopped, lost_terminal_ignored
from .planning import plan
from .schedules import methods, schedule, simulate
from .training import demo, train
from .using import evaluate, export, predict

__all__ = ["Stopped", "cli", "run"]


def run(arguments: list[str] | None = None) -> int:
    """Run a command, and return its exit code. A user's mistake gives a line on stderr and code 2."""
    try:
        cli.main(arguments, prog_name="dtrp", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr)
        return 2
    except Stopped as error:
        return _complain(str(error), error.code)
    except click.NoSuchOption as error:
        near = nearest(error.option_name, error.possibilities or ())
        return _complain(f"no such option: {error.option_name}" + (f"; did you mean {near!r}?" if near else ""))
    except click.ClickException as error:
        return _complain(error.format_message())
    except (click.Abort, KeyboardInterrupt):
        return _complain("interrupted", 130)
    except BrokenPipeError:  # the reader of a pipe has seen enough
        sys.stdout = None
    return 0


def _complain(text: str, code: int = 2) -> int:
    with lost_terminal_ignored():
        print(f"dtrp: {' '.join(text.split())}", file=sys.stderr, flush=True)
    return code


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True})
@click.version_option(__version__, prog_name="dtrp")
def cli() -> None:
    """Train a network that is spread over several workers, without waiting."""


for command in (train, compare, report, evaluate, predict, export, demo, schedule, plan, simulate, methods):
    cli.add_command(command)
