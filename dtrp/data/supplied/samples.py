"""Reads samples of a user's data sets, each by random draws of its own, and makes mini-batches of them.

What data sets and transforms draw from the global generators of torch, Python and NumPy depends on (seed, split, epoch,
index), for data that is iterated on (seed, split, epoch). The generators are left as they were.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate

from ...tensors.pytree import map_tensors, num_samples
from ...typing import Tree

SPLITS = ("training", "test")
_LIMITS = ("--limit-train", "--limit-test")


class Wanted(NamedTuple):
    """Samples that are to be read together.

    Args:
        split: 0: training; 1: test.
        epoch: number of the epoch, from 0.
        indices: their indices, or their places in a pass, which ascend.
        inputs, targets: which part of them is wanted.
    """

    split: int
    epoch: int
    indices: Sequence[int]
    inputs: bool = True
    targets: bool = True


class Samples(NamedTuple):
    """What became of it: inputs (B, ...) and targets (B, ...), as far as they were wanted; or an error that ends the run."""

    x: Tree = None
    y: Tree = None
    error: str | None = None


@dataclass(frozen=True)
class Split:
    """A data set, and what it is known by.

    Args:
        data: map-style or iterable data set.
        number: 0: training; 1: test.
        size: number of samples that count.
        whole: whether these are all that there are, and not the first ones.
    """

    data: Any
    number: int
    size: int
    whole: bool

    @classmethod
    def checked(cls, data: Any, number: int, limit: int | None) -> Split:
        """A data set of a user's; ``limit``: the number of samples that count, the first ones.

        Raises:
            ValueError: it is no data set, or has no samples, or no length and no limit.
        """
        word = SPLITS[number]
        if isinstance(data, DataLoader):
            raise ValueError(f"its {word} data is a DataLoader; return the data set in it: mini-batches are made here")
        if isinstance(data, (tuple, Tensor, dict, str)) or not (
            hasattr(data, "__getitem__") or hasattr(data, "__iter__")
        ):
            raise ValueError(
                f"its {word} data is a {type(data).__name__}; return a torch.utils.data.Dataset of (x, y), as "
                "TensorDataset(x, y) is"
            )
        try:
            length: int | None = len(data)
        except (TypeError, NotImplementedError):
            length = None
        if length is None and limit is None:
            raise ValueError(
                f"its {word} data has no length, and an epoch needs one; give it __len__, or pass {_LIMITS[number]}"
            )
        if length is not None and length < 1:
            raise ValueError(f"its {word} data has no samples")
        size = min(n for n in (length, limit) if n is not None)
        return cls(data, number, size, whole=size == length)

    @property
    def iterates(self) -> bool:
        """Whether it can only be iterated."""
        return isinstance(self.data, IterableDataset) or not hasattr(self.data, "__getitem__")

    def attribute(self, name: str) -> Any:
        """An attribute of the data set, or of that which it is a subset of."""
        data = self.data
        while not hasattr(data, name) and hasattr(data, "dataset"):
            data = data.dataset
        return getattr(data, name, None)


class Reader:
    """Reads requests; an object like a data set, for a loader's processes.

    Args:
        splits: training and test data.
        seed: seed of the random draws.
        dtype: floating-point dtype of what is read.
        explain: function from an exception to the text about it.
    """

    def __init__(
        self, splits: Sequence[Split], *, seed: int, dtype: torch.dtype, explain: Callable[[BaseException], str]
    ) -> None:
        self.splits, self._seed, self._dtype, self._explain = splits, seed, dtype, explain
        self._pass: _Pass | None = None

    def __getitem__(self, wanted: Wanted) -> Samples:
        split = self.splits[wanted.split]
        self._at: int | None = None
        try:
            with _generators_kept():
                return self._read(split, wanted)
        except _EndedError as error:
            return Samples(error=str(error))
        except Exception as error:
            at = "samples" if self._at is None else f"sample {self._at}"
            text = str(error) if isinstance(error, _SampleError) else self._explain(error)
            return Samples(error=f"{SPLITS[wanted.split]} {at}: {text}")

    def _read(self, split: Split, wanted: Wanted) -> Samples:
        collate = split.attribute("collate_fn")
        if split.iterates:
            samples = self._from_pass(split, wanted)
        elif not wanted.inputs and collate is None and callable(target := split.attribute("target")):
            samples = self._by_index(split, wanted, lambda index: (None, target(index)))
        else:
            samples = self._by_index(split, wanted, split.data.__getitem__)
        self._at = None
        if collate is not None:
            x, y = collate(samples)
            if num_samples(x) != len(samples):
                raise _SampleError(f"collate_fn made {num_samples(x)} samples of {len(samples)}")
        else:
            x = self._stacked(wanted, samples, 0) if wanted.inputs else None
            y = self._stacked(wanted, samples, 1) if wanted.targets else None
        return Samples(*(self._converted(t) if kept else None for t, kept in ((x, wanted.inputs), (y, wanted.targets))))

    def _by_index(self, split: Split, wanted: Wanted, get: Callable[[int], Any]) -> list[tuple[Any, Any]]:
        if hasattr(split.data, "set_epoch"):
            split.data.set_epoch(wanted.epoch)
        samples = []
        for index in wanted.indices:
            self._at = index
            _seed_generators("sample", self._seed, wanted.split, wanted.epoch, index)
            samples.append(_pair(get(index)))
        return samples

    def _from_pass(self, split: Split, wanted: Wanted) -> list[tuple[Any, Any]]:
        here = self._pass
        if here is None or here.key != (wanted.split, wanted.epoch) or here.place > wanted.indices[0]:
            _seed_generators("pass", self._seed, wanted.split, wanted.epoch)
            if hasattr(split.data, "set_epoch"):
                split.data.set_epoch(wanted.epoch)
            here = self._pass = _Pass((wanted.split, wanted.epoch), iter(split.data))
        else:
            _set_generators(here.generators)
        samples = []
        for place in wanted.indices:
            while here.place <= place:
                self._at = here.place
                sample = next(here.samples, _END)
                if sample is _END:
                    raise _EndedError(_ended_early(split, here.place))
                here.place += 1
            samples.append(_pair(sample))
        if split.whole and here.place == split.size and next(here.samples, _END) is not _END:
            raise _EndedError(
                f"the {SPLITS[split.number]} data goes on after the {split.size} samples that its len() tells; correct "
                f"__len__, or pass {_LIMITS[split.number]} for the first ones"
            )
        here.generators = _get_generators()
        return samples

    def _stacked(self, wanted: Wanted, samples: Sequence[tuple[Any, Any]], part: int) -> Any:
        """Inputs (0) or targets (1) as a mini-batch."""
        values = [sample[part] for sample in samples]
        try:
            if any(isinstance(value, (str, bytes)) for value in values):
                raise TypeError
            return default_collate(values)
        except (TypeError, RuntimeError, KeyError) as error:
            what = ("inputs", "targets")[part]
            shapes = {
                tuple(value.shape): index
                for index, value in zip(wanted.indices, values, strict=True)
                if isinstance(value, Tensor)
            }
            if len(shapes) > 1:
                (a, i), (b, j), *_ = shapes.items()
                raise _SampleError(
                    f"the {what} of samples {i} and {j} have shapes {a} and {b}; pad or crop them, or give the data set a "
                    "collate_fn"
                ) from None
            if isinstance(error, TypeError):
                kinds = sorted({f"{type(v).__module__}.{type(v).__name__}".removeprefix("builtins.") for v in values})
                raise _SampleError(
                    f"the {what} are of type {', '.join(kinds)}; return tensors, numbers or arrays"
                ) from None
            raise

    def _converted(self, value: Any) -> Any:
        dtype = self._dtype
        return map_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t, value)


@dataclass
class _Pass:
    """A data set that is being iterated.

    Args:
        key: split and epoch.
        samples: the iterator.
        place: number of samples that have been taken from it.
        generators: states of the global generators, as its draws have left them.
    """

    key: tuple[int, int]
    samples: Iterator[Any]
    place: int = 0
    generators: Any = None


class _EndedError(Exception):
    """The data has other samples than it says."""


class _SampleError(ValueError):
    """Samples of another form than they need have."""


_END = object()


def _ended_early(split: Split, place: int) -> str:
    told = "its len() tells" if split.whole else f"{_LIMITS[split.number]} or its len() tells"
    return (
        f"the {SPLITS[split.number]} data ended after {place} samples, and {told} {split.size}; pass "
        f"{_LIMITS[split.number]} {max(1, place)} (and see that its __iter__ begins anew each time)"
    )


def _pair(sample: Any) -> tuple[Any, Any]:
    """A sample, checked to be (x, y)."""
    if isinstance(sample, (tuple, list)) and len(sample) == 2:
        return sample[0], sample[1]
    what = f"a {type(sample).__name__}"
    if isinstance(sample, (tuple, list)):
        what += f" of {len(sample)}"
    elif isinstance(sample, dict):
        what += f" with {', '.join(map(str, sample))}"
    raise _SampleError(f"it is {what}; return (x, y)")


def _seed_generators(*key: int | str) -> None:
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    seed = int.from_bytes(digest, "little") >> 1
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


def _get_generators() -> Any:
    numpy = sys.modules.get("numpy")
    return torch.get_rng_state(), random.getstate(), None if numpy is None else numpy.random.get_state()


def _set_generators(states: Any) -> None:
    of_torch, of_python, of_numpy = states
    torch.set_rng_state(of_torch)
    random.setstate(of_python)
    if of_numpy is not None:
        sys.modules["numpy"].random.set_state(of_numpy)


@contextmanager
def _generators_kept() -> Iterator[None]:
    """The context after which the global generators are as they were."""
    before = _get_generators()
    try:
        yield
    finally:
        _set_generators(before)


@contextmanager
def seeded_generators(seed: int) -> Iterator[None]:
    """The context in which torch, Python and NumPy draw from a seed, alike wherever it is entered."""
    with _generators_kept():
        _seed_generators("made", seed)
        yield
