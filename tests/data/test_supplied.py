"""Data sets of a user's: the same samples whoever reads them, and what is said of those that cannot be used."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from helpers import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from dtrp.data import DataError, Part, SuppliedData, open_supplied
from dtrp.tensors.pytree import tensors_of

NUM = 23


class Noisy(Dataset):  # type: ignore[type-arg]
    """Samples that draw from all global generators."""

    classes = ("a", "b", "c")

    def __init__(self, num: int = NUM) -> None:
        self.num = num

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.tensor([index, random.random(), np.random.rand(), float(torch.rand(()))]), index % 3


class Stream(IterableDataset):  # type: ignore[type-arg]
    """The same, in a pass; ``told``: what its length is said to be."""

    def __init__(self, num: int = NUM, told: int | None = None) -> None:
        self.num, self.told = num, told
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        for index in range(self.num):
            yield torch.tensor([index, self.epoch, np.random.rand(), float(torch.rand(()))]), index % 3


class Sized(Stream):
    def __len__(self) -> int:
        return self.num if self.told is None else self.told


def opened(train: Any, test: Any = None, **options: Any) -> SuppliedData:
    settings: dict[str, Any] = {"name": "mine", "seed": 3, "dtype": torch.float64, **options}
    return open_supplied(lambda: (train, Noisy(5) if test is None else test), **settings)


def epoch_of(source: SuppliedData, **options: Any) -> list[tuple[Tensor, Tensor]]:
    return list(source.train_batches(4, **{"epoch": 1, **options}))  # type: ignore[arg-type]


def same(a: list[Any], b: list[Any]) -> bool:
    tensors = (tensors_of(tuple(batches)) for batches in (a, b))
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(*tensors, strict=True))


@pytest.mark.parametrize("data", [Noisy, Sized])
def test_any_number_of_workers_reads_the_same(data: Any) -> None:
    here = opened(data())
    whole, test = epoch_of(here), list(here.test_batches())
    assert sorted(int(i) for x, _ in whole for i in x[:, 0]) == list(range(NUM))
    assert all(x.dtype == torch.float64 and torch.equal(y, x[:, 0].long() % 3) for x, y in whole)
    draws = [torch.cat([x for x, _ in epoch_of(here, epoch=epoch)]) for epoch in (1, 2)]
    first, second = (x[x[:, 0].argsort()][:, -1] for x in draws)
    assert len({*first.tolist(), *second.tolist()}) == 2 * NUM, "each sample of each epoch has draws of its own"
    there = opened(data(), num_workers=2)
    try:
        iter(there.train_batches(4, epoch=0)).__next__()  # left early
        assert same(whole, epoch_of(there))
        assert same(test, list(there.test_batches()))
        assert same(whole[3:], epoch_of(there, start=12)), "an epoch that is taken up"
    finally:
        there.close()


@pytest.mark.parametrize("data", [Noisy, Sized])
@settings(max_examples=examples(30), deadline=None)
@given(start=st.integers(0, 6), replicas=st.integers(1, 3), inputs=st.booleans(), targets=st.booleans())
def test_parts_of_an_epoch(data: Any, start: int, replicas: int, inputs: bool, targets: bool) -> None:
    source = opened(data())
    whole = epoch_of(source)
    for replica in range(replicas):
        part = Part(inputs, targets, replica, replicas)
        found = epoch_of(source, start=min(NUM, 4 * start), part=part)
        assert len(found) == len(whole[start:])
        for (x, y), (whole_x, whole_y) in zip(found, whole[start:], strict=True):
            assert (x is None) == (not inputs)
            assert x is None or torch.equal(x, part.of(whole_x))
            assert (y is None) == (not targets)
            assert y is None or torch.equal(y, part.of(whole_y))


def test_the_generators_of_the_run_are_left_alone() -> None:
    source = opened(Noisy())
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    want = [torch.rand(1).item(), random.random(), np.random.rand()]
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    epoch_of(source)
    epoch_of(opened(Sized()))
    assert [torch.rand(1).item(), random.random(), np.random.rand()] == want


def test_what_the_function_draws_depends_on_the_seed() -> None:
    def make() -> Any:
        x = torch.rand(8, 2)
        return TensorDataset(x, torch.arange(8)), TensorDataset(x, torch.arange(8))

    options: dict[str, Any] = {"name": "mine", "dtype": torch.float32}
    a, b, c = (list(open_supplied(make, seed=seed, **options).test_batches()) for seed in (1, 1, 2))
    assert same(a, b)
    assert not same(a, c)


def test_what_is_known_of_the_data() -> None:
    source = opened(Subset(Noisy(), range(10)), limits=(8, 3))
    assert (source.num_train, source.num_test, source.num_classes, source.class_names) == (8, 3, 3, ("a", "b", "c"))
    assert source.sample_shape == (4,)
    assert source.details == " of 4 numbers in 3 classes, read as they are needed"
    x, y = source.example(5)
    assert x.shape == (5, 4)
    assert y.tolist() == [0, 1, 0, 1, 0]
    assert not source.is_text
    assert source.skips is False
    tokens = TensorDataset(torch.arange(12).view(3, 4), torch.arange(12).view(3, 4))
    assert opened(tokens).is_text
    stream = opened(Sized(), num_workers=3)
    stream.close()
    assert stream.skips
    assert stream.details == " of 4 numbers, in the order of the data, read by 1 loader worker"


def test_targets_alone_need_no_inputs() -> None:
    class Costly(Noisy):
        def __getitem__(self, index: int) -> Any:
            assert not self.blind
            return super().__getitem__(index)

        def target(self, index: int) -> int:
            return index % 3

    data = Costly()
    data.blind = False
    source = opened(data)
    want = [y for _, y in epoch_of(source)]
    data.blind = True
    found = epoch_of(source, part=Part(inputs=False))
    assert all(x is None and torch.equal(y, z) for (x, y), z in zip(found, want, strict=True))


class Padded(Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], Tensor]:
        return {"ids": torch.arange(index + 1)}, torch.tensor(index)

    @staticmethod
    def collate_fn(samples: list[Any]) -> tuple[Any, Tensor]:
        ids = torch.nn.utils.rnn.pad_sequence([x["ids"] for x, _ in samples], batch_first=True, padding_value=-1)
        return {"ids": ids, "mask": ids >= 0}, torch.stack([y for _, y in samples])


def test_a_collate_fn_and_trees_of_tensors() -> None:
    source = opened(Padded(), test=Padded())
    (x, y), *_ = source.test_batches()
    assert x["mask"].sum(1).tolist() == [1, 2, 3, 4, 5, 6]  # type: ignore[index]
    assert y.tolist() == list(range(6))  # type: ignore[union-attr]
    assert source.sample_shape == ()


class Wrong(Noisy):
    def __init__(self, sample: Any, at: int = 0) -> None:
        super().__init__()
        self.sample, self.at = sample, at

    def __getitem__(self, index: int) -> Any:
        if index != self.at:
            return super().__getitem__(index)
        if isinstance(self.sample, Exception):
            raise self.sample
        return self.sample


@pytest.mark.parametrize(
    ("train", "match"),
    [
        ((torch.rand(4, 2), torch.rand(4)), "its training data is a tuple; return a torch.utils.data.Dataset"),
        ({}, "is a dict"),
        (5, "is a int"),
        (DataLoader(Noisy()), "is a DataLoader; return the data set in it"),
        (Noisy(0), "its training data has no samples"),
        (Stream(), "has no length, and an epoch needs one; give it __len__, or pass --limit-train"),
        (Wrong({"image": 1, "label": 2}), "training sample 0: it is a dict with image, label; return"),
        (Wrong((1, 2, 3)), "training sample 0: it is a tuple of 3; return"),
        (Wrong((object(), 2)), "the inputs are of type object, torch.Tensor; return tensors"),
        (Wrong((torch.rand(3), 2)), r"the inputs of samples 0 and 1 have shapes \(3,\) and \(4,\)"),
        (Wrong(("text", "more")), "the inputs are of type str, torch.Tensor; return tensors"),
        (Wrong(RuntimeError("no picture")), "training sample 0: no picture"),
    ],
)
def test_data_that_cannot_be_used(train: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match) as raised:
        opened(train)
    assert str(raised.value).startswith("--data mine: ")


@pytest.mark.parametrize("made", [None, Noisy(), (Noisy(),), (Noisy(), Noisy(), Noisy())])
def test_a_function_that_returns_something_else(made: Any) -> None:
    with pytest.raises(ValueError, match=r"it returned a .*; return \(train, test\)"):
        open_supplied(lambda: made, name="mine", seed=0, dtype=torch.float32)


def test_a_length_that_is_not_true() -> None:
    with pytest.raises(DataError, match=r"ended after 23 samples, and its len\(\) tells 30; pass --limit-train 23"):
        epoch_of(opened(Sized(told=30)))
    with pytest.raises(DataError, match=r"goes on after the 20 samples that its len\(\) tells; correct __len__"):
        epoch_of(opened(Sized(told=20)))
    assert len(epoch_of(opened(Sized(), limits=(20, None)))) == 5
    assert len(epoch_of(opened(Stream(), limits=(20, None)))) == 5
    with pytest.raises(DataError, match="test data ended after 23 samples, and --limit-test"):
        list(opened(Noisy(), test=Stream(), limits=(None, 40)).test_batches())


def test_a_sample_that_fails_later_is_named() -> None:
    source = opened(Wrong(KeyError("x"), at=17), explain=lambda error: f"told {type(error).__name__}")
    with pytest.raises(DataError, match="^training sample 17: told KeyError$"):
        epoch_of(source)


def test_other_ranks_are_told() -> None:
    told: list[Any] = []

    def share(value: Any, error: Exception | None) -> Any:
        told.append(value)
        return told[0]

    make = partial(open_supplied, name="mine", seed=3, dtype=torch.float32, share=share)
    first = make(lambda: (Noisy(), Noisy(5)), reads=(True, True))
    between = make(lambda: pytest.fail("it reads nothing"), reads=(False, False))
    last = make(lambda: (Noisy(), Noisy(5)), reads=(False, True))
    assert told[1] is None
    assert list(between.train_batches(4, epoch=0, part=Part(False, False))) == [(None, None)] * 6
    assert torch.equal(between.example(3)[0], first.example(3)[0])
    targets = [y for _, y in last.train_batches(4, epoch=0, part=Part(inputs=False))]
    assert same(targets, [y for _, y in first.train_batches(4, epoch=0)])
    with pytest.raises(ValueError, match="made 22 training and 5 test samples here, and 23 and 5 in the first process"):
        make(lambda: (Noisy(22), Noisy(5)), reads=(False, True))
