"""K workers: equal to the local engine to the bit, and an end that every rank hears of.

The runs are in `rank_programs`; one launch runs many of them, and its results are read by the tests, on all workers
of pytest-xdist. Tests of failure have a launch each.
"""

from __future__ import annotations

import functools
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_close, assert_same
from launching import (
    RANK_PROGRAMS,
    Outcome,
    Server,
    complaints,
    of_ranks,
    results_of_cases,
    run_ranks,
    runs,
    shared_folder,
    start_ranks,
    start_torchrun,
)
from rank_programs import (
    CASES,
    HUGGING_FACE,
    KINDS,
    MATRIX,
    ORACLES,
    OTHER_KINDS,
    REPLICAS,
    SOME_OF_THE_MATRIX,
    SPECIAL,
    SPLITS,
    SUBSETS,
    TRANSFORMERS,
    matrix_case,
    run_case,
)
from torch import Tensor

pytestmark = pytest.mark.timeout(300)


Results = dict[str, list[Any]]


@pytest.fixture(scope="session")
def results_of(
    server: Server, tmp_path_factory: pytest.TempPathFactory, selected: Callable[[Sequence[str]], tuple[str, ...]]
) -> Callable[..., Results]:
    """What the ranks came to in a group of cases; run once, whoever of pytest-xdist's workers asks first."""
    shared = shared_folder(tmp_path_factory.getbasetemp())

    @functools.cache
    def results_of(group: str, names: tuple[str, ...]) -> Results:
        (num_ranks,) = {CASES[name].num_ranks for name in names}
        return results_of_cases(server, shared / group, num_ranks, "cases", names)

    return lambda group, names: results_of(group, selected(names))


def ranks_and_reference(name: str, results: Results) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(what each rank that took part came to, what one process comes to)."""
    return of_ranks(results[name]), run_case(name)


def check_losses(losses: list[list[Tensor | None]], want: list[Tensor], *, on_all: bool = False) -> None:
    for rank, own in enumerate(losses):
        if on_all or rank == len(losses) - 1:
            assert len(own) == len(want)
            for n, (a, b) in enumerate(zip(own, want, strict=True)):
                assert a is not None
                assert torch.equal(a, b), f"loss {n}: {a} and {b}"
                assert not a.requires_grad
        else:
            assert own == [None] * len(want)


def check_equal(name: str, results: Results, **options: bool) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Weights, losses and delays of all ranks are those of one process, to the bit."""
    ranks, want = ranks_and_reference(name, results)
    check_losses([result["losses"] for result in ranks], want["losses"], **options)
    for stage, result in enumerate(ranks):
        assert_same(result["weights"], want["weights"])
        assert result["delays"] == {stage: want["delays"][stage]}
        assert result["gradients"] == [], "p.grad is None outside U"
    return ranks, want


# -- equal to one process -------------------------------------------------------------------------------------


def check_matrix(results_of: Callable[..., Results], cell: tuple[str, int, int, str], matrix: list[Any]) -> None:
    names = [matrix_case(*other) for other in matrix if other[1] == cell[1]]
    ranks, _ = check_equal(matrix_case(*cell), results_of(f"matrix{cell[1]}-{len(matrix)}", names))
    assert len(ranks) == cell[1]


@pytest.mark.sampled(24)
@pytest.mark.parametrize("cell", SOME_OF_THE_MATRIX, ids=lambda cell: matrix_case(*cell))
def test_it_equals_the_local_engine_to_the_bit(
    results_of: Callable[..., Results], cell: tuple[str, int, int, str]
) -> None:
    check_matrix(results_of, cell, SOME_OF_THE_MATRIX)


@pytest.mark.full
@pytest.mark.parametrize("cell", MATRIX, ids=lambda cell: matrix_case(*cell))
def test_the_whole_matrix_equals_the_local_engine_to_the_bit(
    results_of: Callable[..., Results], cell: tuple[str, int, int, str]
) -> None:
    check_matrix(results_of, cell, MATRIX)


@pytest.fixture
def one_by_one(
    results_of: Callable[..., Results], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Results]:
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    everything = [*KINDS, *SPECIAL, *SUBSETS]

    def results(name: str) -> Results:
        num_ranks = CASES[name].num_ranks
        return results_of(f"special{num_ranks}", [n for n in everything if CASES[n].num_ranks == num_ranks])

    return results


@pytest.mark.full
@pytest.mark.sampled(24)
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_model_equals_the_local_engine(one_by_one: Callable[[str], Results], name: str) -> None:
    check_equal(name, one_by_one(name))


@pytest.mark.full
@pytest.mark.parametrize("name", OTHER_KINDS)
def test_and_by_the_other_method(results_of: Callable[..., Results], name: str) -> None:
    check_equal(name, results_of("other kinds", OTHER_KINDS))


@pytest.mark.sampled(9)
@pytest.mark.parametrize("name", SPLITS)
def test_every_split_model_equals_the_local_engine(results_of: Callable[..., Results], name: str) -> None:
    check_equal(name, results_of("splits", SPLITS))


@pytest.mark.full
@pytest.mark.parametrize(
    "name", [HUGGING_FACE[0], *(pytest.param(name, marks=pytest.mark.full) for name in HUGGING_FACE[1:])]
)
def test_transformers_equal_the_local_engine(results_of: Callable[..., Results], name: str) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed; pip install 'dtrp[transformers]'")
    check_equal(name, results_of(name, [name]))


@pytest.mark.full
@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "name",
    [
        n if n in ("oracle densenet, K=4", "oracle frozen first half, K=2") else pytest.param(n, marks=pytest.mark.full)
        for n in ORACLES
    ],
)
def test_with_perfect_prediction_split_models_are_backpropagation(
    results_of: Callable[..., Results], name: str
) -> None:
    """The rest of the table of models, K and engines."""
    kind, num_ranks = name.removeprefix("oracle ").rpartition(", K=")[0], CASES[name].num_ranks
    if kind in TRANSFORMERS:
        pytest.importorskip("transformers", reason="transformers is not installed; pip install 'dtrp[transformers]'")
    check_equal(name, results_of(f"{kind}{num_ranks}", [name]))


@pytest.mark.full
def test_the_default_compiler_on_ranks(results_of: Callable[..., Results]) -> None:
    """Compiled code of two processes need not be the same to the bit."""
    name = "stages compiled as by default"
    ranks, want = ranks_and_reference(name, results_of(name, [name]))
    for result in ranks:
        for key, value in result["weights"].items():
            torch.testing.assert_close(value, want["weights"][key], rtol=1e-4, atol=1e-5)
    for a, b in zip(ranks[-1]["losses"], want["losses"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.sampled(14)
@pytest.mark.parametrize("name", SPECIAL)
def test_case(one_by_one: Callable[[str], Results], name: str) -> None:
    ranks, want = check_equal(name, one_by_one(name), on_all=name.startswith("the loss on all ranks"))
    last = ranks[-1]
    if "infer" in want:
        assert all(result["infer"] == [None] * 4 for result in ranks[:-1])
        for a, b in zip(last["infer"], want["infer"], strict=True):
            assert torch.equal(a, b)
    for key in ("model in flight", "saved", "continued"):
        if key in want:
            for result in ranks:
                assert_same(result[key], want[key])
    for key in ("state in flight", "state"):
        if key in want:
            for result in ranks:
                check_state(result[key], want[key])
    for key in ("seed", "num_updates"):
        if key in want:
            assert [result[key] for result in ranks] == [want[key]] * len(ranks)
    for k, result in enumerate(ranks):
        if "keeps" in want:
            assert result["keeps"] == {k: want["keeps"][k]}
            assert (set(want["keeps"].values()) == {"graph"}) == name.endswith(f"{10**9}")
        if "own" in want:
            trained = [key for key in want["own"] if key.startswith(f"{k}.")]
            assert_same({key: result["own"][key] for key in trained}, {key: want["own"][key] for key in trained})
        if "asked" in want:
            assert result["asked"] == [call for call in want["asked"] if call[0] == k]
            assert k == len(ranks) - 1 or len(result["asked"]) >= 6


def check_state(a: Any, b: Any) -> None:
    """Two state dicts, however deep."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            check_state(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            check_state(x, y)
    elif isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif not callable(a):
        assert a == b


@pytest.mark.parametrize("name", SUBSETS)
def test_some_of_the_ranks(one_by_one: Callable[[str], Results], name: str) -> None:
    ranks, _ = check_equal(name, one_by_one(name))
    assert len(ranks) == 2


@pytest.mark.sampled(12)
@pytest.mark.parametrize("name", REPLICAS)
def test_replicas_equal_one_process_with_their_shards_put_together(
    results_of: Callable[..., Results], name: str
) -> None:
    """Micro-batch j is the replicas' j-th parts concatenated; 1e-12 in float64."""
    ranks, want = ranks_and_reference(name, results_of("replicas", list(REPLICAS)))
    assert len(ranks) == 4
    losses = dict(enumerate(want["losses"]))
    for rank, result in enumerate(ranks):
        assert_close(result["weights"], want["weights"])
        assert_same(result["weights"], ranks[0]["weights"])
        if rank % 2:
            assert_close(dict(enumerate(result["losses"])), losses)
        else:
            assert result["losses"] == [None] * len(losses)
        if "fewer than A" not in name:  # where a replica has fewer micro-batches than the process that stands for both
            assert result["delays"] == {rank % 2: want["delays"][rank % 2]}


SCRIPT = """
import sys
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import dtrp

torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
data = TensorDataset(torch.randn(70, 6), torch.randint(3, (70,)))
loader = DataLoader(data, batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(3))
pipe = dtrp.Pipeline(model, lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9), F.cross_entropy,
                     num_stages=2, method="dtrp", num_microbatches=2)
for epoch in range(2):
    for x, y in loader:
        loss = pipe.step(x, y)
        if loss is not None:
            print(epoch, f"{loss.item():.17g}")
pipe.flush()
out = pipe.infer(data.tensors[0])
if out is not None:
    print((out.argmax(1) == data.tensors[1]).sum().item())
pipe.save_model(sys.argv[1])
"""


def test_the_same_script_in_one_process_and_under_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    with start_torchrun(tmp_path / "run", 2, script, str(tmp_path / "ranks.pt")) as torchrun:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(script), str(tmp_path / "one.pt")]
        one = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
        assert one.returncode == 0, one.stderr
        assert torchrun.wait(120) == 0, torchrun.logs()
        assert not any(complaints(torchrun.read(rank)) for rank in range(2))
        assert [torchrun.read(rank, "stdout") for rank in range(2)] == ["", one.stdout]
    assert len(one.stdout.splitlines()) == 11
    assert_same(torch.load(tmp_path / "ranks.pt"), torch.load(tmp_path / "one.pt"))


# -- failure --------------------------------------------------------------------------------------------------


def check_ended(outcomes: list[Outcome], *patterns: str, skip: tuple[int, ...] = ()) -> None:
    """All ranks but those of ``skip`` ended by an error of their own whose last words match all patterns."""
    for rank, outcome in enumerate(outcomes):
        if rank in skip:
            continue
        assert outcome.returncode == 1, f"rank {rank}: {outcome.returncode}\n{outcome.err}"
        for pattern in patterns:
            assert re.search(pattern, outcome.last_line), f"rank {rank}: {pattern!r} is not in\n{outcome.err}"


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("where", "method", "stage", "context"),
    [
        ("forward", "dtrp", 2, False),
        ("forward", "fdg", 2, True),
        ("backward", "dtrp", 2, True),
        ("backward", "bp", 2, False),
        ("forward", "dtrp", 0, False),
        ("backward", "spectrain", 3, False),
    ],
)
def test_an_exception_in_a_stage_is_every_ranks(
    server: Server, tmp_path: Path, where: str, method: str, stage: int, context: bool
) -> None:
    outcomes = run_ranks(server, tmp_path, 4, "fail_in_stage", where, method, stage, context, timeout_s=15)
    place = rf"StageError: stage {stage}, {where} of micro-batch 5 \(mini-batch 5\)"
    check_ended(outcomes, place, "ValueError: the sensor is on fire")
    for outcome in outcomes:
        assert "raise ValueError" in outcome.err, "the cause's traceback"


@pytest.mark.parametrize(
    ("how", "message"),
    [("long", "FloatingPointError: overflow in layer 7, "), ("mute", "MuteError: <its message cannot be")],
)
def test_an_error_that_is_hard_to_tell_is_every_ranks(server: Server, tmp_path: Path, how: str, message: str) -> None:
    run_ranks(server, tmp_path, 3, "fail_at_length", how, timeout_s=20)
    for rank in range(3):
        stage, text, length = json.loads((tmp_path / f"heard{rank}.json").read_text())
        assert (stage, text.startswith(f"stage 1, forward of micro-batch 0 (mini-batch 0): {message}")) == (1, True)
        assert 0 < length < 20_000 or rank == 1, "what is long has been cut elsewhere"


def kill_a_worker(server: Server, folder: Path, num_ranks: int, method: str, victim: int, after_s: float) -> None:
    with start_ranks(server, folder, num_ranks, "train_until_killed", method) as ranks:
        ranks.await_ready()
        time.sleep(after_s)
        ranks.kill(signal.SIGKILL, victim)
        outcomes = ranks.wait(15)
    assert outcomes[victim].returncode == -signal.SIGKILL
    check_names_the_dead({r: o.err for r, o in enumerate(outcomes) if r != victim}, victim)
    check_ended(outcomes, rf"rank {victim} is gone", skip=(victim,))


def check_names_the_dead(logs: dict[int, str], victim: int) -> None:
    """Every log says of that rank, and of no other, that it is gone."""
    for rank, log in logs.items():
        named = {int(n) for n in re.findall(r"rank (\d+) (?:is gone|cannot be reached|has ended)", log)}
        assert named == {victim}, f"rank {rank} names {named}, gone is {victim}:\n{log}"


@pytest.mark.sampled(6)
@pytest.mark.parametrize(
    ("num_ranks", "method", "victim"), [(4, "dtrp", 2), (3, "bp", 0), (3, "fdg", 2), (2, "dtrp", 1)]
)
def test_a_killed_rank_is_named_by_all_others(
    server: Server, tmp_path: Path, num_ranks: int, method: str, victim: int
) -> None:
    after_s = random.SystemRandom().uniform(0, 0.3)
    kill_a_worker(server, tmp_path, num_ranks, method, victim, after_s)


@pytest.mark.full
def test_twenty_killed_ranks_at_random_moments(server: Server, tmp_path: Path) -> None:
    draw = random.Random(0)
    for i in range(20):
        num_ranks = draw.choice([2, 3, 4])
        victim, method = draw.randrange(num_ranks), draw.choice(["dtrp", "fdg", "bp", "dtrp-1f1b"])
        kill_a_worker(server, tmp_path / str(i), num_ranks, method, victim, draw.uniform(0, 1))


def kill_under_torchrun(folder: Path, num_ranks: int, victim: int) -> None:
    with start_torchrun(folder, num_ranks, RANK_PROGRAMS, "train_until_killed", str(folder), "dtrp") as torchrun:
        pids = torchrun.await_ready()
        began = time.monotonic()
        os.kill(pids[victim], signal.SIGKILL)
        status = torchrun.wait(60)
        check_gone(pids, began + 15)
        logs = {rank: torchrun.read(rank) for rank in range(num_ranks) if rank != victim}
        assert status != 0
        check_names_the_dead(logs, victim)
        for log in logs.values():
            assert f"rank {victim} is gone" in log.strip().rpartition("\n")[2], log


def check_gone(pids: list[int], deadline: float) -> None:
    while left := [pid for pid in pids if runs(pid)]:
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.02)


@pytest.mark.full
def test_a_killed_rank_is_named_under_torchrun(tmp_path: Path) -> None:
    kill_under_torchrun(tmp_path, 3, 2)


@pytest.mark.full
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_any_killed_rank_is_named_under_torchrun(tmp_path: Path, victim: int) -> None:
    kill_under_torchrun(tmp_path, 3, victim)


@pytest.mark.full
def test_no_process_is_left_when_the_agent_is_killed(tmp_path: Path) -> None:
    with start_torchrun(tmp_path, 2, RANK_PROGRAMS, "train_until_killed", str(tmp_path), "dtrp") as torchrun:
        pids = torchrun.await_ready()
        torchrun.agent.kill()
        torchrun.wait(5)
        check_gone(pids, time.monotonic() + 15)
        assert all("launcher" in torchrun.read(rank) for rank in range(2)), torchrun.logs()


@pytest.mark.parametrize("method", ["dtrp", "bp"])
def test_ctrl_c_ends_all_ranks(server: Server, tmp_path: Path, method: str) -> None:
    """As a terminal does it: SIGINT to every process."""
    with start_ranks(server, tmp_path, 3, "train_until_killed", method) as ranks:
        ranks.await_ready()
        ranks.kill(signal.SIGINT)
        outcomes = ranks.wait(10)
    for outcome in outcomes:
        assert outcome.returncode in (1, -signal.SIGINT, 130), outcome
        assert "KeyboardInterrupt" in outcome.last_line or "interrupted" in outcome.last_line, outcome.err
        assert "Fatal Python error" not in outcome.err


@pytest.mark.sampled(2)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("culprit", [0, 2])
def test_a_signal_to_one_rank_ends_all(server: Server, tmp_path: Path, culprit: int, number: signal.Signals) -> None:
    with start_ranks(server, tmp_path, 3, "train_until_killed", "dtrp") as ranks:
        ranks.await_ready()
        ranks.kill(number, culprit)
        outcomes = ranks.wait(10)
    assert outcomes[culprit].returncode not in (0, -signal.SIGABRT, -signal.SIGSEGV), outcomes[culprit]
    check_ended(outcomes, rf"rank {culprit}", skip=(culprit,))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("culprit", [0, 1, 2])
def test_an_exception_outside_the_pipeline_on_one_rank(server: Server, tmp_path: Path, culprit: int) -> None:
    outcomes = run_ranks(server, tmp_path, 3, "fail_outside", culprit, "raise", timeout_s=15)
    check_ended(outcomes, "KeyError: 'no such column'")
    check_ended(outcomes, rf"rank {culprit}", skip=(culprit,))


@pytest.mark.parametrize("how", ["sys.exit", "os._exit"])
def test_a_rank_that_exits(server: Server, tmp_path: Path, how: str) -> None:
    outcomes = run_ranks(server, tmp_path, 3, "fail_outside", 1, how, timeout_s=15)
    assert outcomes[1].returncode > 0
    check_ended(outcomes, r"rank 1\b", skip=(1,))


@pytest.mark.parametrize("flush", [True, False])
def test_a_script_that_ends_without_close(server: Server, tmp_path: Path, flush: bool) -> None:
    assert run_ranks(server, tmp_path, 3, "end_without_close", flush, timeout_s=10) == [Outcome(0, "6\n", "")] * 3


def test_a_child_of_multiprocessing_that_ends_without_close(server: Server, tmp_path: Path) -> None:
    assert run_ranks(server, tmp_path, 2, "end_in_a_child", timeout_s=10) == [Outcome(0, "0\n", "")] * 2


@pytest.mark.parametrize("culprit", [pytest.param(0, marks=pytest.mark.full), 2])
def test_a_wait_that_takes_too_long_says_who_waits_for_whom(server: Server, tmp_path: Path, culprit: int) -> None:
    """Whoever has waited longest speaks, and it may be a rank that waits for one that waits for the culprit."""
    outcomes = run_ranks(server, tmp_path, 4, "stall", culprit, timeout_s=15)
    check_ended(outcomes, r"rank \d, in step\(\) of mini-batch \d+, has waited 1 s for rank \d\b")
    check_ended(
        outcomes, r"(forward|backward) message of micro-batch \d+", rf"rank {culprit}, in step.*, waits for nobody"
    )


@pytest.mark.full
def test_a_stopped_rank_is_named_by_all_others(server: Server, tmp_path: Path) -> None:
    with start_ranks(server, tmp_path, 3, "train_until_killed", "dtrp", 1.0) as ranks:
        ranks.await_ready()
        ranks.kill(signal.SIGSTOP, 2)
        ranks.await_end(15, 0, 1)
        ranks.kill(signal.SIGKILL, 2)
        outcomes = ranks.wait(15)
    check_ended(outcomes, r"has waited 1 s for rank \d\b", "rank 2 does not answer", skip=(2,))


def test_a_rank_that_never_makes_its_pipeline(server: Server, tmp_path: Path) -> None:
    with start_ranks(server, tmp_path, 2, "wait_for_nobody") as ranks:
        outcomes = ranks.wait(15)
    assert outcomes[0].returncode == 1
    assert re.search(r"rank 0\b.*\b1 s\b", outcomes[0].last_line), outcomes[0].err


@pytest.mark.full
@pytest.mark.parametrize("victim", [1, pytest.param(2, marks=pytest.mark.full)])
def test_a_rank_that_is_killed_while_it_waits_for_a_late_one(server: Server, tmp_path: Path, victim: int) -> None:
    """Rank 0 hosts the store, so that when it gives up, the others may hear of that first."""
    late = 3 - victim
    with start_ranks(server, tmp_path, 3, "wait_for_a_late_one", late) as ranks:
        ranks.await_ready()
        ranks.kill(signal.SIGKILL, victim)
        (tmp_path / "go").touch()
        outcomes = ranks.wait(15)
    patterns = rf"rank [0{late}] has waited (3 s|in vain) for rank {victim}, which came and is not heard of any more"
    check_ended(outcomes, patterns, skip=(victim,))


@pytest.mark.full
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("where", ["before it comes", "joining", "making the first group", "making the second group"])
def test_a_rank_that_is_killed_at_the_start(server: Server, tmp_path: Path, victim: int, where: str) -> None:
    with start_ranks(server, tmp_path, 3, "die_at_the_start", victim, where) as ranks:
        outcomes = ranks.wait(15)
    check_ended(outcomes, rf"(in vain for|2 s for|within 2 s \() ?rank {victim}\b", skip=(victim,))


@pytest.mark.parametrize("where", ["joining", pytest.param("making the first group", marks=pytest.mark.full)])
def test_a_rank_that_is_told_to_end_at_the_start_names_who_is_missed(
    server: Server, tmp_path: Path, where: str
) -> None:
    """As a launcher ends the others when one has died: SIGTERM comes long before the time-out."""
    with start_ranks(server, tmp_path, 3, "told_to_end", 2, where) as ranks:
        ranks.await_ready()
        time.sleep(0.5)  # in which ranks 0 and 1 meet
        ranks.kill(signal.SIGKILL, 2)
        ranks.kill(signal.SIGTERM, 0, 1)
        outcomes = ranks.wait(15)
    check_ended(
        outcomes,
        r"SIGTERM",
        rf"waited (in vain )?for rank 2, which {'has not come' if where == 'joining' else ''}",
        skip=(2,),
    )


# -- wrong use ------------------------------------------------------------------------------------------------


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("what", "num_ranks", "patterns"),
    [
        ("num_stages", 2, ["ValueError: num_stages=3", "2 ranks"]),
        ("mesh", 4, ["ValueError: num_stages=3", r"2 ranks|\(2, 3\)"]),
        ("a bad mesh", 4, ["ValueError: mesh has the dimensions", "'replica', 'stage'"]),
        ("names", 2, [r"the models differ", r"rank 1", r"block0\.0\.weight|0\.0\.weight"]),
        ("shapes", 3, [r"the models differ", r"head\.weight", r"rank 2", r"\(4, 5\)", r"\(3, 5\)"]),
        ("dtypes", 2, [r"the models differ", r"block3\.0\.weight", r"rank 1", "float64", "float32"]),
        ("frozen", 2, [r"the models differ", r"block3\.0\.weight", "rank 1"]),
        ("tied", 2, ["rank 1 has tied parameters", r"block0\.0\.weight of stage 0 and block5\.0\.weight of stage 1"]),
        ("method", 2, ["rank 1", "fdg", "dtrp"]),
        ("num_microbatches", 2, ["rank 1", "num_microbatches=2", "4"]),
        ("targets", 3, ["different targets", "mini-batch 4", "seed the sampler"]),
        ("target shapes", 3, ["32", "31", "seed the sampler"]),
        ("an empty shard", 4, ["an empty mini-batch", "each replica needs at least one"]),
        (
            "an empty part",
            4,
            ["3 samples of mini-batch 4 for 4 micro-batches", "SyncBatchNorm in stage 1", "at least 4 samples"],
        ),
        ("flush and state_dict", 2, [r"flush\(\)", r"state_dict\(\)", "same methods in the same order"]),
        ("infer and flush", 2, [r"infer\(\)", r"flush\(\)", "same methods in the same order"]),
        (
            "save_model and step",
            2,
            ["must call the same methods in the same order, and step()", "the same number of times"],
        ),
        ("steps: more on the last", 2, ["the same number of times"]),
        ("steps: more on the last", 3, ["the same number of times"]),
        ("steps: more on the first", 3, ["the same number of times"]),
        ("one more step, and no flush", 2, [r"called 7 on rank 0, 6 on rank 1 times"]),
    ],
)
def test_wrong_use_is_an_error_on_every_rank(
    server: Server, tmp_path: Path, what: str, num_ranks: int, patterns: list[str]
) -> None:
    outcomes = run_ranks(server, tmp_path, num_ranks, "wrong", what, timeout_s=15)
    for rank, outcome in enumerate(outcomes):
        assert outcome.returncode == 1, f"rank {rank}: {outcome.returncode}\n{outcome.err}"
        for pattern in patterns:
            assert re.search(pattern, outcome.last_line), f"rank {rank}: {pattern!r} is not in\n{outcome.err}"
        assert "StageError" not in outcome.last_line, f"no stage is to blame:\n{outcome.err}"


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("culprit", "closes"), [(0, True), (2, True), (0, False)])
def test_a_rank_that_closes_early(server: Server, tmp_path: Path, culprit: int, closes: bool) -> None:
    outcomes = run_ranks(server, tmp_path, 3, "close_too_early", culprit, closes, timeout_s=15)
    for rank, outcome in enumerate(outcomes):
        assert outcome.returncode == 1, f"rank {rank}: {outcome.returncode}\n{outcome.err}"
        assert re.search(rf"rank {culprit}\b.*same number of times", outcome.last_line), f"rank {rank}: {outcome.err}"


# -- the trace ------------------------------------------------------------------------------------------------


def test_a_trace_of_all_ranks(server: Server, tmp_path: Path) -> None:
    """5 mini-batches of 2 micro-batches on 3 ranks: each F, B, U, send and receive of training is a span."""
    outcomes = run_ranks(server, tmp_path, 3, "traced")
    assert all(outcome == Outcome(0, "", "") for outcome in outcomes), outcomes
    early, events = (
        json.loads((tmp_path / f"{name}.json").read_text())["traceEvents"] for name in ("in flight", "trace")
    )
    names = {event["pid"]: event["args"]["name"] for event in events if event.get("name") == "process_name"}
    assert len(names) == 3
    assert all(f"rank {rank}" in names[pid] for rank, pid in enumerate(sorted(names)))
    spans = [event for event in events if event["ph"] == "X"]
    assert all(span["ts"] >= 0 and span["dur"] >= 0 and span["pid"] in names for span in spans)
    for rank, pid in enumerate(sorted(names)):
        own = Counter(span["name"] for span in spans if span["pid"] == pid)
        for kind, count in (("F", 10), ("B", 10), ("U", 5)):
            assert {name: own[name] for name in own if re.fullmatch(rf"{kind}\d+", name)} == {
                f"{kind}{i}": 1 for i in range(count)
            }
        wanted = {
            "send forward": rank < 2,
            "receive forward": rank > 0,
            "send backward": rank > 0,
            "receive backward": rank < 2,
        }
        for name, expected in wanted.items():
            assert [own[f"{name} {m}"] for m in range(10)] == [int(expected)] * 10, name
    found = Counter((event["pid"], event["name"]) for event in early if event["ph"] == "X")
    assert all(found[pid, f"F{m}"] == 1 for pid in names for m in range(8)), "one that is saved with batches in flight"
    assert all(found[rank, f"send backward {m}"] == 1 for rank, count in ((1, 6), (2, 8)) for m in range(count))
    at = {(span["pid"], span["name"]): span for span in spans}
    for m in range(10):
        sent, received = at[0, f"send forward {m}"], at[1, f"receive forward {m}"]
        assert at[0, f"F{m}"]["ts"] <= sent["ts"]
        assert received["ts"] + received["dur"] <= at[1, f"F{m}"]["ts"] + at[1, f"F{m}"]["dur"]


# -- the time it takes ----------------------------------------------------------------------------------------


def seconds_of_steps(
    server: Server,
    folder: Path,
    num_ranks: int,
    method: str,
    steps: int,
    *,
    warm_up: int,
    forward_s: float = 0.02,
    backward_s: float = 0.04,
    num_microbatches: int = 1,
    latency_s: float = 0.0,
) -> list[float]:
    """Of every rank: seconds a step."""
    arguments = (method, steps, warm_up, forward_s, backward_s, num_microbatches)
    environment = {"DTRP_MESSAGE_LATENCY_S": str(latency_s)}
    outcomes = run_ranks(server, folder, num_ranks, "sleeping_stages", *arguments, timeout_s=200, **environment)
    assert all(outcome == Outcome(0, "", "") for outcome in outcomes), outcomes
    # A rank may be late in one step and catch up in the next, so the median is that of windows.
    windows = range(0, steps, min(10, steps))
    written = [json.loads((folder / f"seconds{rank}.json").read_text()) for rank in range(num_ranks)]
    return [statistics.median(statistics.mean(seconds[i : i + 10]) for i in windows) for seconds in written]


@pytest.mark.full
def test_stages_work_at_the_same_time_and_latency_counts(server: Server, tmp_path: Path) -> None:
    """K=2: bp takes F+B = 0.06 s at each stage and a latency each way; dtrp takes a slot, 2F+B = 0.08 s, and hides them."""
    bp = seconds_of_steps(server, tmp_path / "bp", 2, "bp", 5, warm_up=1, latency_s=0.05)
    dtrp = seconds_of_steps(server, tmp_path / "dtrp", 2, "dtrp", 8, warm_up=5, latency_s=0.05)
    assert statistics.mean(bp) >= 0.218
    assert statistics.mean(dtrp) >= 0.078
    assert statistics.mean(dtrp) < 0.75 * statistics.mean(bp)  # 0.36 on a machine with nothing else to do


@pytest.mark.full
@pytest.mark.parametrize("num_ranks", [2, 4, 8])
@pytest.mark.parametrize(("method", "best_s"), [("dtrp", 0.08), ("fdg", 0.06), ("spectrain", 0.06)])
def test_a_minibatch_takes_one_slot(server: Server, tmp_path: Path, method: str, best_s: float, num_ranks: int) -> None:
    seconds = seconds_of_steps(server, tmp_path, num_ranks, method, 60, warm_up=4 * num_ranks)
    print(method, num_ranks, seconds)
    assert max(seconds) <= 1.06 * best_s


@pytest.mark.full
@pytest.mark.parametrize(
    ("method", "share"), [("dtrp", 0.5), ("dtrp-1f1b", 0.5), ("fdg", 0.5), ("dtrp", 0.9), ("fdg", 0.9)]
)
def test_links_are_hidden(server: Server, tmp_path: Path, method: str, share: float) -> None:
    """K=4, a latency of ``share`` F on every message costs at most 5 % of the throughput."""
    fast = seconds_of_steps(server, tmp_path / "fast", 4, method, 60, warm_up=16)
    slow = seconds_of_steps(server, tmp_path / "slow", 4, method, 60, warm_up=16, latency_s=share * 0.02)
    print(method, share, fast, slow)
    assert max(slow) <= max(fast) / 0.95
