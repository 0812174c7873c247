"""``dtrp`` and ``python -m dtrp``: the command line, or what it lacks."""

import sys


def main() -> None:
    """Run the command line; exit code 2 and one line on stderr for a user's mistake."""
    try:
        from .cli import run
    except ModuleNotFoundError as error:
        package = (error.name or "dtrp").split(".")[0]
        if package == "dtrp":
            raise
        sys.exit(_missing(package))
    sys.exit(run())


def _missing(name: str) -> int:
    print(f"dtrp: the command line needs {name}, which is not installed; pip install 'dtrp[cli]'", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
