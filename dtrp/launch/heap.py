"""The heap of a process that trains: kept from one backward to the next.

glibc gives memory at the end of the heap back to the system once more than a threshold of it is free (M_TRIM_THRESHOLD),
and takes large blocks from the system one by one (M_MMAP_THRESHOLD). A backward frees all activations of a
micro-batch, so the next forward may fault every page of them in again. Whether it does depends on what lies at the end of the
heap: on the same network it is every backward, or none.
"""

from __future__ import annotations

import ctypes
import os
import sys

KEEP_VARIABLE = "DTRP_KEEP_HEAP"  # "0": the heap stays as the system has it
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_TRIM_BYTES = 2**31 - 1  # the largest number that mallopt takes
_MMAP_BYTES = (2**30, 2**25)  # the larger one is refused by older versions of glibc

_kept: bool | None = None  # None: not asked for yet in this process


def keep_heap() -> bool:
    """Let this process keep the memory of its CPU tensors for its next ones; once is enough.

    A process that trains has the same peak in every step, so it needs no more memory than before; what it has freed
    in between stays its own. Nothing happens without glibc, with ``DTRP_KEEP_HEAP=0``, and where the user has set
    thresholds (``MALLOC_TRIM_THRESHOLD_``, ``MALLOC_MMAP_THRESHOLD_``, ``GLIBC_TUNABLES`` of malloc).

    Returns:
        Whether the heap is kept.
    """
    global _kept
    if _kept is None:
        _kept = _is_ours() and _set_thresholds()
    return _kept


def _is_ours() -> bool:
    variables = os.environ
    named = any(name.startswith("MALLOC_") and name.endswith("_THRESHOLD_") for name in variables)
    tuned = "glibc.malloc." in variables.get("GLIBC_TUNABLES", "")
    return variables.get(KEEP_VARIABLE, "1") != "0" and not named and not tuned


def _set_thresholds() -> bool:
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version") or not hasattr(library, "mallopt"):
        return False
    mallopt = library.mallopt
    mallopt.argtypes, mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
    return bool(mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES)) and any(
        mallopt(_M_MMAP_THRESHOLD, size) for size in _MMAP_BYTES
    )
