"""A user's data sets as a source of mini-batches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...tensors.pytree import check_samples, map_tensors, tensors_of
from ...tensors.rng import epoch_order
from ...typing import Tree
from ..loader import check_start
from ..source import WHOLE, Batch, DataError, Part, Source
from ..streaming.workers import Workers
from .samples import Reader, Samples, Split, Wanted, seeded_generators

_TEST_BATCH_BYTES = 2**26  # of inputs
_NUM_EXAMPLES = 2


@dataclass(frozen=True)
class Facts:
    """What all ranks know of a user's data: the first one finds it out, and the others are told.

    Args:
        sizes: number of training and of test samples.
        iterates: whether training and test data can only be iterated.
        classes: names of the classes; empty where they have none.
        num_classes: number of classes; 0: not known.
        example: inputs and targets of the first samples, on the CPU.
    """

    sizes: tuple[int, int]
    iterates: tuple[bool, bool]
    classes: tuple[str, ...]
    num_classes: int
    example: tuple[Tree, Tree] | None


class SuppliedData(Source):
    """Samples of a user's data sets, read when they are needed.

    Map-style data has the order of (seed, epoch); data that can only be iterated has its own, and an epoch is a pass.

    Args:
        facts: what is known of the data.
        reader: reads samples; None: this process reads none.
        workers: the processes with the reader.
        name: name in messages.
        seed: random seed of the order.
        device: where the mini-batches are to be.
        test_batch_size: largest number of samples in a mini-batch of the test.
        how: text about how it is read, for the first line of a run.
        from_file: function from a file to the inputs of a sample; None: the data has none.

    Attributes:
        check_targets: function that refuses targets, before they go to the device; None: none does.
    """

    def __init__(
        self, facts: Facts, workers: Workers[Wanted, Samples] | None, *, name: str, seed: int, device: torch.device | str,
        test_batch_size: int, how: str, from_file: Callable[[str], Any] | None = None,
    ) -> None:  # fmt: skip
        assert facts.example is not None
        self._example: tuple[Tree, Tree] = facts.example
        self._workers, self._seed, self._device = workers, seed, torch.device(device)
        self.name, self.num_classes, self.class_names = name, facts.num_classes, facts.classes
        self.num_train, self.num_test = facts.sizes
        self._iterates = facts.iterates
        self.skips = facts.iterates[0]
        x, y = self._example
        self.sample_shape = tuple(x.shape[1:]) if isinstance(x, Tensor) else ()
        self.is_text = (
            isinstance(x, Tensor) and x.dim() == 2 and not x.is_floating_point()
            and isinstance(y, Tensor) and y.shape == x.shape and not y.is_floating_point()
        )  # fmt: skip
        shape = (
            f"{self.sample_shape[0]} numbers"
            if len(self.sample_shape) == 1
            else "shape " + "x".join(map(str, self.sample_shape))
        )
        if not self.sample_shape:
            shape = "a number" if isinstance(x, Tensor) else "several tensors"
        classes = f" in {self.num_classes} classes" if self.num_classes else ""
        self.details = f" of {shape}{classes}, {how}"
        bytes_each = max(1, sum(t.nbytes for t in tensors_of(x)) // _NUM_EXAMPLES)
        self.from_file = from_file
        self.check_targets: Callable[[Any], None] | None = None
        self._test_batch = max(1, min(test_batch_size, _TEST_BATCH_BYTES // bytes_each))

    def train_batches(self, batch_size: int, *, epoch: int, start: int = 0, part: Part = WHOLE) -> Iterator[Batch]:
        check_start(start, self.num_train, batch_size)
        order = (
            torch.arange(self.num_train)
            if self._iterates[0]
            else epoch_order(self.num_train, seed=self._seed, epoch=epoch)
        )
        chosen = [part.of(indices) for indices in torch.split(order[start:], batch_size) if len(indices)]
        return self._batches(0, epoch, chosen, part)

    def test_batches(self, *, part: Part = WHOLE) -> Iterator[Batch]:
        chosen = torch.split(torch.arange(self.num_test), self._test_batch)[part.replica :: part.num_replicas]
        return self._batches(1, 0, chosen, part)

    def _batches(self, split: int, epoch: int, chosen: Sequence[Tensor], part: Part) -> Iterator[Batch]:
        """The mini-batches of the samples whose indices are ``chosen``."""
        if not (part.inputs or part.targets):
            return iter([(None, None)] * len(chosen))
        requests = (Wanted(split, epoch, tuple(few.tolist()), part.inputs, part.targets) for few in chosen)
        return self._read(requests)

    def _read(self, requests: Iterable[Wanted]) -> Iterator[Batch]:
        assert self._workers is not None, "this process has no data"
        for found in self._workers.decode(requests):
            if self.check_targets is not None and found.y is not None:
                self.check_targets(found.y)
            yield self._placed(found.x), self._placed(found.y)

    def _placed(self, value: Tree) -> Any:
        return None if value is None else map_tensors(lambda t: t.to(self._device), value)

    def example(self, num: int) -> tuple[Any, Any]:
        """The first samples, again and again."""
        indices = torch.arange(num)
        x, y = (map_tensors(lambda t: t[indices % len(t)] if t.dim() else t, value) for value in self._example)
        return self._placed(x), self._placed(y)

    def close(self) -> None:
        if self._workers is not None:
            self._workers.close()


def open_supplied(
    make: Callable[[], Any], *, name: str, seed: int, dtype: torch.dtype, device: torch.device | str = "cpu",
    num_workers: int = 0, limits: tuple[int | None, int | None] = (None, None), test_batch_size: int = 500,
    num_microbatches: int = 1, reads: tuple[bool, bool] = (True, True),
    share: Callable[[Facts | None, Exception | None], Facts] | None = None,
    explain: Callable[[BaseException], str] = str,
) -> SuppliedData:  # fmt: skip
    """The data sets that a function returns, as a source of mini-batches.

    Args:
        make: function that returns (train, test). What it draws from global generators depends on ``seed``.
        name: name of the data in messages.
        seed: random seed of the order, and of what the data sets draw.
        dtype: floating-point dtype of the mini-batches.
        device: where they are to be.
        num_workers: number of processes that read; 0: this one does. At most one reads data that is iterated.
        limits: number of training and of test samples, the first ones; None: all.
        test_batch_size: largest number of samples in a mini-batch of the test.
        num_microbatches: parts of a mini-batch.
        reads: whether this process needs inputs, and targets.
        share: function from what this process has found out (None where it reads nothing) and its error to what the
            first of several processes has found out.
        explain: function from an exception of the data sets to the text about it.

    Raises:
        ValueError: the function returns something else, or data sets that cannot be used, with what to change.
    """
    facts: Facts | None = None
    error: Exception | None = None
    workers: Workers[Wanted, Samples] | None = None
    from_file: Callable[[str], Any] | None = None
    try:
        if any(reads):
            with seeded_generators(seed):
                made = make()
            splits = _splits(made, limits)
            from_file = splits[1].attribute("from_file")
            iterates = any(split.iterates for split in splits)
            reading = 0 if sys.platform != "linux" else min(num_workers, 1) if iterates else num_workers
            # Before this process joins the others: those that read are to hold none of its connections.
            workers = Workers(Reader(splits, seed=seed, dtype=dtype, explain=explain), reading)
            facts = _facts(splits, workers, num_microbatches, with_example=reads[0])
    except (ValueError, OSError, ImportError) as failed:
        error = failed
        if type(failed) in (ValueError, DataError) and not str(failed).startswith("--data"):
            error = type(failed)(f"--data {name}: {failed}")
    try:
        told = facts if share is None else share(facts, error)
        if error is not None:
            raise error
        assert told is not None
        if facts is not None and (facts.sizes, facts.iterates) != (told.sizes, told.iterates):
            raise ValueError(
                f"--data {name} made {facts.sizes[0]} training and {facts.sizes[1]} test samples here, and {told.sizes[0]} "
                f"and {told.sizes[1]} in the first process; it must make the same ones everywhere"
            )
    except BaseException:
        if workers is not None:
            workers.close()
        raise
    num = 0 if sys.platform != "linux" else min(num_workers, 1) if any(told.iterates) else num_workers
    how = f"read by {num} loader worker{'s' if num > 1 else ''}" if num else "read as they are needed"
    return SuppliedData(
        told, workers, name=name, seed=seed, device=device, test_batch_size=test_batch_size,
        from_file=from_file, how=("in the order of the data, " if told.iterates[0] else "") + how,
    )  # fmt: skip


def _splits(made: Any, limits: tuple[int | None, int | None]) -> tuple[Split, Split]:
    """What a user's function has returned as training and test data.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(made, (tuple, list)) or len(made) != 2:
        many = f" of {len(made)}" if isinstance(made, (tuple, list)) else ""
        raise ValueError(f"it returned a {type(made).__name__}{many}; return (train, test), two data sets of (x, y)")
    train, test = (Split.checked(data, number, limits[number]) for number, data in enumerate(made))
    return train, test


def _facts(
    splits: tuple[Split, Split], workers: Workers[Wanted, Samples], num_microbatches: int, *, with_example: bool
) -> Facts:
    """What can be told of data sets. Their first samples are read by the workers, before any in this process."""
    classes = splits[0].attribute("classes")
    names = tuple(map(str, classes)) if isinstance(classes, (list, tuple)) else ()
    num_classes = splits[0].attribute("num_classes")
    example = None
    workers.start()
    if with_example:
        indices = [i % splits[0].size for i in range(_NUM_EXAMPLES)]
        if splits[0].iterates:
            indices = indices[: splits[0].size]
        (found,) = workers.decode([Wanted(0, 0, tuple(indices))])
        for label, value in (("x", found.x), ("y", found.y)):
            try:
                check_samples(label, value, num_microbatches)
            except (TypeError, ValueError) as error:
                raise ValueError(str(error)) from None
        example = found.x, found.y
    return Facts(
        (splits[0].size, splits[1].size),
        (splits[0].iterates, splits[1].iterates),
        names,
        int(num_classes) if isinstance(num_classes, int) else len(names),
        example,
    )
