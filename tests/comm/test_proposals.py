"""What ranks agree on while they train: on all after the same step, whoever proposed it and when."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import minibatches, network, pipeline, sgd
from launching import Server, run_ranks

from dtrp.comm.proposals import Proposals, word_from_sums, word_to_bits

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.mark.full
@pytest.mark.sampled(6)
@pytest.mark.parametrize(
    ("num_replicas", "proposals", "words", "method"),
    [
        (1, [[0, 5, 2]], {2}, "dtrp"),
        (1, [[1, 0, 1], [3, 9, 2]], {1, 2}, "dtrp"),
        (1, [[3, 1, 2]], {2}, "dgl"),
        (2, [[3, 5, 1]], {1}, "dtrp"),
        (2, [[0, 7, 2], [1, 7, 2], [2, 7, 2], [3, 7, 2], [3, 7, 1]], {2, 1, 3}, "dtrp"),
    ],
)
def test_all_ranks_agree_after_the_same_step(
    server: Server, tmp_path: Path, num_replicas: int, proposals: list[list[int]], words: set[int], method: str
) -> None:
    outcomes = run_ranks(server, tmp_path, 4, "agree", num_replicas, proposals, method, timeout_s=60)
    assert [outcome.returncode for outcome in outcomes] == [0] * 4, outcomes
    assert len({outcome.out for outcome in outcomes}) == 1
    said, saved_after = json.loads(outcomes[0].out)
    assert saved_after == next(step + 1 for step, word in enumerate(said) if word)
    assert {word for word in said if word} <= words
    heard = 0
    for word in said:
        heard |= word
    assert heard == word_from_sums(
        [sum(bits) for bits in zip(*(word_to_bits(word) for _, _, word in proposals), strict=True)]
    )
    first = min(when for _, when, _ in proposals)
    # Where no gradients travel, the first stage may be a few messages a stage further.
    assert first <= next(step for step, word in enumerate(said) if word) <= first + (8 if method == "dtrp" else 14)
    if proposals == [[0, 5, 2]] and num_replicas == 1:
        assert said == [0] * 5 + [2] + [0] * 14, "the first rank decides at once, once"


def test_one_process_agrees_with_itself() -> None:
    with pipeline(network(), sgd, num_stages=2, method="dtrp") as pipe:
        (x, y), (u, v) = minibatches(2)
        assert pipe.agreed == 0
        pipe.propose(1)
        pipe.propose(2)
        pipe.step(x, y)
        assert pipe.agreed == 3
        pipe.step(u, v)
        assert pipe.agreed == 0
        with pytest.raises(ValueError, match="word=4: propose 1, 2, or 3 for both"):
            pipe.propose(4)


def test_words() -> None:
    proposals = Proposals()
    assert proposals.take() == 0
    proposals.add(1)
    proposals.add(2)
    assert [proposals.take(), proposals.take()] == [3, 0]
    assert [word_from_sums(word_to_bits(word)) for word in range(4)] == [0, 1, 2, 3]
    assert word_from_sums(torch.tensor([0.0, 3.0]).tolist()) == 2
