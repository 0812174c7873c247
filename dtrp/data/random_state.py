"""The states of the global random generators, which data sets draw from by habit, as values that JSON can hold."""

from __future__ import annotations

import base64
import random
import struct
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..typing import Json

_NUM_WORDS = 624  # of 32 bits, in a Mersenne twister, which Python and NumPy draw from


def random_states() -> dict[str, Json]:
    """The states of torch's generator for the CPU, of Python's, and of NumPy's where something has imported NumPy."""
    _, (*words, position), gauss = random.getstate()
    states: dict[str, Json] = {
        "torch": base64.b64encode(bytes(torch.get_rng_state().tolist())).decode(),
        "python": [_text(words), position, gauss],
    }
    if "numpy" in sys.modules:
        import numpy as np

        name, keys, *numbers = np.random.get_state()
        if name == "MT19937":
            states["numpy"] = [_text(map(int, keys)), *numbers]
    return states


def restorer(states: Any) -> Callable[[], None]:
    """The function that puts the global generators into these states; NumPy's where it is installed.

    Raises:
        ValueError: they are no such states.
    """
    try:
        of_torch = torch.frombuffer(bytearray(base64.b64decode(states["torch"])), dtype=torch.uint8)
        torch.Generator().set_state(of_torch)
        text, position, gauss = states["python"]
        of_python = (3, (*_words(text), position), gauss if gauss is None else float(gauss))
        random.Random().setstate(of_python)
        of_numpy = _numpy_state(*states["numpy"]) if "numpy" in states else None
    except (TypeError, ValueError, KeyError, RuntimeError, struct.error) as error:
        raise ValueError(f"no states of random generators ({type(error).__name__}: {error})") from None

    def restore() -> None:
        torch.set_rng_state(of_torch)
        random.setstate(of_python)
        if of_numpy is not None:
            import numpy as np

            np.random.set_state(of_numpy)

    return restore


def _numpy_state(text: str, position: int, has_gauss: int, gauss: float) -> tuple[Any, ...] | None:
    """The state as `numpy.random.set_state` takes it, checked; None where NumPy is not installed."""
    words = _words(text)
    if not 0 <= position <= _NUM_WORDS or has_gauss not in (0, 1):
        raise ValueError(f"position {position} of {_NUM_WORDS} words")
    try:
        import numpy as np
    except ImportError:
        return None
    return ("MT19937", np.array(words, dtype=np.uint32), int(position), int(has_gauss), float(gauss))


def _text(words: Iterable[int]) -> str:
    return base64.b64encode(struct.pack(f"<{_NUM_WORDS}I", *words)).decode()


def _words(text: str) -> tuple[int, ...]:
    return struct.unpack(f"<{_NUM_WORDS}I", base64.b64decode(text))
