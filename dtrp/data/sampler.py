"""A sampler whose position in the epoch can be saved and restored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized

from torch.utils.data import Sampler

from ..tensors.rng import epoch_order
from ..typing import Json
from .random_state import random_states, restorer

_STATE = ("num_samples", "seed", "shuffle", "epoch", "position")


class ResumableSampler(Sampler[int]):
    """Visits each sample once per epoch, in an order that depends on ``seed`` and the epoch alone.

    A `torch.utils.data.DataLoader` reads ahead, so the samples drawn are not the samples trained on: the loop reports
    its progress with `advance`. Iteration starts at the first sample of the epoch that has not been trained on::

        sampler = dtrp.ResumableSampler(dataset, seed=0)
        loader = DataLoader(dataset, batch_size=64, sampler=sampler, num_workers=2)
        while sampler.epoch < 10:
            for x, y in loader:
                pipe.step(x, y)
                sampler.advance(len(y))
                ...
                pipe.save("checkpoint", extra={"sampler": sampler.state_dict()})

    and, in another process, ``sampler.load_state_dict(pipe.load("checkpoint")["sampler"])`` just before the loop.

    The state holds those of the global generators of torch (for the CPU), Python and NumPy too, which data sets and
    transforms draw from by habit: without workers of the loader, what they draw goes on to the bit. A worker draws from
    a seed that the loader draws at the beginning of an epoch, so with workers this is so of saves at the end of an
    epoch. Generators of the data set's own, and those of accelerators, are not in it.

    Args:
        data: data set, or its number of samples.
        seed: random seed of the order.
        shuffle: whether each epoch has an order of its own; False: the order of the data.

    Attributes:
        epoch: number of the epoch, from 0.
        position: number of samples of the epoch that have been trained on.

    Example:
        >>> sampler = ResumableSampler(5, seed=3)
        >>> whole = list(sampler)
        >>> sampler.advance(2)
        >>> list(sampler) == whole[2:], sampler.epoch, sampler.position
        (True, 0, 2)
    """

    def __init__(self, data: Sized | int, *, seed: int = 0, shuffle: bool = True) -> None:
        num_samples = data if isinstance(data, int) else len(data)
        if isinstance(num_samples, bool) or num_samples < 1:
            raise ValueError(f"{num_samples} samples: pass a data set that has some, or their number")
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise TypeError(f"seed={seed!r}: pass a whole number")
        self.num_samples, self.seed, self.shuffle = int(num_samples), seed, bool(shuffle)
        self.epoch = self.position = 0
        self._drawn: tuple[int, int] | None = None  # (epoch, position) that has been iterated to its end
        self._restore: Callable[[], None] | None = None  # the generators' states, when the epoch goes on

    def __iter__(self) -> Iterator[int]:
        start = (self.epoch, self.position)
        if self.num_samples > 1 and self._drawn == start and self.position == 0:
            raise RuntimeError(
                f"epoch {self.epoch} has been drawn and nothing of it trained on; call sampler.advance(len(y)) after each step"
            )
        # Not before: a loader draws a seed when an iteration begins, which the run that was saved had drawn already.
        if self._restore is not None:
            self._restore()
            self._restore = None
        order: Sequence[int] = range(self.num_samples)
        if self.shuffle:
            order = epoch_order(self.num_samples, seed=self.seed, epoch=self.epoch).tolist()
        yield from order[self.position :]
        self._drawn = start

    def __len__(self) -> int:
        """Number of samples left in the epoch."""
        return self.num_samples - self.position

    def advance(self, num_samples: int) -> None:
        """Count ``num_samples`` more samples as trained on; after the last of the epoch the next epoch begins.

        Raises:
            ValueError: fewer are left.
        """
        if not 0 <= num_samples <= len(self):
            raise ValueError(
                f"advance({num_samples}) with {len(self)} samples left of the epoch; pass the size of the mini-batch"
            )
        self.position += num_samples
        if self.position == self.num_samples:
            self.next_epoch()

    def next_epoch(self) -> None:
        """Skip the rest of the epoch, such as a last partial mini-batch that the loader drops."""
        self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Json]:
        """Seed and position, and the states of the global random generators, as values that JSON can hold."""
        return {**{name: getattr(self, name) for name in _STATE}, "random": random_states()}

    def load_state_dict(self, state: dict[str, Json]) -> None:
        """Continue from the position in ``state``.

        The random generators are put back as well: at the beginning of an epoch at once, else when the iteration goes
        on.

        Raises:
            ValueError: the state of a sampler with another number of samples, or no such state at all.
        """
        types = {name: type(getattr(self, name)) for name in _STATE}
        if not isinstance(state, dict) or types != {n: type(value) for n, value in state.items() if n != "random"}:
            raise ValueError(f"{str(state)[:80]} is no state of a sampler; pass what state_dict() returned")
        if state["num_samples"] != self.num_samples:
            raise ValueError(
                f"the state is that of {state['num_samples']} samples, and there are {self.num_samples}; use the same data"
            )
        if state["epoch"] < 0 or not 0 <= state["position"] < self.num_samples:
            raise ValueError(
                f"epoch {state['epoch']}, position {state['position']}: no place among {self.num_samples} samples"
            )
        restore = restorer(state["random"]) if "random" in state else None  # older versions kept none
        for name in _STATE:
            setattr(self, name, state[name])
        self._drawn, self._restore = None, restore
        if restore is not None and self.position == 0:
            restore()
            self._restore = None
