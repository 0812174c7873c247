"""What the options of the command line take, beside plain numbers and words."""

from __future__ import annotations

import re
from typing import Any, ClassVar

import click

from ..did_you_mean import unknown


class Name(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """One of some names; a wrong one is answered with the nearest right one."""

    def __init__(self, label: str, names: tuple[str, ...]) -> None:
        self.name = label
        self.names = names

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return f"[{'|'.join(self.names)}]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value in self.names:
            return str(value)
        self.fail(unknown(self.name, value, self.names), param, ctx)


class Numbers(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """Whole numbers: ``1,2,4``, or a list in a file."""

    def __init__(self, what: str, example: str) -> None:
        self.what, self.name = what, example

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        parts = value.split(",") if isinstance(value, str) else value
        try:
            return tuple(int(part) for part in parts)
        except (TypeError, ValueError):
            self.fail(f"{value!r} is no list of {self.what} like {self.name}", param, ctx)


class Names(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """Some of the names: ``bp,dtrp``."""

    def __init__(self, label: str, names: tuple[str, ...]) -> None:
        self.name = label
        self.names = names

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        words = tuple(word.strip() for word in value.split(",")) if isinstance(value, str) else tuple(value)
        for word in words:
            if word not in self.names:
                self.fail(unknown(self.name, word, self.names), param, ctx)
        return words


class Count(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A whole number, or a word that is checked later."""

    def __init__(self, word: str) -> None:
        self.name = f"number|{word}"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        text = str(value).strip()
        try:
            return int(text)
        except ValueError:
            return text


class Bytes(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A number of bytes: ``800MB``, ``2GiB``, ``1000000``."""

    name = "size"
    _UNITS: ClassVar[dict[str, int]] = {
        "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
        "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
    }  # fmt: skip

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([A-Za-z]*)\s*", str(value))
        if not match or match[2].lower() not in self._UNITS:
            self.fail(f"{value!r} is no size like 800MB or 2GiB", param, ctx)
        return int(float(match[1]) * self._UNITS[match[2].lower()])


class Sizes(Bytes):
    """Bytes: one number, or one for each hop: ``1MB,4MB``."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, int):
            return value
        sizes = [super(Sizes, self).convert(part, param, ctx) for part in str(value).split(",")]
        return sizes[0] if len(sizes) == 1 else sizes


class Times(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """Seconds: one number, or one for each stage or hop: ``0.1,0.2,0.1``."""

    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | list[float]:
        if isinstance(value, float):
            return value
        try:
            numbers = [float(part) for part in str(value).split(",")]
        except ValueError:
            self.fail(f"{value!r} is no number of seconds, nor a list like 0.1,0.2,0.1", param, ctx)
        return numbers[0] if len(numbers) == 1 else numbers
