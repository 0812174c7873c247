"""`dtrp.RunFolder`: the folder of a run of a training loop of one's own (killed and gone on with: tests/test_examples.py)."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import assert_same
from run_folders import Page, metrics
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import dtrp
from dtrp.cli import run as command
from dtrp.train.comparison import read_summary

SETTINGS = {"data": "points", "lr": 0.1, "batch_size": 8, "sizes": (1, 2), "note": None}


def make(**options: Any) -> dtrp.Pipeline:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))

    def adam(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(params, lr=0.01)

    return dtrp.Pipeline(model, adam, cross_entropy, **{"num_stages": 2, "seed": 3, **options})


def batch(number: int) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(number)
    return torch.randn(8, 5, generator=draws), torch.randint(3, (8,), generator=draws)


def train(
    path: Path,
    *,
    until: int = 20,
    pipe: dtrp.Pipeline | None = None,
    accuracy: Callable[[int], float] = lambda epoch: 0.1 * epoch,
    portable: bool = False,
    **options: Any,
) -> tuple[dtrp.Pipeline, dtrp.RunFolder]:
    """Four epochs of five updates, with a save after updates 3, 8, ... and one after each epoch; broken off at ``until``."""
    pipe = pipe or make()
    run = dtrp.RunFolder(path, pipe, **{"settings": SETTINGS, **options})
    state = run.load()
    assert state == (None if pipe.num_updates == 0 else {"done": pipe.num_updates})
    while run.num_epochs < 4:
        while pipe.num_updates < 5 * (run.num_epochs + 1):
            if pipe.num_updates == until:
                return pipe, run
            run.update(pipe.step(*batch(pipe.num_updates)), 8, lr=0.01)
            if pipe.num_updates % 5 == 3:
                run.save({"done": pipe.num_updates}, portable=portable)
        pipe.flush()
        epoch = run.num_epochs + 1
        line = run.epoch(1.0 / epoch, torch.tensor(accuracy(epoch)), top2=0.5)
        assert line == run.metrics[-1]
        run.save({"done": pipe.num_updates})
    run.finish()
    return pipe, run


def updates(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "updates.jsonl").read_text().splitlines()]


def test_it_is_in_the_form_of_dtrp_train(tmp_path: Path) -> None:
    pipe, run = train(tmp_path / "own")
    assert_same(torch.load(tmp_path / "own" / "model.pt"), pipe.model_state_dict())
    config = yaml.safe_load((tmp_path / "own" / "config").read_text())
    assert config.pop("program").startswith("python ")
    assert config == {
        "data": "points", "model": "own", "seed": 3, "lr": 0.1, "batch-size": 8, "sizes": [1, 2], "method": "dtrp",
        "stages": 2, "num-microbatches": 2, "microbatch-samples": 2,
    }  # fmt: skip
    lines = metrics(tmp_path / "own")
    assert [(line["epoch"], line["update"], line["test_loss"]) for line in lines] == [
        (e, 5 * e, 1 / e) for e in range(1, 5)
    ]
    assert [line["scores"] for line in lines] == [{"top2": 0.5}] * 4
    each = updates(tmp_path / "own")
    assert [line["update"] for line in each] == list(range(1, 21))
    assert {(line["samples"], line["lr"]) for line in each} == {(8, 0.01)}
    for line in lines:
        losses = [other["loss"] for other in each[line["update"] - 5 : line["update"]]]
        assert line["train_loss"] == pytest.approx(sum(losses) / 5, rel=1e-12)
    found = read_summary(tmp_path / "own")
    assert found is not None
    assert (found["epochs"], found["updates"], found["config"]["batch_size"]) == (4, 20, 8)
    assert found["minibatch_s"] == pytest.approx(8 / found["samples_per_s"])
    assert [sum(stage["delays"].values()) for stage in found["stages"]] == [40, 40]
    assert run.best == (20, pytest.approx(0.4))


@pytest.mark.parametrize("until", [0, 2, 4, 9, 14])
def test_a_run_that_goes_on_is_one_that_was_never_broken_off(tmp_path: Path, until: int) -> None:
    whole, _ = train(tmp_path / "whole")
    train(tmp_path / "own", until=until)
    with (tmp_path / "own" / "updates.jsonl").open("a") as file:
        file.write('{"update": 99')  # half a line, of a process that was killed
    pipe, run = train(tmp_path / "own")
    assert bool(run.notes) == (until > 2), "before that there is no save"
    assert_same(pipe.model_state_dict(), whole.model_state_dict())
    assert metrics(tmp_path / "own") == metrics(tmp_path / "whole")
    assert updates(tmp_path / "own") == updates(tmp_path / "whole")
    assert run.best == (20, pytest.approx(0.4))
    before = (tmp_path / "own" / "metrics.jsonl").read_bytes()
    again = train(tmp_path / "own")[1]  # a finished run stays finished
    assert again.num_epochs == 4
    assert (tmp_path / "own" / "metrics.jsonl").read_bytes() == before
    assert read_summary(tmp_path / "own") is not None


def test_the_save_of_the_best_epoch_stays(tmp_path: Path) -> None:
    for best, update in (("highest", 10), ("lowest", 15)):
        _, run = train(tmp_path / best, accuracy=lambda epoch: [0.5, 0.9, 0.1, 0.3][epoch - 1], best=best, keep_last=1)
        assert run.best is not None
        assert run.best[0] == update
        saves = [path.name for path in sorted((tmp_path / best / "saves").iterdir())]
        assert saves == [f"update-{number:08d}" for number in (update, 20)]


def test_another_number_of_stages_goes_on_from_a_portable_save(tmp_path: Path) -> None:
    train(tmp_path / "own", until=9, portable=True)
    pipe, run = train(tmp_path / "own", pipe=make(num_stages=3, seed=4), settings=SETTINGS)
    assert any("going on after update 8" in note for note in run.notes)
    assert pipe.num_updates == 20
    config = yaml.safe_load((tmp_path / "own" / "config").read_text())
    assert (config["stages"], config["num-microbatches"]) == (3, 3)


def test_a_report_shows_it_beside_the_others(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    train(tmp_path / "own")
    train(tmp_path / "late", until=14, pipe=make(method=dtrp.get_method("dtrp", predict="linear", ahead=1.5)))
    small = ["train", "--model", "mlp", "--limit-train", "64", "--limit-test", "20", "--epochs", "1", "--stages", "2"]
    assert command([*small, "--threads", "1", "--quiet", "--out", str(tmp_path / "theirs")]) == 0
    folders = [str(tmp_path / name) for name in ("own", "late", "theirs")]
    assert command(["report", *folders, "--out", str(tmp_path / "report.html")]) == 0
    page = Page(tmp_path / "report.html")
    assert len(page.data["runs"]) == 3
    assert any("linear" in cell for row in page.rows for cell in row)
    assert "dtrp train --model mlp" in page.text
    program = yaml.safe_load((tmp_path / "own" / "config").read_text())["program"]
    assert program.split()[0] in page.text
    assert "--program" not in page.text


def test_dtrp_train_does_not_go_on_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "own", until=9)
    assert command(["train", "--resume", str(tmp_path / "own")]) == 2
    assert "is a run of a training loop of its own, which goes on with it: python " in capsys.readouterr().err


def test_numbers_that_are_none(tmp_path: Path) -> None:
    pipe, run = train(tmp_path / "own", until=4)
    with pytest.raises(TypeError, match="loss is None; pass what"):
        run.update(None, 8)
    with pytest.raises(ValueError, match="num_samples=0"):
        run.update(torch.tensor(1.0), 0)
    pipe.flush()
    with pytest.raises(TypeError, match="test_accuracy is no number on the rank that hosts the last stage"):
        run.epoch(1.0, None)
    with pytest.raises(ValueError, match="the run has no epoch"):
        run.finish()
    run.update(torch.tensor(math.nan), 8)
    assert math.isfinite(run.epoch(math.nan, math.nan)["train_loss"]), "of the losses that are finite"
    run.save()
    with pytest.raises(ValueError, match="no update since the epoch before"):
        run.epoch(1.0, 0.5)
    again = dtrp.RunFolder(tmp_path / "own", make(), settings=SETTINGS)
    assert again.load() is None
    assert math.isnan(again.metrics[0]["test_accuracy"])


def test_whose_folder_it_is(tmp_path: Path) -> None:
    pipe = make()
    train(tmp_path / "own", until=9)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    (tmp_path / "file").touch()
    for name, options, match in (
        ("own", {"settings": {**SETTINGS, "lr": 0.2}}, r"other settings \(lr 0.1 and not 0.2\); choose another"),
        ("own", {"settings": {**SETTINGS, "more": 1}}, r"other settings \(more None and not 1\)"),
        ("own", {"settings": {**SETTINGS, "seed": 5}}, r"other settings \(seed 3 and not 5\)"),
        ("other", {}, "other exists and is no run; choose another name"),
        ("other", {"overwrite": True}, "exists and is no run"),
        ("file", {}, "exists and is no run"),
        ("file/below", {}, "file cannot be written to"),
    ):
        with pytest.raises(ValueError, match=match):
            dtrp.RunFolder(tmp_path / name, pipe, **{"settings": SETTINGS, **options})
    with pytest.raises(ValueError, match="other settings"):
        dtrp.RunFolder(tmp_path / "own", make(method="fdg"), settings=SETTINGS)
    assert (tmp_path / "other" / "thesis.tex").exists()
    run = dtrp.RunFolder(tmp_path / "own", pipe, settings=SETTINGS)
    for call in (run.save, run.finish, lambda: run.epoch(1.0, 1.0), lambda: run.update(torch.tensor(1.0), 8)):
        with pytest.raises(RuntimeError, match=r"holds a run that this one goes on with; call load\(\) first"):
            call()
    dtrp.RunFolder(tmp_path / "own", pipe, settings=SETTINGS, overwrite=True)
    assert not (tmp_path / "own" / "saves").exists()
    pipe, unsaved = train(tmp_path / "own", until=2)
    with pytest.raises(RuntimeError, match=r"in flight; call pipe.flush\(\) before"):
        unsaved.epoch(1.0, 1.0)
    pipe.flush()
    unsaved.epoch(1.0, 1.0)
    with pytest.raises(ValueError, match="holds a run without a save to go on from"):
        dtrp.RunFolder(tmp_path / "own", pipe, settings=SETTINGS)


@pytest.mark.parametrize(
    ("settings", "kind", "match"),
    [
        ({"method": "bp"}, ValueError, "settings has 'method', which the pipeline says"),
        ({"num_microbatches": 3}, ValueError, "settings has 'num_microbatches', which the pipeline says"),
        ({"lr": torch.tensor(0.1)}, TypeError, r"settings\['lr'\] holds a Tensor; pass text, finite numbers"),
        ({"lr": math.nan}, TypeError, r"settings\['lr'\] holds a float; pass text, finite numbers"),
        ({"seed": "x"}, ValueError, r"settings\['seed'\] is 'x'; pass a whole number"),
    ],
)
def test_settings_that_cannot_be_written(tmp_path: Path, settings: Any, kind: type[Exception], match: str) -> None:
    with pytest.raises(kind, match=match):
        dtrp.RunFolder(tmp_path / "own", make(), settings=settings)
    assert not (tmp_path / "own").exists()
    with pytest.raises(ValueError, match="unknown best 'least'"):
        dtrp.RunFolder(tmp_path / "own", make(), best="least")  # type: ignore[arg-type]


def test_a_disk_that_is_full_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, run = train(tmp_path / "own", until=4)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run, "_append", full)
    with pytest.raises(OSError, match="No space left"):
        run.save()
    assert pipe.num_updates == 4


def test_the_library_needs_no_yaml_until_there_is_a_folder() -> None:
    program = "import sys; sys.modules['yaml'] = None; import dtrp; dtrp.Pipeline; print('RunFolder' in dir(dtrp))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "True\n", done.stderr
