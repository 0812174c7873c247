"""Checkpoints taken up by other processes: exact ones to the bit, portable ones at other numbers of stages, replicas and engines.

The runs are in `rank_programs`; those with one rank are runs of the local engine.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import adamw, assert_close, clone, network, pipeline, scheduler
from launching import Server, run_ranks
from rank_programs import OPTIMIZERS
from saving_programs import STOPS, Cell, assert_same_values, smooth, ten
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

import dtrp
from dtrp.saving import inspect, read_state

pytestmark = pytest.mark.timeout(600)
MATRIX: list[Cell] = list(itertools.product(dtrp.list_methods(), (1, 2, 4), (1, 4), OPTIMIZERS))
# Every method once, and one stage; the whole of it is `test_the_whole_matrix`.
SOME: list[Cell] = [
    (method, (2, 4)[i % 2], (1, 4, 4)[i % 3], ("sgd", "adamw")[i // 2 % 2])
    for i, method in enumerate(dtrp.list_methods())
]
SOME += [("dtrp", 1, 4, "adamw"), ("dtrp", 4, 4, "adamw"), ("fdg", 4, 1, "sgd")]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def launch(
    server: Server, folder: Path, num_ranks: int, program: str, *arguments: Any, timeout_s: float = 120.0
) -> str:
    """What the ranks have printed; all have ended well."""
    outcomes = run_ranks(server, folder, num_ranks, program, *arguments, timeout_s=timeout_s)
    assert [outcome.returncode for outcome in outcomes] == [0] * num_ranks, outcomes
    return "".join(outcome.out for outcome in outcomes)


def check_cells(server: Server, folder: Path, ranks: int, cells: list[Cell], timeout_s: float = 240.0) -> list[Any]:
    """The kinds of places at which runs were left: (mini-batches, in flight, whether gradients were partly there)."""
    launch(server, folder, ranks, "save_at_stops", cells, timeout_s=timeout_s)
    said = launch(server, folder, ranks, "go_on_from_stops", cells, timeout_s=timeout_s)
    assert said.count("all the same") == ranks
    whole = torch.load(folder / "whole0.pt", weights_only=False)
    return [kind for each in whole for kind in each["kinds"]]


def check_kinds(kinds: list[Any], num_cells: int) -> None:
    """Runs were left in every kind of place."""
    assert len(kinds) == num_cells * len(STOPS)
    assert any(partly for _, _, partly in kinds), "within a mini-batch"
    assert all(not in_flight for n, in_flight, _ in kinds if n == 6), "after a flush"
    assert {in_flight for _, in_flight, _ in kinds} >= {0, 1}
    assert max(in_flight for _, in_flight, _ in kinds) >= 3


@pytest.mark.full
def test_one_process_after_another(server: Server, tmp_path: Path) -> None:
    check_kinds(check_cells(server, tmp_path, 1, SOME), len(SOME))


@pytest.mark.full
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.full)])
def test_ranks_after_ranks(server: Server, tmp_path: Path, ranks: int) -> None:
    cells = [cell for cell in SOME if cell[1] == ranks and cell[0] in ("dtrp", "fdg", "adl", "gpipe", "spectrain")]
    assert cells
    check_cells(server, tmp_path, ranks, cells)


@pytest.mark.full
@pytest.mark.parametrize(
    ("method", "engine", "num_stages"), list(itertools.product(dtrp.list_methods(), ("local", "ranks"), (1, 2, 4)))
)
def test_the_whole_matrix(server: Server, tmp_path: Path, method: str, engine: str, num_stages: int) -> None:
    if engine == "ranks" and num_stages == 1:
        pytest.skip("one rank is the local engine")
    cells = [cell for cell in MATRIX if cell[:2] == (method, num_stages)]
    check_cells(server, tmp_path, num_stages if engine == "ranks" else 1, cells)


@pytest.mark.full
@pytest.mark.parametrize("stop", [3, 11])
def test_a_loader_with_workers_goes_on_with_what_was_left(server: Server, tmp_path: Path, stop: int) -> None:
    launch(server, tmp_path, 1, "train_from_a_loader", stop, False)
    launch(server, tmp_path, 1, "train_from_a_loader", stop, True)
    whole, rest = (torch.load(tmp_path / f"loaded{resumes}.pt", weights_only=False) for resumes in (False, True))
    assert len(whole[0]) == 16
    assert rest[0] == whole[0][stop:]
    assert all(torch.equal(a, b) for a, b in zip(rest[1], whole[1][stop:], strict=True))
    assert_same_values(rest[2], whole[2], "weights")


# -- portable -----------------------------------------------------------------------------------------------------


def drained_at(num_stages: int, state: dict[str, Any], optimizer: str) -> dtrp.Pipeline:
    """A run of these weights, optimizer states and rates at another K, made without any loading of the library's."""
    model = smooth()
    model.load_state_dict(state["model"])
    pipe = pipeline(model, OPTIMIZERS[optimizer], num_stages=num_stages, method="dtrp", num_microbatches=2)
    names = {id(p): name for name, p in model.named_parameters()}
    for stage in pipe._engine.stages:
        assert stage.optimizer is not None
        for group in stage.optimizer.param_groups:
            for p in group["params"]:
                stage.optimizer.state[p] = clone(state["optimizer"]["state"][names[id(p)]])
            group["lr"] = 0.05 / (1 + 5 / 10)
        stage.lr_scheduler.last_epoch = 5
    return pipe


def losses_of(pipe: dtrp.Pipeline) -> list[Tensor | None]:
    return [pipe.step(x, y) for x, y in ten()[5:]]


@pytest.mark.full
@pytest.mark.sampled(2)
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_from_four_ranks_to_any_number_of_stages(server: Server, tmp_path: Path, optimizer: str) -> None:
    """The next losses are those of the drained run there."""
    launch(server, tmp_path, 4, "drain_and_save", optimizer)
    state = torch.load(tmp_path / "drained.pt", weights_only=False)
    found = inspect(tmp_path / "saved")
    assert (found.kind, found.num_stages, found.num_updates, found.manifest["engine"]) == (
        "portable",
        4,
        5,
        "distributed",
    )
    want = {}
    for num_stages in (1, 2, 3):
        torch.manual_seed(9)
        pipe = pipeline(smooth(), OPTIMIZERS[optimizer], num_stages=num_stages, method="dtrp", num_microbatches=2)
        pipe.load(tmp_path / "saved")
        own, want[num_stages] = losses_of(pipe), losses_of(drained_at(num_stages, state, optimizer))
        assert all(torch.equal(a, b) for a, b in zip(own, want[num_stages], strict=True)), num_stages
    assert not torch.equal(want[1][-1], want[3][-1]), "a delay changes what is learned"

    launch(server, tmp_path, 2, "next_losses", optimizer)
    own = torch.load(tmp_path / "losses.pt")
    assert all(torch.equal(a, b) for a, b in zip(own, want[2], strict=True))

    bare = smooth()
    read = read_state(tmp_path / "saved")
    bare.load_state_dict(read["model"])
    plain = OPTIMIZERS[optimizer](list(bare.parameters()))
    rates = scheduler(plain)
    set_optimizer_state_dict(bare, plain, read["optimizer"])
    rates.load_state_dict(read["scheduler"])
    for n, ((x, y), loss) in enumerate(zip(ten()[5:], want[1], strict=True)):
        assert loss is not None
        total = 0.0
        for part, target in zip(x.tensor_split(2), y.tensor_split(2), strict=True):
            term = nn.functional.cross_entropy(bare(part), target) * (len(target) / len(y))
            term.backward()
            total = total + term.detach()
        assert torch.equal(torch.as_tensor(total), loss), n
        plain.step()
        plain.zero_grad()
        rates.step()


# -- replicas -----------------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.sampled(2)
@pytest.mark.parametrize(("method", "parts"), [("dtrp", 2), pytest.param("fdg", 1, marks=pytest.mark.full), ("bp", 2)])
def test_replicas_go_on_to_the_bit(server: Server, tmp_path: Path, method: str, parts: int) -> None:
    launch(server, tmp_path, 4, "save_replicas", method, parts)
    found = inspect(tmp_path / "portable")
    assert (found.num_replicas, found.num_stages, found.num_updates) == (2, 2, 10)
    state = torch.load(tmp_path / "state.pt", weights_only=False)
    for num_stages in (1, 3):  # without replicas
        pipe = pipeline(network(), adamw, num_stages=num_stages, method="fr")
        pipe.load(tmp_path / "portable")
        own = pipe.state_dict()
        assert_same_values(own["model"], state["model"], "model")
        assert_same_values(own["optimizer"]["state"], state["optimizer"]["state"], "optimizer")
        assert own["scheduler"]["last_epoch"] == own["num_updates"] == 10
        pipe.step(*ten()[0])
    with pytest.raises(
        dtrp.CheckpointError, match="was saved with 2 replicas, and this pipeline has 1; .*portable=True"
    ):
        pipeline(network(), adamw, num_stages=2, method=method, num_microbatches=parts).load(tmp_path / "saved")


@pytest.mark.full
@pytest.mark.usefixtures("float64")
def test_without_replicas_and_then_with(server: Server, tmp_path: Path) -> None:
    pipe = pipeline(smooth(), adamw, num_stages=3, method="dtrp")
    for x, y in ten()[:5]:
        pipe.step(x, y)
    pipe.save(tmp_path / "alone", portable=True)
    want = pipe.state_dict()
    bp = pipeline(smooth(), adamw, num_stages=2, method="bp")
    bp.load(tmp_path / "alone")
    bp.save(tmp_path / "exact")
    said = launch(server, tmp_path, 4, "load_in_replicas")
    assert said.count("was saved with 1 replicas, and this pipeline has 2") == 4, said
    state, losses = torch.load(tmp_path / "loaded.pt", weights_only=False)
    assert_same_values(state["model"], want["model"], "model")
    assert_same_values(state["optimizer"]["state"], want["optimizer"]["state"], "optimizer")
    alone = {str(i): loss for i, loss in enumerate(losses_of(bp))}
    assert_close({str(i): loss for i, loss in enumerate(losses)}, alone)
