"""The order of samples, as something that can be stopped anywhere and taken up again."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any

from torch.utils.data import Sampler

from ..tensors.rng import epoch_order


class ResumableSampler(Sampler[int]):
    """Visits each sample once an epoch, in an order that depends on ``seed`` and the epoch alone, and knows where it is.

    A `torch.utils.data.DataLoader` reads ahead, so what it has drawn is not what has been trained on: the loop says how
    far it has come, by `advance`. Iterating begins at the first sample that is left of the epoch::

        sampler = dtrp.ResumableSampler(dataset, seed=0)
        loader = DataLoader(dataset, batch_size=64, sampler=sampler, num_workers=2)
        while sampler.epoch < 10:
            for x, y in loader:
                pipe.step(x, y)
                sampler.advance(len(y))
                ...
                pipe.save("checkpoint", extra={"sampler": sampler.state_dict()})

    and, in another process, ``sampler.load_state_dict(pipe.load("checkpoint")["sampler"])`` before the loop.

    Args:
        data: the data set, or the number of its samples.
        seed: of the order.
        shuffle: a new order every epoch, or that of the data.

    Attributes:
        epoch: from 0.
        position: samples of the epoch that have been trained on.

    Example:
        >>> sampler = ResumableSampler(5, seed=3)
        >>> whole = list(sampler)
        >>> sampler.advance(2)
        >>> list(sampler) == whole[2:], sampler.state_dict()
        (True, {'num_samples': 5, 'seed': 3, 'shuffle': True, 'epoch': 0, 'position': 2})
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

    def __iter__(self) -> Iterator[int]:
        here = (self.epoch, self.position)
        if self.num_samples > 1 and self._drawn == here and self.position == 0:
            raise RuntimeError(
                f"epoch {self.epoch} has been drawn and nothing of it trained on; call sampler.advance(len(y)) after each step"
            )
        order = epoch_order(self.num_samples, seed=self.seed, epoch=self.epoch).tolist() if self.shuffle else None
        for i in range(self.position, self.num_samples):
            yield order[i] if order is not None else i
        self._drawn = here

    def __len__(self) -> int:
        """Samples left of the epoch."""
        return self.num_samples - self.position

    def advance(self, num_samples: int) -> None:
        """So many more have been trained on; with the last of the epoch the next one begins.

        Raises:
            ValueError: there are not so many left.
        """
        if not 0 <= num_samples <= len(self):
            raise ValueError(
                f"advance({num_samples}) with {len(self)} samples left of the epoch; pass the size of the mini-batch"
            )
        self.position += num_samples
        if self.position == self.num_samples:
            self.next_epoch()

    def next_epoch(self) -> None:
        """Leave what is left of the epoch: a last partial mini-batch that the loader drops."""
        self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Where it is, as JSON has it."""
        names = ("num_samples", "seed", "shuffle", "epoch", "position")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError: it is the state of a sampler of another number of samples, or none at all.
        """
        own = self.state_dict()
        if (
            not isinstance(state, dict)
            or state.keys() != own.keys()
            or any(type(state[k]) is not type(own[k]) for k in own)
        ):
            raise ValueError(f"{str(state)[:80]} is no state of a sampler; pass what state_dict() returned")
        if state["num_samples"] != self.num_samples:
            raise ValueError(
                f"the state is that of {state['num_samples']} samples, and there are {self.num_samples}; use the same data"
            )
        if state["epoch"] < 0 or not 0 <= state["position"] < self.num_samples:
            raise ValueError(
                f"epoch {state['epoch']}, position {state['position']}: no place among {self.num_samples} samples"
            )
        self.seed, self.shuffle, self.epoch, self.position = (
            state[k] for k in ("seed", "shuffle", "epoch", "position")
        )
        self._drawn = None
