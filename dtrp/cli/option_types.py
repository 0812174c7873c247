"""Types of command-line options: names, lists of names and numbers, sizes, and times."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from ..train.user_code import is_reference
from ..validation import unknown

T = TypeVar("T")
_BYTES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
          "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}  # fmt: skip


class Parsed(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """Values that a function parses.

    Args:
        name: placeholder of a value in the help, in lower case.
        parse: function from the text, or from a value in a file; its ValueError is the message about a wrong value.
    """

    def __init__(self, name: str, parse: Callable[[Any], Any]) -> None:
        self.name, self.parse = name, parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self.parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Name(Parsed):
    """A name out of several; a wrong one is answered with the nearest right one."""

    def __init__(self, label: str, names: Sequence[str]) -> None:
        super().__init__(label, lambda value: _known(label, value, names))
        self.names = names

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return f"[{'|'.join(self.names)}]"


class NameOrReference(Name):
    """A name out of several, or one with a colon: a function of the user's, or of another library."""

    def __init__(self, label: str, names: Sequence[str]) -> None:
        Parsed.__init__(
            self, label, lambda value: str(value) if is_reference(str(value)) else _known(label, value, names)
        )
        self.names = names

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return f"[{'|'.join(self.names)}|FUNCTION]"


def words(example: str) -> Parsed:
    """Several words: ``a,b``, or a list in a file."""
    return Parsed(example, lambda value: tuple(map(str, _parts(value))))


def names(label: str, known: Sequence[str]) -> Parsed:
    """Several names: ``bp,dtrp``."""
    return Parsed(label, lambda value: tuple(_known(label, word, known) for word in _parts(value)))


def numbers(what: str, example: str, kind: Callable[[Any], T] = int) -> Parsed:  # type: ignore[assignment]
    """Several numbers: ``1,2,4``, or a list in a file."""

    def parse(value: Any) -> tuple[T, ...]:
        try:
            return tuple(map(kind, _parts(value)))
        except (TypeError, ValueError):
            raise ValueError(f"{value!r} is no list of {what} like {example}") from None

    return Parsed(example, parse)


def count(word: str) -> Parsed:
    """A whole number, or a word that is checked later."""

    def parse(value: Any) -> int | str:
        text = str(value).strip()
        try:
            return int(text)
        except ValueError:
            return text

    return Parsed(f"number|{word}", parse)


def _bytes(value: Any) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([A-Za-z]*)\s*", str(value))
    if not match or match[2].lower() not in _BYTES:
        raise ValueError(f"{value!r} is no size like 800MB or 2GiB")
    return int(float(match[1]) * _BYTES[match[2].lower()])


def _seconds(value: Any) -> float | list[float]:
    try:
        return _single([float(part) for part in str(value).split(",")])
    except ValueError:
        raise ValueError(f"{value!r} is no number of seconds, nor a list like 0.1,0.2,0.1") from None


# A number of bytes: ``800MB``, ``2GiB``, ``1000000``.
SIZE = Parsed("size", _bytes)
# Bytes: a number, or one for each hop: ``1MB,4MB``.
SIZES = Parsed("size", lambda value: _single([_bytes(part) for part in str(value).split(",")]))
# Seconds: a number, or one for each stage or hop: ``0.1,0.2,0.1``.
TIMES = Parsed("seconds", _seconds)
# A number of updates, or a time, which is checked later.
INTERVAL = Parsed("updates|time", str)


def _known(label: str, value: Any, known: Sequence[str]) -> str:
    if value not in known:
        raise ValueError(unknown(label, value, known))
    return str(value)


def _parts(value: Any) -> Sequence[Any]:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _single(values: list[T]) -> T | list[T]:
    """The value of a list with a single value; else the list."""
    return values[0] if len(values) == 1 else values
