"""What ranks do together along their chain, each rank a thread, with queues for links."""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest
import torch

from dtrp.comm.collectives import Collectives
from dtrp.comm.gradient_averaging import _BUCKET_BYTES, _buckets
from dtrp.comm.link import Connection, Receiver, Sender
from dtrp.comm.message import Kind, Message, Note
from dtrp.errors import WorkerError
from dtrp.launch.ranks import Ranks


class FakeLink:
    """Both ends of a connection."""

    def __init__(self, peer: int) -> None:
        self.peer = peer
        self.messages: queue.Queue[Message] = queue.Queue()

    def send(self, kind: Kind, note: Note, tensor: Any = None) -> None:
        self.messages.put(Message(kind, note, tensor))

    def peek(self) -> Message | None:
        return self.messages.queue[0] if self.messages.qsize() else None


class FakeWaiting:
    def receive(self, link: Receiver, what: Callable[[], str]) -> Message:
        return cast(FakeLink, link).messages.get(timeout=5)

    def wait_for_room(self, link: Sender) -> None:
        pass


def connection(receiver: FakeLink, sender: FakeLink) -> Connection:
    return Connection(cast(Receiver, receiver), cast(Sender, sender))


def chains(rows: tuple[tuple[int, ...], ...]) -> list[Collectives]:
    """One for each rank, connected."""
    ranks = [rank for row in rows for rank in row]
    right = [FakeLink(rank) for rank in ranks[:-1]]  # from each rank to the one after it
    left = [FakeLink(rank) for rank in ranks[1:]]
    made = []
    for place, rank in enumerate(ranks):
        before = connection(right[place - 1], left[place - 1]) if place else None
        after = connection(left[place], right[place]) if place + 1 < len(ranks) else None
        made.append(Collectives(Ranks(rows, rank), FakeWaiting(), before, after))
    return made


def on_all(members: list[Collectives], job: Callable[[int, Collectives], Any]) -> list[Any]:
    """What ``job`` returns on each rank, or the error that it raises."""

    def safely(rank: int) -> Any:
        try:
            return job(rank, members[rank])
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(members)) as pool:
        return list(pool.map(safely, range(len(members))))


ROWS = [((0,),), ((0, 1, 2),), ((0, 1), (2, 3))]


@pytest.mark.parametrize("rows", ROWS)
def test_values_go_where_they_should(rows: tuple[tuple[int, ...], ...]) -> None:
    members = chains(rows)
    num = len(members)
    assert on_all(members, lambda rank, chain: chain.all_gather("m", rank * 10)) == [[10 * r for r in range(num)]] * num
    assert on_all(members, lambda rank, chain: chain.gather("m", rank)) == [list(range(num)), *[None] * (num - 1)]
    assert on_all(members, lambda rank, chain: chain.broadcast("m", rank + 7)) == [7] * num
    values = [f"for {rank}" for rank in range(num)]
    assert on_all(members, lambda rank, chain: chain.scatter("m", None if rank else values)) == values
    lasts = [row[-1] for row in rows for _ in row]
    assert on_all(members, lambda rank, chain: chain.broadcast_from_last_stage("m", rank)) == lasts


@pytest.mark.parametrize("rows", ROWS)
def test_stages_hand_over(rows: tuple[tuple[int, ...], ...]) -> None:
    num_stages = len(rows[0])

    def job(rank: int, chain: Collectives) -> Any:
        stage = rank % num_stages
        return chain.through_stages("infer", torch.tensor([1.0]) if stage == 0 else None, lambda x: 10 * x + stage)

    want = 1
    for stage in range(num_stages):
        want = 10 * want + stage
    results = on_all(chains(rows), job)
    for rank, result in enumerate(results):
        last = rank % num_stages == num_stages - 1
        assert (result == torch.tensor([float(want)])) if last else result is None


@pytest.mark.parametrize(
    ("method", "others"),
    [("flush", "save"), ("infer", "save"), ("save", "infer")],
    ids=["objects", "tensors", "object"],
)
def test_a_rank_that_does_something_else_is_told(method: str, others: str) -> None:
    def call(chain: Collectives, name: str) -> Any:
        if name == "infer":
            return chain.through_stages(name, torch.ones(1), lambda x: x)
        return chain.broadcast(name, 0)

    _, error = on_all(chains(((0, 1),)), lambda rank, chain: call(chain, method if rank else others))
    assert isinstance(error, WorkerError)
    with pytest.raises(WorkerError, match=rf"rank 0 has called {others}\(\) where this rank has called {method}\(\)"):
        raise error


def test_what_neighbours_do_meanwhile() -> None:
    first, second, third = chains(((0, 1, 2),))
    assert second.neighbours_methods() == ""
    first.broadcast("flush", 0)
    third.gather("save", 0)
    assert second.neighbours_methods() == "; rank 0 is in flush() meanwhile; rank 2 is in save() meanwhile"
    first, second, third = chains(((0, 1, 2),))
    first.through_stages("infer", torch.ones(1), lambda x: x)
    assert second.neighbours_methods() == "; rank 0 is in infer() meanwhile"


def test_buckets_are_of_one_dtype_and_not_larger_than_they_may() -> None:
    quarter = _BUCKET_BYTES // 16
    like = [torch.empty(size, dtype=dtype) for size, dtype in [
        (quarter, torch.float32), (3 * quarter, torch.float32), (1, torch.float32), (1, torch.float64), (2, torch.float64),
        (8 * quarter, torch.float64), (1, torch.float64),
    ]]  # fmt: skip
    buckets = _buckets(like)
    assert [[len(t) for t in bucket] for bucket in buckets] == [[quarter, 3 * quarter], [1], [1, 2], [8 * quarter], [1]]
    assert all(a is b for a, b in zip([t for bucket in buckets for t in bucket], like, strict=True))
    assert _buckets([]) == []
