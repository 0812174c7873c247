"""Every test: one torch thread (bits are compared), float32 by default, and a seed."""

from collections.abc import Iterator

import pytest
import torch
from launching import Server

torch.set_num_threads(1)


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
