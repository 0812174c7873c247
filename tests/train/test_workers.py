"""``dtrp train`` in several processes."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import complaints

from dtrp.cli import run
from dtrp.train import TrainConfig
from dtrp.train.config_checks import workers_per_replica

SMALL = ["train", "--data", "digits", "--model", "mlp", "--limit-train", "100", "--limit-test", "50",
         "--batch-size", "32", "--epochs", "2", "--lr", "0.01", "--num-microbatches", "2"]  # fmt: skip


def dtrp(*arguments: str, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "dtrp", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment, check=False)


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("samples_per_s", "elapsed_s")} for line in lines]


def left_over(mark: str) -> list[str]:
    return subprocess.run(["pgrep", "-af", mark], capture_output=True, text=True, check=False).stdout.splitlines()


@pytest.mark.full
@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "options",
    [
        ["--method", "dtrp"],
        pytest.param(["--method", "dgl"], marks=pytest.mark.full),
        pytest.param(["--model", "resnet14-8", "--channels-last"], marks=pytest.mark.full),
    ],
)
def test_workers_print_the_losses_of_one_process(tmp_path: Path, options: list[str]) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert run([*SMALL, *options, "--stages", "2", "--threads", "1", "--out", str(one)]) == 0
    done = dtrp(*SMALL, *options, "--workers", "2", "--out", str(two))
    assert done.returncode == 0, done.stderr
    assert "2 stages in a process each" in done.stdout
    assert done.stdout.count("train loss") == 2, "progress on one rank"
    assert complaints(done.stderr) == []
    assert metrics(one) == metrics(two)
    a, b = torch.load(one / "model.pt"), torch.load(two / "model.pt")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert "workers: 2" in (two / "config").read_text()


@pytest.mark.full
def test_replicas_share_a_minibatch(tmp_path: Path) -> None:
    """No BatchNorm in this network: a shard's gradients add up to the mini-batch's, but for rounding."""
    one, four = tmp_path / "one", tmp_path / "four"
    options = [*SMALL, "--num-microbatches", "1", "--dtype", "float64"]
    assert run([*options, "--stages", "2", "--threads", "1", "--out", str(one)]) == 0
    done = dtrp(*options, "--workers", "2", "--replicas", "2", "--out", str(four))
    assert done.returncode == 0, done.stderr
    assert "and 2 replicas" in done.stdout
    for a, b in zip(metrics(one), metrics(four), strict=True):
        assert a == pytest.approx(b, rel=1e-9)


@pytest.mark.full
def test_torchrun_starts_it_too(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "dtrp", *SMALL, "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=120, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(metrics(out)) == 2


@pytest.mark.full
def test_what_a_worker_says_is_what_one_reads(tmp_path: Path) -> None:
    done = dtrp(*SMALL, "--workers", "2", "--lr", "1e30", "--optimizer", "sgd", "--out", str(tmp_path / "run"))
    assert done.returncode == 2
    assert "the loss of mini-batch" in done.stderr
    assert done.stderr.startswith("dtrp: ")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


ABORTS = """#!{python}
import os, resource, sys
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
print("terminate called after throwing an instance of 'std::bad_alloc'", file=sys.stderr, flush=True)
os.abort()
"""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # torch's launcher leaves its logs open
def test_what_native_code_says_before_it_aborts_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    worker = tmp_path / "worker"
    worker.write_text(ABORTS.format(python=sys.executable))
    worker.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(worker))
    assert run([*SMALL, "--workers", "1"]) == 2
    gc.collect()
    said, last = capsys.readouterr().err.splitlines()
    assert said == "terminate called after throwing an instance of 'std::bad_alloc'"
    assert last == "dtrp: rank 0 was killed by signal 6 (SIGABRT)"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_workers_of_this_machine_meet_where_no_name_need_be_resolved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    worker = tmp_path / "worker"
    worker.write_text(f"#!{sys.executable}\nimport os\nraise SystemExit('they meet at ' + os.environ['MASTER_ADDR'])\n")
    worker.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(worker))
    assert run([*SMALL, "--workers", "1"]) == 2
    gc.collect()
    assert "they meet at 127.0.0.1\n" in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.parametrize("number", [pytest.param(signal.SIGKILL, marks=pytest.mark.full), signal.SIGINT])
def test_a_killed_worker_and_ctrl_c(number: signal.Signals) -> None:
    command = [sys.executable, "-m", "dtrp", *SMALL, "--workers", "3", "--epochs", "100000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        while "epoch   2" not in process.stdout.readline():
            pass
        workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
        pids = [int(pid) for pid in workers.stdout.split()]
        os.kill(pids[-1] if number == signal.SIGKILL else process.pid, number)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    if number == signal.SIGKILL:
        assert process.returncode == 2
        assert "was killed by signal 9 (SIGKILL)" in error
    else:
        assert process.returncode == 130
        assert error.strip() == "dtrp: interrupted"
    deadline = time.monotonic() + 15
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids), "a worker is left"


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (["--workers", "2", "--stages", "3"], "each worker has one stage"),
        (["--replicas", "2"], "--replicas 2 without --workers"),
        (["--workers", "0"], "--workers 0: at least 1"),
        (["--workers", "2", "--optimizer", "adam", "--lr", "-1"], "--lr -1.0: a finite number"),
    ],
)
def test_mistakes_that_are_seen_before_a_worker_starts(
    options: list[str], rule: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*SMALL, *options]) == 2
    assert rule in capsys.readouterr().err


@pytest.mark.full
def test_a_mistake_that_a_worker_sees() -> None:
    done = dtrp(*SMALL, "--workers", "2", "--replicas", "2", "--limit-train", "33")
    assert done.returncode == 2
    assert "each of the 2 replicas needs at least one" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_how_many_workers() -> None:
    assert workers_per_replica(TrainConfig(workers=3)) == 3
    assert workers_per_replica(TrainConfig(cuts=(2, 4)), 6 // 2) == 3
    assert workers_per_replica(TrainConfig(replicas=2), 8) == 4
    with pytest.raises(ValueError, match="make 6 processes, and 4 were started"):
        workers_per_replica(TrainConfig(workers=3, replicas=2), 4)
