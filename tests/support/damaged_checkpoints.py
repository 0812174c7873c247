"""Checkpoints with something done to them, and how a pipeline refuses them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same, minibatches, network, pipeline

import dtrp
from dtrp.saving import manifest


def make() -> dtrp.Pipeline:
    return pipeline(network(), num_stages=3, num_microbatches=2)


def check_refused(folder: Path, message: str = "") -> None:
    """`load`, into a pipeline with batches in flight, raises one line, and the pipeline goes on as if nothing had been."""
    torch.manual_seed(1)
    pipe, other = make(), make()
    other.load_state_dict(pipe.state_dict())
    batches = minibatches(4, seed=3)
    for x, y in batches[:2]:
        pipe.step(x, y)
        other.step(x, y)
    with pytest.raises(dtrp.CheckpointError, match=message) as caught:
        pipe.load(folder)
    assert "\n" not in str(caught.value)
    for x, y in batches[2:]:
        assert torch.equal(pipe.step(x, y), other.step(x, y))
    pipe.flush()
    other.flush()
    assert_same(pipe.model_state_dict(), other.model_state_dict())


def forge(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda said: None) -> None:
    """Change the manifest, and make it fit its files and its checksum again, as a forger would."""
    path = folder / manifest.NAME
    said = json.loads(path.read_bytes())
    del said["checksum"]
    said["files"] = {p.name: manifest.describe(p) for p in folder.iterdir() if p != path}
    change(said)
    path.write_bytes(manifest.written(said))


class Payload:
    """Its pickle makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))
