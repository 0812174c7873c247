"""The forms in which scripts call `ScheduleDTRP`; what the ranks run is in `drop_in_forms`."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from drop_in_forms import CASES, TIED, DropsAtTheEnd, plain_tied, with_statistics
from drop_in_programs import WIDTH, Block, cross_entropy, numbers
from helpers import assert_close, assert_same
from launching import Server, of_ranks, results_of_cases, shared_folder
from torch import Tensor, nn

from dtrp.pipelining.traced import Traced

Ranks = list[dict[str, Any]]


@pytest.fixture(scope="session")
def ranks_of(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Ranks]:
    """What each of two ranks came to in a case."""
    folder = shared_folder(tmp_path_factory.getbasetemp()) / "drop-in-forms"
    return lambda name: of_ranks(results_of_cases(server, folder, 2, "drop_in_forms", list(CASES))[name])


def as_dict(values: list[Tensor]) -> dict[str, Tensor]:
    return {str(i): value for i, value in enumerate(values)}


def test_micro_batches_that_are_cut_already(ranks_of: Callable[[str], Ranks]) -> None:
    """To the bit as those that the schedule cuts."""
    for result in ranks_of("micro_batches"):
        for method in ("dtrp", "bp"):
            cut, whole = result[f"{method}, cut"], result[f"{method}, whole"]
            assert_same(cut["weights"], whole["weights"])
            assert_same(as_dict(cut["losses"]), as_dict(whole["losses"]))
            for a, b in zip(cut["outputs"], whole["outputs"], strict=True):
                assert (a is None and b is None) or torch.equal(a, b)


def test_micro_batches_as_torchs_schedule_takes_them(ranks_of: Callable[[str], Ranks]) -> None:
    ranks = ranks_of("micro_batches_by_torch")
    if not ranks:
        pytest.skip("this torch has no arg_mbs: 2.15 and later have it")
    for result in ranks:
        assert_close(result["ours"]["weights"], result["torch"]["weights"])
        assert_close(as_dict(result["ours"]["losses"]), as_dict(result["torch"]["losses"]))
    assert len(ranks[-1]["ours"]["losses"]) == 2


def test_forwards_alone(ranks_of: Callable[[str], Ranks]) -> None:
    """In the mode that the modules are in, as the whole model does them, micro-batch by micro-batch."""
    ranks = ranks_of("forwards_alone")
    model = nn.Sequential(with_statistics(0), with_statistics(1)).double()
    for stage, result in zip(model, ranks, strict=True):
        stage.load_state_dict(result["module"])
    parts = ranks[0]["x"].tensor_split(4)
    with torch.no_grad():
        trained = torch.cat([model(part) for part in parts])
        for stage, result in zip(model, ranks, strict=True):
            assert_close(result["moved"], stage.state_dict())
        evaluated = model.eval()(ranks[0]["x"])
    first, last = (result["outputs"] for result in ranks)
    assert set(first.values()) == {None}
    assert_close({"": last["train"]}, {"": trained})
    for name in ("eval", "step in eval"):
        assert_close({"": last[name]}, {"": evaluated})
    for result in ranks:
        assert_same(result["moved"], result["after"])
        assert result["counts"][0] == 0
        assert result["counts"][1] is None
        assert torch.equal(result["kept"], torch.ones(WIDTH, WIDTH).double()), "gradients stay the caller's"
    a, b = ranks[1]["drawn"]
    assert not torch.equal(a, b), "dropout draws anew"


def test_forwards_alone_beside_a_schedule_that_trains(ranks_of: Callable[[str], Ranks]) -> None:
    assert all(result["same"] for result in ranks_of("forwards_beside_training"))


# -- traced stages --------------------------------------------------------------------------------------------


def test_eval_of_traced_stages_that_know_no_mode(ranks_of: Callable[[str], Ranks]) -> None:
    """Where one stage's graph has dropout all ranks refuse, and go on."""
    ranks = ranks_of("traced_eval")
    for result in ranks:
        assert re.match(
            r"NotImplementedError: eval\(\) .* aten\.dropout\.default draws random numbers in stage 1; .*dtrp\.split",
            result["refused"],
        )
    out, y = ranks[1]["out"], ranks[0]["y"]
    losses = [cross_entropy(a, b) for a, b in zip(out.tensor_split(2), y.tensor_split(2), strict=True)]
    assert_close(as_dict(ranks[1]["losses"]), as_dict(losses))
    torch.manual_seed(0)
    with torch.random.fork_rng():
        model = DropsAtTheEnd(0.1).double()
    assert ranks[1]["in_eval"].shape == model(ranks[0]["x"]).shape


class Draws(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class Writes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return x * 2


class Unlearned(nn.Module):
    """Has a region without gradients, whose operations lie in a graph of their own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.inner(x)
        return x + h


@pytest.mark.filterwarnings("ignore:The tensor attributes self._flat_weights:UserWarning")
@pytest.mark.parametrize(
    ("module", "shape", "what"),
    [
        (nn.Dropout(0.1), (3, 4), "aten.dropout.default draws random numbers"),
        (nn.Dropout(0.1).eval(), (3, 4), None),
        (nn.Dropout(0.0), (3, 4), None),
        (nn.BatchNorm1d(4), (3, 4), "num_batches_tracked"),
        (nn.BatchNorm1d(4).eval(), (3, 4), None),
        (nn.BatchNorm1d(4, track_running_stats=False), (3, 4), "takes statistics of the batch"),
        (nn.InstanceNorm1d(4), (3, 4, 5), None),
        (
            nn.InstanceNorm1d(4, track_running_stats=True),
            (3, 4, 5),
            "instance_norm.default takes statistics|num_batches",
        ),
        (nn.LSTM(4, 4, 2), (3, 4), None),
        (nn.LSTM(4, 4, 2, dropout=0.1), (3, 4), "lstm"),
        (nn.TransformerEncoderLayer(4, 2, 8, 0.0), (3, 5, 4), None),
        (nn.TransformerEncoderLayer(4, 2, 8, 0.1), (3, 5, 4), "draws random numbers"),
        (nn.RReLU(), (3, 4), "draws random numbers"),
        (Draws(), (3, 4), "draws random numbers"),
        (Writes(), (3, 4), "writes count"),
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)), (3, 4), None),
        (Unlearned(nn.Dropout(0.1)), (3, 4), "aten.dropout.default draws random numbers"),
        (Unlearned(Writes()), (3, 4), "writes inner.count"),
        (Unlearned(nn.Linear(4, 4)), (3, 4), None),
    ],
    ids=lambda value: re.sub(r"\s+", " ", str(value))[:40],
)
def test_operations_of_train_mode_alone(module: nn.Module, shape: tuple[int, ...], what: str | None) -> None:
    training = module.training
    torch.compiler.reset()  # torch 2.6 exports through the compiler, which counts models
    graph = torch.export.export(copy.deepcopy(module).train(training), (torch.randn(shape),)).module()
    found = Traced.of(graph).one_mode
    assert (found is None) == (what is None), found
    assert what is None or re.search(what, str(found))


@pytest.mark.parametrize("kind", TIED)
@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_shared_parameters_of_traced_stages(ranks_of: Callable[[str], Ranks], kind: str, optimizer: str) -> None:
    """Their gradients are added up, as in the whole model, and their values are those of the first stage."""
    torch.set_default_dtype(torch.float64)
    plain = plain_tied(kind, optimizer)
    for given in ("object", "function"):
        ranks = [result[f"{kind}, {optimizer}, {given}"] for result in ranks_of("shared_parameters")]
        for result in ranks:
            steps = 2 if given == "object" else 1  # another optimizer has another state
            for ours, wanted in zip(result["weights"][:steps], plain["weights"], strict=False):
                known = {name: t for name, t in ours.items() if name in wanted}
                assert known
                assert_close(known, {name: wanted[name] for name in known}, 1e-10)
            assert result["norm"] == pytest.approx(plain["norms"][3], rel=1e-10)
        assert plain["weights"][0].keys() <= {name for result in ranks for name in result["weights"][0]}
        for a, b in zip(ranks[1]["losses"], plain["losses"], strict=False):
            assert_close(as_dict(a), as_dict(b), 1e-10)


# -- norms of gradients ---------------------------------------------------------------------------------------


def test_norms_of_gradients_as_a_plain_loop_has_them(ranks_of: Callable[[str], Ranks]) -> None:
    ranks = ranks_of("gradient_norms")
    torch.set_default_dtype(torch.float64)
    for limit in (None, 0.1):
        torch.manual_seed(0)
        blocks = [Block(), Block()]
        model = nn.Sequential(*blocks)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(1)
        for n in range(6):
            (x,), _, y = numbers(8)
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            norms = [norm_of(block) for block in blocks]
            for rank, norm in enumerate(norms):
                total, own = ranks[rank][f"bp, {limit}"]["seen"][n]
                assert own == pytest.approx(norm, rel=1e-10)
                assert total == pytest.approx(math.hypot(*norms), rel=1e-10), "as it was before it was clipped"
                if limit:
                    nn.utils.clip_grad_norm_(blocks[rank].parameters(), limit)
            optimizer.step()
    for rank, result in enumerate(ranks):
        assert result["bp, None"]["before"] == (None, {rank: None})


def norm_of(module: nn.Module) -> float:
    return float(nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None]))


def test_the_norm_over_all_stages_is_of_one_mini_batch(ranks_of: Callable[[str], Ranks]) -> None:
    """By a method that does not wait the stages' last updates are of other mini-batches than each other's."""
    first, last = (result["dtrp, None"]["seen"] for result in ranks_of("gradient_norms"))
    totals = [total for total, _ in first]
    assert totals == [total for total, _ in last]
    assert totals[0] is None, "stage 0 has made no update yet"
    by_minibatch = [[own for _, own in seen] for seen in (first, last)]
    # After step n the last stage has the norm of mini-batch n, stage 0 that of n - 1.
    for n in range(1, 6):
        assert totals[n] == pytest.approx(math.hypot(by_minibatch[0][n], by_minibatch[1][n - 1]), rel=1e-12)
    assert totals[6] == pytest.approx(math.hypot(by_minibatch[0][6], by_minibatch[1][5]), rel=1e-12)


# -- habits of scripts ----------------------------------------------------------------------------------------


def test_accumulation_over_steps_is_told(ranks_of: Callable[[str], Ranks]) -> None:
    for result in ranks_of("accumulation"):
        for method in ("bp", "dtrp"):
            told, silent = result[f"{method}, 2"], result[f"{method}, 1"]
            assert silent["said"] == []
            (said,) = told["said"]
            assert re.match(
                r"SGD\.step\(\) after 2 calls of step\(\): each has made an update.* 2 times the n_microbatches", said
            )
            assert told["updates"] == silent["updates"] == 8
            assert_same(told["weights"], silent["weights"])


def test_under_no_grad_it_trains(ranks_of: Callable[[str], Ranks]) -> None:
    for result in ranks_of("without_gradients"):
        assert_same(result["True"], result["False"])
