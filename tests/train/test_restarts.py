"""Runs on workers that are told to stop, or killed, and go on."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from benchmark_programs import CIFAR, benchmark

from dtrp.cli import run
from dtrp.launch.rendezvous import Heartbeats, Rendezvous
from dtrp.launch.signals import stop_on_signal, stop_signals
from dtrp.train import TrainConfig
from dtrp.train.autosave import SaveEvery
from dtrp.train.config_checks import check_settings, worker_range
from dtrp.train.run_folder import RunFolder, left_by

restarts = benchmark("restarts")
pytestmark = pytest.mark.timeout(600)

SMALL = ["train", "--model", "mlp", "--batch-size", "32", "--limit-train", "500", "--limit-test", "100", "--num-microbatches", "2",
         "--workers", "2", "--epochs", "12", "--save-every", "3", "--quiet"]  # fmt: skip
EQUAL = {"weights_equal": True, "metrics_equal": True, "finished": True}


def dtrp(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "dtrp", *arguments], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed: 16 updates an epoch."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = dtrp(*SMALL, "--out", str(folder))
    assert done.returncode == 0, done.stderr
    return folder


def gone(pids: list[int], timeout_s: float = 20.0) -> bool:
    until = time.monotonic() + timeout_s
    while any(map(restarts.runs, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    return not any(map(restarts.runs, pids))


@pytest.mark.full
@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.full),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.full),
    ],
)
def test_workers_that_are_told_to_stop_save_together(whole: Path, tmp_path: Path, number: int, code: int) -> None:
    out = tmp_path / "run"
    with restarts.started([*SMALL, "--save-every", "1000", "--epochs", "1000", "--out", str(out)]) as process:
        restarts.wait_for(lambda: restarts.saves(out), process)
        workers = restarts.children(process.pid)
        process.send_signal(number)
        text, error = process.communicate(timeout=60)
    assert process.returncode == code, (text, error)
    assert error.startswith("dtrp: stopped after update ")
    assert error.count("\n") == 1
    assert "go on with: dtrp train --resume" in error
    assert gone(workers)
    update = int(error.split()[4].rstrip(","))
    assert restarts.saves(out)[-1].name == f"update-{update:08d}"
    assert restarts.saves(out)[-1].name not in (f"update-{16 * n:08d}" for n in range(2000)), "within an epoch"


@pytest.mark.full
def test_what_is_told_to_stop_goes_on_to_the_bit_by_the_same_command(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with restarts.started([*SMALL, "--out", str(out)]) as process:
        restarts.wait_for(lambda: restarts.saves(out), process)
        process.terminate()
        assert "which is saved" in process.communicate(timeout=60)[1]
    done = dtrp(*SMALL, "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "what was in flight included" in done.stdout
    assert restarts.same(out, whole) == EQUAL


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    command = ["plan", "--model", "mlp", "--workers", "2", "--batch-size", "32", "--latency", "0", "--repeats", "1"]
    assert run([*command, "--out", str(path)]) == 0
    return path


@pytest.mark.full
def test_a_run_by_a_plan_goes_on_by_the_same_command(plan: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ["train", "--model", "mlp", "--limit-train", "500", "--limit-test", "100", "--epochs", "1000", "--quiet"]
    command += ["--plan", str(plan), "--workers", "2", "--out", str(out)]
    updates = [0]
    for _ in range(2):
        before = restarts.saves(out)
        with restarts.started(command) as process:
            restarts.wait_for(lambda before=before: restarts.saves(out)[-1:] != before[-1:], process)
            process.terminate()
            text, error = process.communicate(timeout=60)
        assert error.startswith("dtrp: stopped after update "), (text, error)
        updates.append(int(error.split()[4].rstrip(",")))
    assert f"going on after update {updates[1]}, what was in flight included" in text
    assert updates[2] > updates[1]


@pytest.mark.full
def test_workers_hold_the_model_against_the_plan(plan: Path, tmp_path: Path) -> None:
    done = dtrp("train", "--model", "resnet20", "--plan", str(plan), "--workers", "2", "--out", str(tmp_path / "run"))
    assert done.returncode == 2
    assert "the plan is for a model with" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.full
def test_torchrun_saves_too_when_it_is_told_to_stop(tmp_path: Path) -> None:
    out = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "dtrp", *SMALL[:-5], "--epochs", "1000", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        restarts.wait_for(lambda: restarts.saves(out), process)
        workers = restarts.children(process.pid)
        process.terminate()
        error = process.communicate(timeout=60)[1]
    finally:
        restarts.kill(process.pid, *restarts.children(process.pid))
    assert error.count("dtrp: stopped after update") == 1, "one rank speaks for all"
    update = int(error.partition("stopped after update ")[2].partition(",")[0])
    assert restarts.saves(out)[-1].name == f"update-{update:08d}"
    assert gone(workers)


@pytest.mark.full
def test_after_a_death_nothing_is_saved(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with restarts.started([*SMALL, "--epochs", "1000", "--save-every", "1000", "--out", str(out)]) as process:
        restarts.wait_for(lambda: restarts.saves(out), process)
        workers = restarts.children(process.pid)
        assert len(workers) == 2
        restarts.kill(workers[-1])
        _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert error == f"dtrp: rank 1 was killed by signal 9 (SIGKILL); go on with: dtrp train --resume {out}\n"
    assert all(int(path.name[7:]) % 16 == 0 for path in restarts.saves(out)), "at epochs' ends alone"
    assert gone(workers)


def test_killed_workers_start_again_and_end_as_if_nothing_had_been(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = restarts.killed_often([*SMALL, "--max-restarts", "2", "--out", str(out)], out, 1, aim="workers")
    assert result["code"] == 0, result
    assert len(result["kills"]) == 1
    ((what, which),) = result["restarts"]
    assert re.fullmatch(r"rank [01] was killed by signal 9 \(SIGKILL\)", what)
    assert which == "1 of 2"
    assert result["error"] == ""
    assert restarts.same(out, whole) == EQUAL


@pytest.mark.full
def test_the_launcher_killed_leaves_no_orphan(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = restarts.launcher_killed([*SMALL, "--out", str(out)], out)
    assert result["workers"] == 2
    assert result["orphans"] == 0
    assert result["code"] == 0, result
    assert result["went_on_after"]
    assert restarts.same(out, whole) == EQUAL


@pytest.mark.full
def test_the_one_worker_that_is_left_goes_on(tmp_path: Path) -> None:
    """With the number of micro-batches that two workers have begun with."""
    out = tmp_path / "run"
    command = [*SMALL[:-1], "--num-microbatches", "auto", "--workers", "1:2", "--save-every", "2s", "--epochs", "30"]
    command += ["--out", str(out)]
    result = restarts.fewer_and_more(command, out, [2, 1])
    assert [step["workers"] for step in result["steps"]] == [2, 1], result
    assert result["code"] == 0, result
    assert result["went_on_after"]
    assert [line["epoch"] for line in restarts.lines_of(out)] == list(range(1, 31))
    assert {"num-microbatches: 2", "microbatch-samples: 2"} <= set((out / "config").read_text().splitlines())


# -- the checks as they were asked for: many kills ---------------------------------------------------------------


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("aim", "kills"), [("workers", 20), ("saving", 10)])
def test_killed_many_times(tmp_path: Path, aim: str, kills: int) -> None:
    out, whole = tmp_path / "run", tmp_path / "whole"
    command = [*SMALL, "--workers", "3", "--epochs", "20"]
    assert dtrp(*command, "--out", str(whole)).returncode == 0
    result = restarts.killed_often([*command, "--max-restarts", str(kills + 5), "--out", str(out)], out, kills, aim=aim)
    print(result)
    assert len(result["kills"]) == kills
    assert result["code"] == 0
    assert restarts.same(out, whole) == EQUAL


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_four_workers_then_two_then_three(tmp_path: Path) -> None:
    """And bp's accuracy less 3 points."""
    out, bp = tmp_path / "run", tmp_path / "bp"
    data = ["--data", "cifar10", "--data-dir", CIFAR, "--limit-train", "5000"] if CIFAR else ["--limit-train", "1500"]
    command = ["train", *data, "--model", "resnet14-8", "--num-microbatches", "4", "--epochs", "8", "--lr", "0.05"]
    assert dtrp(*command, "--method", "bp", "--stages", "4", "--threads", "1", "--out", str(bp)).returncode == 0
    result = restarts.fewer_and_more(
        [*command, "--workers", "2:4", "--save-every", "3s", "--out", str(out)], out, [4, 2, 3]
    )
    print(result)
    assert [step["workers"] for step in result["steps"]] == [4, 2, 3]
    assert result["code"] == 0
    assert restarts.lines_of(out)[-1]["test_accuracy"] >= restarts.lines_of(bp)[-1]["test_accuracy"] - 0.03


# -- in one process ----------------------------------------------------------------------------------------------

ALONE = [
    "train",
    "--model",
    "mlp",
    "--limit-train",
    "200",
    "--limit-test",
    "50",
    "--threads",
    "1",
    "--quiet",
    "--epochs",
    "2",
]


def test_saves_by_the_clock(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run([*ALONE, "--save-every", "0.000001s", "--keep-last", "99", "--out", str(out)]) == 0
    assert [path.name for path in restarts.saves(out)] == [f"update-{n:08d}" for n in range(1, 9)], "after every update"
    assert "save-every: 0.000001s" in (out / "config").read_text()
    long = tmp_path / "long"
    assert run([*ALONE, "--save-every", "1h", "--keep-last", "99", "--out", str(long)]) == 0
    assert [path.name for path in restarts.saves(long)] == ["update-00000004", "update-00000008"], (
        "at epochs' ends alone"
    )


@pytest.mark.parametrize(
    ("text", "every"),
    [
        (None, SaveEvery()),
        (500, SaveEvery(updates=500)),
        ("500", SaveEvery(updates=500)),
        ("90s", SaveEvery(seconds=90.0)),
        ("5m", SaveEvery(seconds=300.0)),
        ("1.5h", SaveEvery(seconds=5400.0)),
    ],
)
def test_how_often(text: str | int | None, every: SaveEvery) -> None:
    assert SaveEvery.parse(text) == every


@pytest.mark.parametrize("text", ["0", "0s", "-1", "5 bananas", "1e9", "m", "", "1.5"])
def test_how_often_not(text: str) -> None:
    with pytest.raises(ValueError, match="a number of updates, like 500, or a time, like 90s, 5m or 1h"):
        SaveEvery.parse(text)


def test_whose_run_is_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    out = tmp_path / "run"
    config = "model: mlp\nseed: 1\nsave-every: 3\n"

    def left(text: str = config, *, overwrite: bool = False) -> str | None:
        return left_by(str(out), text, overwrite=overwrite)

    assert left() is None, "there is none"
    RunFolder(str(out), overwrite=False).begin(config)
    assert left() == "begun", "nothing to go on from, nor to lose"
    assert left("seed: 2\n") is None
    (out / "metrics.jsonl").write_text("{}\n")
    assert left() is None, "an epoch would be lost"
    (out / "metrics.jsonl").write_text("")
    (out / "saves" / "update-00000003").mkdir(parents=True)
    assert left() == "unfinished"
    assert left("seed: 1\nmodel: mlp\nsave-every: 5m\nkeep-last: 9\n") == "unfinished", "the same training"
    assert left("model: mlp\nseed: 2\n") is None
    assert left(overwrite=True) is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    assert left(overwrite=True) is None, "another launch's, or nobody's"
    RunFolder(str(out), overwrite=False, resume=True).go_on(config, [])
    assert left(overwrite=True) == "unfinished", "this launch has begun it"
    (out / "summary.json").write_text("{}")
    assert left() == left(overwrite=True) == "finished"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "b")
    assert left() is left(overwrite=True) is None


def test_the_same_command_goes_on_and_another_does_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    command = [*ALONE, "--save-every", "3"]
    assert run([*command, "--out", str(whole)]) == 0
    shutil.copytree(whole, out)
    (out / "summary.json").unlink()
    shutil.rmtree(out / "saves" / "update-00000008")
    assert run([*command, "--seed", "1", "--out", str(out)]) == 2
    assert "exists; choose another name" in capsys.readouterr().err
    assert run([*command, "--out", str(out)]) == 0
    assert "going on after update 6, what was in flight included" in capsys.readouterr().out
    assert restarts.same(out, whole) == EQUAL
    assert run([*command, "--out", str(out)]) == 2, "a finished run is not trained again"


class Store(dict[str, bytes]):
    """What `meet` and `Heartbeats` need of a store, and what is in it from a start that was killed."""

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()

    def get(self, key: str) -> bytes:  # type: ignore[override]
        return self[key]

    def add(self, key: str, number: int) -> int:
        self[key] = str(sum_ := int(self.setdefault(key, b"0")) + number).encode()
        return sum_

    def clone(self) -> Store:
        return self


def test_a_start_takes_nothing_from_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()
    names: dict[tuple[int, int], str] = {}

    def start(number: int, rank: int, world_size: int) -> None:
        time.sleep(0.05 * ((rank * 7 + number) % 3))
        names[number, rank] = Rendezvous(store, rank, world_size).meet(10.0)

    for number, world_size in enumerate((3, 3, 2, 4)):
        threads = [threading.Thread(target=start, args=(number, rank, world_size)) for rank in range(world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert len({names[number, rank] for rank in range(world_size)}) == 1
    assert len(set(names.values())) == 4
    monkeypatch.setattr("dtrp.launch.rendezvous._TOLD_S", 0.1)
    first = Rendezvous(store, 0, 3)
    with pytest.raises(TimeoutError, match="rank 1, 2 has not come"):
        first.meet(0.1)
    assert first.missing() == [1, 2], "the marks of earlier starts do not count"
    with pytest.raises(TimeoutError, match="rank 0 has not come"):
        Rendezvous(store, 1, 3).meet(0.1)
    assert Rendezvous(Store(), 1, 4).missing() == [0, 1, 2, 3], "nobody has come, not even itself"


def test_all_ranks_say_who_has_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one, whose store it may be, tells the rest before it ends."""
    monkeypatch.setattr("dtrp.launch.rendezvous._TOLD_S", 0.3)
    store, said = Store(), {}

    def start(rank: int, timeout_s: float) -> None:
        with pytest.raises(TimeoutError, match="has not come") as caught:
            Rendezvous(store, rank, 3).meet(timeout_s)
        said[rank] = str(caught.value)
        if rank == 0:
            store.clear()

    threads = [threading.Thread(target=start, args=each) for each in ((0, 0.3), (2, 20.0))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert said == {0: "rank 1 has not come", 2: "rank 1 has not come"}


def test_who_is_silent_is_missed_and_the_others_hear_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtrp.launch.rendezvous._SILENCE_S", 0.3)
    monkeypatch.setattr("dtrp.launch.rendezvous._TOLD_S", 0.0)
    store = Store()
    ranks = [Heartbeats(store, [0, 1, 2, 3], rank) for rank in range(4)]
    assert ranks[0].missing([3]) == [3], "not connected"
    for presence in ranks:
        presence.connect()
        assert presence.beat() == []
    over = threading.Event()

    def live() -> None:
        while not over.wait(0.02):
            ranks[1].beat()
            ranks[3].beat()

    thread = threading.Thread(target=live)
    thread.start()
    assert ranks[0].missing() == [2]
    over.set()
    thread.join()
    assert [ranks[rank].beat() for rank in (1, 3)] == [[2]] * 2
    assert ranks[3].missing() == [2], "told by another"


def test_the_first_rank_is_missed_with_its_store(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(Store):
        def clone(self) -> Store:
            raise RuntimeError("connection refused")

    presence = Heartbeats(Gone(), [0, 1], 1)
    with pytest.raises(RuntimeError, match="connection refused"):
        presence.connect()
    assert presence.missing([0, 1]) == [0]
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert presence.missing([0, 1]) == []


def test_a_signal_that_is_ignored_is_not_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        assert set(stop_signals()) == {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert set(stop_signals()) == {signal.SIGINT, signal.SIGTERM}
        with stop_on_signal(lambda: None) as request:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
            assert request.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_one_signal_asks_and_its_echoes_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    calls: list[int] = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored
    with stop_on_signal(lambda: calls.append(1)) as request:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        clock[0] += 1.9
        os.kill(os.getpid(), signal.SIGINT)
        assert (calls, request.signal) == ([1], signal.SIGTERM)
        clock[0] += 0.2
        with pytest.raises(KeyboardInterrupt, match="^$"):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"workers": "4:2"}, "--workers 4:2: a number, like 4, or the fewest and the most, like 2:4"),
        ({"workers": "two"}, "--workers two: a number, like 4"),
        ({"workers": "2:4"}, "--workers 2:4 without --out"),
        ({"workers": "2:4", "out": "x", "keep_last": 0}, "--workers 2:4 without saves"),
        ({"workers": 2, "max_restarts": 3}, "--max-restarts without --out"),
        ({"max_restarts": 3, "out": "x"}, "--max-restarts without --workers"),
        ({"workers": 2, "max_restarts": -1}, "--max-restarts -1: at least 0"),
        ({"stages": "auto"}, "--stages auto without --workers"),
        ({"stages": "four"}, "--stages four: a number, or auto"),
        ({"workers": "2:4", "out": "x", "stages": 3}, "--stages 3 with --workers 2:4"),
        ({"workers": "2:4", "out": "x", "cuts": (1,)}, "--cuts with --workers 2:4"),
        ({"workers": 2, "stages": "auto", "keep": "graph,input"}, "--keep graph,input with --stages auto"),
        ({"workers": "2:4", "out": "x", "replicas": 2}, "--replicas 2 with --workers 2:4"),
        ({"save_every": "5 m", "out": "x"}, "--save-every 5 m: a number of updates"),
    ],
)
def test_what_does_not_go_together(options: dict[str, Any], rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with pytest.raises(ValueError, match=rule):
        check_settings(TrainConfig(**options))
    assert worker_range("2:4") == (2, 4)


def test_what_a_range_says_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*ALONE, "--workers", "3:2", "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.startswith("dtrp: --workers 3:2: a number, like 4")
    assert json.loads(json.dumps(list(worker_range(" 1:8 ")))) == [1, 8]
