"""Functions that options name: ``package.module:function``, or ``path/file.py:function``."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ..validation import unknown


class UserCodeError(ValueError):
    """A function of the user's failed in the middle of a run."""


def is_reference(text: str) -> bool:
    """Whether an option's value names a function, and is no name that dtrp knows."""
    return ":" in text


def load_function(option: str, reference: str) -> Callable[..., Any]:
    """The function that an option names.

    A module is looked for in the current folder too, as ``python -m`` does; a file can import what lies beside it.

    Args:
        option: name of the option, for errors.
        reference: ``package.module:function``, or ``path/file.py:function``.

    Raises:
        ValueError: no such module, file or function, or one that cannot be imported, with the reason.
    """
    place, _, name = reference.rpartition(":")
    if not place or not name:
        raise ValueError(f"{option} {reference}: pass package.module:function, or path/file.py:function")
    try:
        module = _load_file(Path(place).expanduser()) if place.endswith(".py") else _load_module(place)
    except FileNotFoundError:
        raise ValueError(f"{option} {reference}: there is no file {place} (in {Path.cwd()})") from None
    except ModuleNotFoundError as error:
        if error.name and place.startswith(error.name):
            raise ValueError(
                f"{option} {reference}: there is no module {error.name} (in {Path.cwd()}, or installed)"
            ) from None
        raise ValueError(f"{option} {reference}: {_failure(error, place)}") from error
    except (Exception, SystemExit) as error:
        raise ValueError(f"{option} {reference}: {_failure(error, place)}") from error
    functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    found = vars(module).get(name)
    if found is None:
        raise ValueError(f"{option} {reference}: {unknown('function', name, functions)}")
    if not callable(found):
        raise ValueError(f"{option} {reference}: {name} is a {type(found).__name__}, and no function")
    return found  # type: ignore[no-any-return]


def call_function(option: str, reference: str, arguments: dict[str, Any]) -> Any:
    """What the function that an option names returns for keyword arguments.

    Raises:
        ValueError: as of `load_function`; an argument that it does not take; or its own error, with the line.
    """
    function = load_function(option, reference)
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise ValueError(f"{option} {reference}: {error}; its arguments are {inspect.signature(function)}") from None
    except ValueError:
        pass  # a function without a signature
    try:
        return function(**arguments)
    except Exception as error:
        raise ValueError(f"{option} {reference}: {explained(error, reference)}") from error


def parse_arguments(option: str, words: Iterable[str]) -> dict[str, Any]:
    """``depth=3``, ``name=text``, ``sizes=[1,2]`` as keyword arguments; a value is read as YAML.

    Raises:
        ValueError: a word of another form, or a name twice.
    """
    import yaml

    arguments: dict[str, Any] = {}
    for word in words:
        name, separator, text = word.partition("=")
        if not separator or not name.isidentifier():
            raise ValueError(f"{option} {word}: pass name=value, one at a time")
        if name in arguments:
            raise ValueError(f"{option} {word}: {name} is there twice; keep one")
        try:
            arguments[name] = yaml.safe_load(text)
        except yaml.YAMLError:
            arguments[name] = text
    return arguments


def digest(reference: str) -> str | None:
    """A digest of the source file that a reference names; None where it has none."""
    place, _, name = reference.rpartition(":")
    if place.endswith(".py"):
        file: str | None = str(Path(place).expanduser())
    else:
        file = getattr(sys.modules.get(place), "__file__", None)
    if not name or file is None or not os.path.isfile(file):
        return None
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def digests(settings: Mapping[str, Any]) -> dict[str, str]:
    """The digests of all source files that settings name, by reference."""
    values = [value if isinstance(value, (list, tuple)) else [value] for value in settings.values()]
    named = [text for value in values for text in value if isinstance(text, str) and is_reference(text)]
    return {text: found for text in named if (found := digest(text)) is not None}


def _load_module(name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    return importlib.import_module(name)


def _load_file(path: Path) -> ModuleType:
    file = path.resolve(strict=True)
    # One file is one module, whoever asks for it: its classes are the same, and can be pickled within the process.
    name = f"{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def explained(error: BaseException, reference: str) -> str:
    """What went wrong in the code of a function of the user's, and where."""
    return _failure(error, reference.rpartition(":")[0])


def _failure(error: BaseException, place: str) -> str:
    """What went wrong in the user's code, and where."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{Path(error.filename).name}, line {error.lineno}: {type(error).__name__}: {error.msg}"
    own = Path(place).stem if place.endswith(".py") else place.rpartition(".")[2]
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).stem in (own, "__init__")
    ]
    where = f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}: " if frames else ""
    return f"{where}{type(error).__name__}: {error}"
