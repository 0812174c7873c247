"""`--num-microbatches auto`, the default: the number stands in the run's config, and stays when the run goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from dtrp import get_method
from dtrp.cli import run
from dtrp.cli.console import what_delay
from dtrp.saving import manifest
from dtrp.schedule import steady_delay
from dtrp.train.config import TrainConfig, config_text
from dtrp.train.run_folder import RunFolder, left_by

# The last of an epoch's mini-batches has 5 samples: two micro-batches of the three.
SMALL = ["train", "--model", "mlp", "--stages", "3", "--limit-train", "69", "--limit-test", "20", "--threads", "1",
         "--batch-size", "16", "--epochs", "1"]  # fmt: skip


def config_of(folder: Path) -> dict[str, object]:
    settings: dict[str, object] = yaml.safe_load((folder / "config").read_text())
    return settings


def test_the_number_is_stored_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*SMALL, "--out", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    (line,) = (line for line in shown.splitlines() if "in 3 micro-batches" in line)
    assert line.endswith("; forwards read weights at most 1 update old (--num-microbatches 1: 3)")
    config = config_of(tmp_path / "run")
    assert (config["num-microbatches"], config["microbatch-samples"]) == (3, 2)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {sum(stage["delays"].values()) for stage in summary["stages"]} == {4 * 3 + 2}
    assert max(int(delay) for delay in summary["stages"][0]["delays"]) == 1
    # One that goes on with another number of stages keeps it.
    assert run(["train", "--resume", str(tmp_path / "run"), "--stages", "2", "--epochs", "2", "--quiet"]) == 0
    config = config_of(tmp_path / "run")
    assert (config["stages"], config["num-microbatches"], config["microbatch-samples"]) == (2, 3, 2)
    (save,) = (tmp_path / "run" / "saves").glob("update-*10")
    saved = manifest.glance(save)
    assert (saved.num_stages, saved.num_microbatches, saved.microbatch_samples) == (2, 3, 2)


def test_a_number_of_the_users_is_stored_alone(tmp_path: Path) -> None:
    assert run([*SMALL, "--num-microbatches", "3", "--out", str(tmp_path / "run"), "--quiet"]) == 0
    config = config_of(tmp_path / "run")
    assert config["num-microbatches"] == 3
    assert "microbatch-samples" not in config
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {sum(stage["delays"].values()) for stage in summary["stages"]} == {4 * 3 + 3}


def test_dgl_takes_small_last_minibatches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = [*SMALL, "--method", "dgl", "--quiet"]
    assert run([*small, "--model", "resnet14-8", "--stages", "4"]) == 0
    assert run([*small, "--limit-train", "65", "--model", "resnet14-8"]) == 2
    assert "an epoch's last mini-batch has 1 samples" in capsys.readouterr().err


def test_the_line_says_the_largest_delay() -> None:
    for name in ("dtrp", "dtrp-1f1b", "fdg", "spectrain", "bp", "dgl"):
        method = get_method(name)
        for stages in range(2, 9):
            for parts in (1, 2, stages):
                delay = steady_delay(method, stages, 0, parts, 0)
                line = what_delay(method, stages, parts)
                assert (f"at most {delay} update" in line) == (delay > 0)
                assert ("newest" in line) == (delay == 0)


# -- the same command again ------------------------------------------------------------------------------------


def begun(folder: Path, **settings: object) -> Path:
    (folder / "saves" / "update-00000003").mkdir(parents=True)
    (folder / "config").write_text(config_text(TrainConfig(**settings)))  # type: ignore[arg-type]
    return folder


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"num_microbatches": 3, "microbatch_samples": 2}, "unfinished"),  # begun by auto
        ({"num_microbatches": 3}, None),  # begun with a number, or by an older version
        ({"num_microbatches": 3, "microbatch_samples": 4}, None),
        ({"num_microbatches": 3, "microbatch_samples": 2, "lr": 0.5}, None),
    ],
)
def test_it_goes_on_with_what_it_has_begun(tmp_path: Path, settings: dict[str, object], found: str | None) -> None:
    folder = begun(tmp_path / "run", **settings)
    assert left_by(str(folder), config_text(TrainConfig()), overwrite=False) == found


def test_the_number_stays_where_the_number_of_workers_changes(tmp_path: Path) -> None:
    config = TrainConfig(workers="1:4", out=str(begun(tmp_path / "run", workers="1:4").parent / "run"))
    begun_by = TrainConfig(workers="1:4", num_microbatches=4, microbatch_samples=2)
    (tmp_path / "run" / "config").write_text(config_text(begun_by))
    assert RunFolder.open(config).division(config) == {"num_microbatches": 4, "microbatch_samples": 2}
    fresh = TrainConfig(workers="1:4", out=str(tmp_path / "other"))
    assert RunFolder.open(fresh).division(fresh) == {"num_microbatches": "auto", "microbatch_samples": None}
    assert fresh.divided(3) == TrainConfig(workers="1:4", out=fresh.out, num_microbatches=3, microbatch_samples=2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-microbatches", "all"], "--num-microbatches all: a whole number of at least 1, or auto"),
        (["--num-microbatches", "0"], "--num-microbatches 0: at least 1"),
        (["--microbatch-samples", "0"], "--microbatch-samples 0: at least 1"),
        (["--num-microbatches", "17"], "--batch-size 16 is smaller than --num-microbatches 17"),
    ],
)
def test_numbers_that_mean_nothing(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert run([*SMALL, *words]) == 2
    assert message in capsys.readouterr().err
