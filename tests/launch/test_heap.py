"""Whether a process keeps its heap (`dtrp.launch.heap`): page faults are counted in a fresh interpreter."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

COUNT = """
import resource, numpy as np
from dtrp.launch.heap import keep_heap
kept = {call}
blocks = lambda: [np.ones(2**20) for _ in range(8)]
for _ in range(3):
    blocks()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    blocks()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

has_glibc = sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")


def _count(call: str = "keep_heap()", **variables: str) -> tuple[str, int]:
    names = {name: value for name, value in os.environ.items() if "MALLOC" not in name and name != "DTRP_KEEP_HEAP"}
    command = [sys.executable, "-c", COUNT.format(call=call)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**names, **variables})
    kept, faults = done.stdout.split()
    return kept, int(faults)


@pytest.mark.skipif(not has_glibc, reason="needs glibc")
def test_a_process_that_keeps_its_heap_has_no_page_faults() -> None:
    kept, faults = _count()
    assert kept == "True"
    assert faults < 100


@pytest.mark.skipif(not has_glibc, reason="needs glibc")
@pytest.mark.parametrize(
    "variables",
    [
        {"DTRP_KEEP_HEAP": "0"},
        {"MALLOC_TRIM_THRESHOLD_": "100000", "MALLOC_MMAP_THRESHOLD_": "100000"},
        {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=100000"},
    ],
)
def test_it_is_left_alone_where_the_user_says_so(variables: dict[str, str]) -> None:
    assert _count(**variables)[0] == "False"
