"""Random numbers that a repeated forward draws again.

Stage k draws for micro-batch m from the state seeded by (seed, replica, k, m). So the forward that a
backward repeats, the other engine and another run all see the same dropout masks, and no stage's draws
depend on how many another has made. The global generators are left as they were.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch


@lru_cache(maxsize=1024)
def microbatch_seed(seed: int, replica: int, stage: int, microbatch: int) -> int:
    """The seed of one stage's draws for one micro-batch, in 0..2**63-1."""
    packed = struct.pack("<4q", seed, replica, stage, microbatch)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


def generator(*key: int | str) -> torch.Generator:
    """A generator on the CPU whose draws depend on ``key`` only."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def epoch_order(num: int, *, seed: int, epoch: int) -> torch.Tensor:
    """The order in which an epoch visits ``num`` samples, (num,), int64, on the CPU."""
    return torch.randperm(num, generator=generator("order", seed, epoch), device="cpu")


@dataclass
class Draws:
    """The random draws of one stage.

    Args:
        seed: of the pipeline.
        replica, stage: whose draws they are.
        device: where the stage works.
    """

    seed: int
    replica: int
    stage: int
    device: torch.device

    def seed_of(self, microbatch: int) -> int:
        """The seed of those for one micro-batch; it is remembered."""
        return microbatch_seed(self.seed, self.replica, self.stage, microbatch)

    def region(self, microbatch: int) -> AbstractContextManager[None]:
        """Within it the stage draws for ``microbatch``."""
        return seeded(self.seed_of(microbatch), self.device)


def seeded(seed: int, device: torch.device) -> AbstractContextManager[None]:
    """Within it torch draws from ``seed``, on the CPU and on ``device``; after it, from where it was before."""
    if device.type == "cpu":
        return _Seeded(seed)
    # Empty until the device has been used, and a stage's has.
    generators = getattr(torch.get_device_module(device), "default_generators", ())
    if device.index is not None and device.index < len(generators):
        return _SeededOn(seed, generators[device.index])
    return _seeded_by_name(seed, device)


class _Seeded:
    """On the CPU. (Not torch.manual_seed: that would reseed every accelerator, and none is put back.)"""

    __slots__ = ("_before", "_seed")

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __enter__(self) -> None:
        self._before = torch.default_generator.get_state()
        torch.default_generator.manual_seed(self._seed)

    def __exit__(self, *error: object) -> None:
        torch.default_generator.set_state(self._before)


class _SeededOn:
    """On the CPU and on an accelerator, by its generator itself, which takes less than `torch.random.fork_rng`."""

    __slots__ = ("_before", "_cpu", "_generator", "_seed")

    def __init__(self, seed: int, generator: torch.Generator) -> None:
        self._cpu, self._seed, self._generator = _Seeded(seed), seed, generator

    def __enter__(self) -> None:
        self._before = self._generator.get_state()
        self._generator.manual_seed(self._seed)
        self._cpu.__enter__()

    def __exit__(self, *error: object) -> None:
        self._cpu.__exit__(*error)
        self._generator.set_state(self._before)


@contextmanager
def _seeded_by_name(seed: int, device: torch.device) -> Iterator[None]:
    """On the CPU and on an accelerator that does not show its generators."""
    module = torch.get_device_module(device)
    with torch.random.fork_rng([device], device_type=device.type), _Seeded(seed):
        with module.device(device):
            module.manual_seed(seed)
        yield
