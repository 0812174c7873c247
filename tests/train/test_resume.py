"""Runs of ``dtrp train`` that are broken off and taken up again."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from run_folders import check_same, metrics

from dtrp.cli import run
from dtrp.saving import manifest, read_state
from dtrp.train.autosave import Saves
from dtrp.train.config import TrainConfig, config_text
from dtrp.train.run_folder import left_by

SMALL = ["train", "--model", "resnet14-8", "--batch-size", "64", "--limit-train", "500", "--limit-test", "100", "--augment",
         "--num-microbatches", "2", "--threads", "1", "--quiet", "--stages", "3", "--epochs", "3", "--save-every", "3"]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run([*SMALL, "--out", str(folder)]) == 0
    return folder


def test_a_run_of_an_older_version_with_fewer_settings_is_gone_on_with(tmp_path: Path) -> None:
    now = config_text(TrainConfig())
    (tmp_path / "saves" / "update-00000003").mkdir(parents=True)
    (tmp_path / "config").write_text(now.replace("channels-last: false\n", ""))
    assert (tmp_path / "config").read_text() != now
    assert left_by(str(tmp_path), now, overwrite=False) == "unfinished"
    assert left_by(str(tmp_path), config_text(TrainConfig(channels_last=True)), overwrite=False) is None


def start(folder: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "dtrp", *SMALL, "--out", str(folder), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path) -> None:
    until = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < until
        time.sleep(0.01)


def saves(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "saves").iterdir())


@pytest.mark.parametrize("update", [pytest.param(3, marks=pytest.mark.full), 11])
def test_a_killed_run_goes_on_to_the_bit(whole: Path, tmp_path: Path, update: int) -> None:
    folder = tmp_path / "run"
    process = start(folder)
    wait_for(folder / "saves" / f"update-{update // 3 * 3:08d}" / "manifest.json")
    process.kill()
    process.communicate()
    assert not (folder / "summary.json").exists()
    assert run(["train", "--resume", str(folder), "--quiet"]) == 0
    check_same(folder, whole)


@pytest.mark.full
def test_on_workers_too(tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    command = ["train", "--model", "mlp", "--batch-size", "64", "--limit-train", "500", "--num-microbatches", "2", "--quiet",
               "--workers", "2", "--epochs", "2", "--save-every", "3", "--keep-last", "9", "--out", str(whole)]  # fmt: skip
    assert subprocess.run([sys.executable, "-m", "dtrp", *command], check=False).returncode == 0
    shutil.copytree(whole, folder)
    (folder / "summary.json").unlink()
    for update in (12, 15, 16):
        shutil.rmtree(folder / "saves" / f"update-{update:08d}")
    command = [sys.executable, "-m", "dtrp", "train", "--resume", str(folder), "--quiet"]
    resumed = subprocess.run(command, check=False, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert "going on after update 9, what was in flight included" in resumed.stdout
    check_same(folder, whole)


@pytest.mark.full
@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGHUP, 129), pytest.param(signal.SIGINT, 130, marks=pytest.mark.full)],
)
def test_asked_to_stop_it_saves(whole: Path, tmp_path: Path, number: int, code: int) -> None:
    folder = tmp_path / "run"
    process = start(folder)
    wait_for(folder / "saves" / "update-00000003" / "manifest.json")
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert err.count("\n") == 1
    assert "go on with: dtrp train --resume" in err
    assert run(["train", "--resume", str(folder), "--quiet"]) == 0
    check_same(folder, whole)


def test_a_finished_run_says_so_and_can_be_trained_longer(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    assert run(["train", "--resume", str(folder)]) == 0
    assert "is finished: 3 epochs, 24 updates" in capsys.readouterr().out
    assert run(["train", "--resume", str(folder), "--epochs", "4", "--quiet"]) == 0
    assert [line["epoch"] for line in metrics(folder)] == [1, 2, 3, 4]
    assert metrics(folder)[:3] == metrics(whole)


def test_the_last_and_the_best_are_kept(whole: Path) -> None:
    accuracies = {line["update"]: line["test_accuracy"] for line in metrics(whole)}
    best = max(accuracies, key=lambda update: accuracies[update])
    assert saves(whole) == sorted({f"update-{n:08d}" for n in (21, 24, best)})


def test_at_another_number_of_stages_it_goes_on_from_an_epochs_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert run([*SMALL, "--out", str(folder), "--keep-last", "9", "--epochs", "2"]) == 0
    shutil.rmtree(folder / "saves" / "update-00000016")
    capsys.readouterr()
    assert run(["train", "--resume", str(folder), "--stages", "2", "--epochs", "3", "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "update-00000015 holds what was in flight in another pipeline" in out
    assert "going on after update 8, from a portable save" in out
    assert [line["epoch"] for line in metrics(folder)] == [1, 2, 3]


def test_a_damaged_save_is_left_aside(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "summary.json").unlink()
    damaged = next((folder / "saves" / "update-00000024").glob("*.distcp"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert run(["train", "--resume", str(folder), "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "update-00000024 is left aside" in out
    assert damaged.name in out.replace("\n", "")
    check_same(folder, whole)


def broken_off(whole: Path, folder: Path, *lost: int) -> Path:
    """The whole run as it was before these saves."""
    shutil.copytree(whole, folder)
    (folder / "summary.json").unlink()
    for update in lost:
        shutil.rmtree(folder / "saves" / f"update-{update:08d}")
    return folder


def test_options_beside_it_win(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A learning rate and a weight decay given again are those that are trained with from there on, and no others."""
    folder = broken_off(whole, tmp_path / "run", 24)
    assert run(["train", "--resume", str(folder), "--quiet", "--lr", "0", "--weight-decay", "0"]) == 0
    assert "going on after update 21" in capsys.readouterr().out
    found = read_state(folder / "saves" / "update-00000024")
    (group,) = found["optimizer"]["param_groups"]
    assert (group["initial_lr"], group["lr"], group["weight_decay"]) == (0, 0, 0)
    assert group["momentum"] == 0.9
    again = broken_off(whole, tmp_path / "again", 24)
    assert run(["train", "--resume", str(again), "--quiet", "--lr", "0.02"]) == 0
    (group,) = read_state(again / "saves" / "update-00000024")["optimizer"]["param_groups"]
    assert group["initial_lr"] == 0.02
    a, b, c = (torch.load(each / "model.pt") for each in (folder, again, whole))
    name = next(name for name in a if name.endswith("weight"))
    assert not torch.equal(a[name], b[name])
    assert not torch.equal(b[name], c[name])


def test_what_was_in_flight_is_passed_over_where_the_run_is_another(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*SMALL, "--out", str(tmp_path / "run"), "--keep-last", "9", "--epochs", "2"]) == 0
    for i, (options, reason) in enumerate(
        [
            (["--max-grad-norm", "1"], "saved with max_grad_norm=None, and this pipeline has max_grad_norm=1.0"),
            (["--batch-size", "50"], "64 samples into an epoch of 500, no whole number of mini-batches of 50"),
        ]
    ):
        folder = broken_off(tmp_path / "run", tmp_path / str(i), 12, 15, 16)
        capsys.readouterr()
        assert run(["train", "--resume", str(folder), "--quiet", *options]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert "going on after update 8, from a portable save" in out
        assert reason in out


def test_a_save_is_read_once(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    describe = manifest.describe
    monkeypatch.setattr(manifest, "describe", lambda path: read.append(path) or describe(path))
    folder = broken_off(whole, tmp_path / "run")
    newest = sorted((folder / "saves" / "update-00000024").iterdir())
    assert run(["train", "--resume", str(folder), "--epochs", "3", "--quiet"]) == 0
    assert sorted(read) == [path for path in newest if path.name != "manifest.json"]


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["--resume", "nowhere"], "there is no nowhere; name the folder that 'dtrp train --out' has written"),
        (["--save-every", "3"], "--save-every without --out"),
        (["--save-every", "3", "--keep-last", "0", "--out", "x"], "--save-every with --keep-last 0"),
        (["--keep-last", "-1"], "--keep-last -1: at least 0"),
    ],
)
def test_wrong_use(arguments: list[str], rule: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", *arguments]) == 2
    assert rule in capsys.readouterr().err


def test_what_is_no_run(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "grid" / "bp-K2-A1-seed0").mkdir(parents=True)
    (tmp_path / "grid" / "compare.yaml").touch()
    (tmp_path / "grid" / "bp-K2-A1-seed0" / "config").touch()
    comparison = f"{tmp_path / 'grid'} is a comparison, .* goes on: dtrp compare --out {tmp_path / 'grid'}\n"
    inside = f"is no run, but lies in one; pass --resume {whole}\n"
    for path, answer in {
        tmp_path / "file": "file is a file; name the folder that",
        tmp_path: "is a folder without the config of a run",
        tmp_path / "grid": comparison,
        tmp_path / "grid" / "bp-K2-A1-seed0": comparison,
        whole / "saves": inside,
        next(whole.glob("saves/*")): inside,
    }.items():
        assert run(["train", "--resume", str(path)]) == 2
        assert re.search(answer, capsys.readouterr().err), path


def test_nothing_to_go_on_from(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("saves", "summary.json"))
    before = metrics(folder)
    assert run(["train", "--resume", str(folder)]) == 2
    assert "has no save to go on from" in capsys.readouterr().err
    assert metrics(folder) == before
    assert Saves(folder, 2)._all() == []
