"""Pickles from strangers: read without looking up, calling or changing anything that they name."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

# The extension registry, whose objects may come without find_class; bytearrays, made as long as the file says; and
# sets, whose members are hashed, where the hash of a tuple that is nested deeply overflows the stack and ends the
# process.
_UNREAD = (
    pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.BYTEARRAY8, pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET,
)  # fmt: skip


class ForbiddenName(Exception):
    """A pickle asks for something by name that it has no business with."""


class Record:
    """Stands for an object; keeps what that would be made of, for the reader to check.

    A stand-in takes its state by a ``__setstate__``: without that, BUILD would write attributes, of a class too.
    """

    arguments: tuple[Any, ...] = ()  # also where a forged pickle makes one without __init__
    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _plain_keys(opcode: bytes) -> Callable[[Any], None]:
    """How ``opcode`` is read, but for keys that are tuples, the hash of which can end the process or take for ever."""
    read = pickle._Unpickler.dispatch[opcode[0]]

    def checked(reader: Any) -> None:
        keys = reader.stack[-2:-1] if opcode == pickle.SETITEM else reader.stack[::2]
        if any(isinstance(key, tuple) for key in keys):
            raise pickle.UnpicklingError("a key is a tuple")
        read(reader)

    return checked


class Unpickler(pickle._Unpickler):
    """Reads containers, numbers, text, bytes, and stand-ins for what a pickle names.

    A pickle calls what it names. So nothing is looked up: the names that it may use are answered with stand-ins, and
    any other is refused before anything happens. It is the unpickler written in Python: the one in C can crash on a
    damaged file.

    Args:
        content: of the file.
        stand_ins: by module and name: text, which can do nothing, or what keeps its arguments and state as `Record`
            does.
        encoding: of text that Python 2 has written.
    """

    dispatch: ClassVar = {
        **{code: read for code, read in pickle._Unpickler.dispatch.items() if bytes([code]) not in _UNREAD},
        **{opcode[0]: _plain_keys(opcode) for opcode in (pickle.SETITEM, pickle.SETITEMS, pickle.DICT)},
    }

    def __init__(self, content: bytes, stand_ins: Mapping[tuple[str, str], Any], encoding: str = "ASCII") -> None:
        super().__init__(io.BytesIO(content), encoding=encoding)
        self._stand_ins = stand_ins

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._stand_ins:
            raise ForbiddenName(f"{module}.{name}")
        return self._stand_ins[module, name]
