"""Every name that torch keeps to itself and the library needs, with the reason."""

from __future__ import annotations

from torch import Tensor


def write_count(t: Tensor) -> int:
    """How often the memory of a tensor was written in place: autograd counts it, and no public name tells."""
    return t._version
