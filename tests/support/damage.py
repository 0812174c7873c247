"""Damage to files, drawn by hypothesis, and what the command line answers to it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from dtrp.cli import run

# The same examples every time: a failure is found again, and the suite takes as long as it did yesterday.
FIXED = settings(
    deadline=None, derandomize=True, database=None, phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


def answer(arguments: list[str]) -> tuple[int, str]:
    """(exit code, what stood on stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(arguments)
    torch.set_num_threads(1)
    return code, err.getvalue()


def damages(size: int) -> st.SearchStrategy[Callable[[bytes], bytes]]:
    """What happens to a file: bytes exchanged, cut off, left out, put in, all zeros."""
    place = st.integers(0, max(0, size - 1))
    noise = st.binary(min_size=1, max_size=8)
    return st.one_of(
        st.builds(lambda at, new: lambda raw: raw[:at] + new + raw[at + len(new) :], place, noise),
        st.builds(lambda at: lambda raw: raw[:at], place),
        st.builds(lambda at, num: lambda raw: raw[:at] + raw[at + num :], place, st.integers(1, 64)),
        st.builds(lambda at, new: lambda raw: raw[:at] + new + raw[at:], place, noise),
        st.just(lambda raw: bytes(len(raw))),
    )
