"""Random numbers that a repeated forward draws again.

Stage k draws for micro-batch m from the state seeded by (seed, replica, k, m). So the forward that a
backward repeats, the other engine and another run all see the same dropout masks, and no stage's draws
depend on how many another has made. The global generators are left as they were.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch


@lru_cache(maxsize=1024)
def microbatch_seed(seed: int, replica: int, stage: int, microbatch: int) -> int:
    """The seed of one stage's draws for one micro-batch, in 0..2**63-1."""
    packed = struct.pack("<4q", seed, replica, stage, microbatch)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


def drawn_seed() -> int:
    """A seed from the global generator, which does not notice: the program's own draws stay what they are."""
    copied = torch.Generator()
    copied.set_state(torch.default_generator.get_state())
    return int(torch.randint(2**63 - 1, (), generator=copied, device="cpu"))


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
        seed: the pipeline's seed.
        replica, stage: the indices of the replica and the stage.
        device: the device on which the stage computes.
    """

    seed: int
    replica: int
    stage: int
    device: torch.device

    def seed_of(self, microbatch: int) -> int:
        """The seed of the draws for one micro-batch; it is cached."""
        return microbatch_seed(self.seed, self.replica, self.stage, microbatch)

    def region(self, microbatch: int) -> AbstractContextManager[None]:
        """Within it the stage draws for ``microbatch``."""
        return seeded(self.seed_of(microbatch), self.device)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Within it torch draws from ``seed``, on the CPU and on ``device``; afterwards from where it was before.

    (Not by torch.manual_seed, which would reseed every accelerator, and put none back.)
    """
    generators = [torch.default_generator]
    by_name: AbstractContextManager[None] = nullcontext()
    if device.type != "cpu":
        # Empty until the device has been used, and a stage's has. Takes less than `torch.random.fork_rng`.
        shown = getattr(torch.get_device_module(device), "default_generators", ())
        if device.index is not None and device.index < len(shown):
            generators.append(shown[device.index])
        else:
            by_name = _seeded_by_name(seed, device)
    before = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(seed)
        with by_name:
            yield
    finally:
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)


@contextmanager
def _seeded_by_name(seed: int, device: torch.device) -> Iterator[None]:
    """The same on an accelerator that does not show its generators."""
    module = torch.get_device_module(device)
    with torch.random.fork_rng([device], device_type=device.type):
        with module.device(device):
            module.manual_seed(seed)
        yield
