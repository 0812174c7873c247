"""Every test: one torch thread (bits are compared), float32 by default, and a seed; and which cases run every time.

A grid of cases that is marked ``sampled(n)`` runs one in n of them, drawn by their names, always the same; the others are marked
``full`` and run by ``make test-full``.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from launching import Server

# What older versions of torch cannot do is refused by name, which is right there.
REFUSED = ("dtrp.split does not trace models on torch 2.6", "MuonAdamW needs torch.optim.Muon, and torch")
torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    grids: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("sampled") is not None and item.get_closest_marker("full") is None:
            grids[item.nodeid.split("[")[0]].append(item)
    for grid in grids.values():
        (every,) = grid[0].get_closest_marker("sampled").args  # type: ignore[union-attr]
        drawn = sorted(grid, key=lambda item: (zlib.crc32(item.name.encode()), item.name))
        for item in drawn[-(-len(grid) // every) :]:
            item.add_marker(pytest.mark.full)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """A test that asks for what this version of torch cannot do is skipped."""
    try:
        return (yield)
    except Exception as error:
        for refused in REFUSED:
            if refused in f"{error} {error.__cause__}":
                pytest.skip(refused)
        raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """The same, where a command of the library was refused and has said so."""
    report: Any = yield
    if report.failed and not hasattr(torch.optim, "Muon"):
        for refused in REFUSED:
            if refused in f"{report.capstdout}{report.capstderr}":
                path, line, _ = item.location
                report.outcome, report.longrepr = "skipped", (path, line, refused)
    return report


@pytest.fixture(scope="session")
def selected(request: pytest.FixtureRequest) -> Callable[[Sequence[str]], tuple[str, ...]]:
    """Those of some names that are the parameters of a test that runs: the others need not be launched."""
    names = {item.callspec.id for item in request.session.items if hasattr(item, "callspec")}
    return lambda cases: tuple(name for name in cases if name in names)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """Forks ranks; see `launching`."""
    server = Server()
    yield server
    server.close()


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
