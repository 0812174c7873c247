"""The command line: what it writes, what it shows, and how it answers a mistake."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from dtrp import Schedule
from dtrp.cli import cli, run
from dtrp.cli.console import LiveReporter, PlainReporter, curve, make_reporter
from dtrp.models import get_model
from dtrp.train import EpochMetrics, TrainConfig, Trainer, lr_factor, summarize_delays
from dtrp.train.build import load_dataset, make_model

SMALL = ["train", "--data", "digits", "--model", "mlp", "--limit-train", "100", "--limit-test", "50",
         "--batch-size", "32", "--epochs", "2", "--threads", "1", "--lr", "0.01"]  # fmt: skip


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a" / "run"
    assert run([*SMALL, "--stages", "3", "--out", str(out)]) == 0
    assert sorted(p.name for p in out.iterdir()) == [
        "config",
        "data.json",
        "metrics.jsonl",
        "model.pt",
        "saves",
        "summary.json",
    ]
    assert [p.name for p in out.parent.iterdir()] == ["run"], "nothing temporary is left"
    metrics = lines(out / "metrics.jsonl")
    assert [list(m) for m in metrics] == [
        ["epoch", "update", "train_loss", "test_loss", "test_accuracy", "samples_per_s", "elapsed_s"]
    ] * 2
    assert [(m["epoch"], m["update"]) for m in metrics] == [(1, 4), (2, 8)]
    assert all(0 <= m["test_accuracy"] <= 1 for m in metrics)
    assert yaml.safe_load((out / "config").read_text())["batch-size"] == 32
    model = get_model("mlp", 1, 10, image_size=8)
    model.load_state_dict(torch.load(out / "model.pt", weights_only=True))
    shown = capsys.readouterr().out
    for word in ("epoch   2", "samples/s", "accuracy", "parameters", "delay (updates)", "stash, peak", "written to"):
        assert word in shown
    assert "\x1b" not in shown, "no escape codes off a terminal"


def same_but_for_time(a: Path, b: Path) -> bool:
    def strip(path: Path) -> list[dict[str, Any]]:
        timeless = ("epoch", "update", "train_loss", "test_loss", "test_accuracy")
        return [{key: m[key] for key in timeless} for m in lines(path / "metrics.jsonl")]

    return strip(a) == strip(b)


def test_a_runs_config_repeats_it_and_the_command_line_wins(tmp_path: Path) -> None:
    first, second, third = (str(tmp_path / name) for name in "abc")
    assert run([*SMALL, "--cuts", "1,2", "--lr-shrink", "0.9", "--prediction", "linear", "--out", first]) == 0
    assert run(["train", "--config", f"{first}/config", "--out", second]) == 0
    assert same_but_for_time(tmp_path / "a", tmp_path / "b")
    assert run(["train", "--config", f"{first}/config", "--out", third, "--seed", "1"]) == 0
    assert not same_but_for_time(tmp_path / "a", tmp_path / "c")
    assert yaml.safe_load((tmp_path / "c" / "config").read_text())["seed"] == 1


def test_typed_cuts_replace_a_files_stages(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("stages: 2\n")
    assert run([*SMALL, "--config", str(file), "--cuts", "1,2", "--out", str(tmp_path / "a")]) == 0
    assert "stages" not in yaml.safe_load((tmp_path / "a" / "config").read_text())
    file.write_text("cuts: [1, 2]\n")
    assert run([*SMALL, "--config", str(file), "--stages", "2", "--out", str(tmp_path / "b")]) == 0
    assert yaml.safe_load((tmp_path / "b" / "config").read_text())["stages"] == 2


def test_a_toml_file(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('model = "mlp"\ncuts = [1, 2]\nepochs = 1\n"limit-train" = 64\nlimit_test = 20\naugment = false\n')
    assert run(["train", "--config", str(file), "--out", str(tmp_path / "run")]) == 0
    config = yaml.safe_load((tmp_path / "run" / "config").read_text())
    assert (config["cuts"], config["limit-train"], config["augment"]) == ([1, 2], 64, False)


def test_overwrite_replaces_a_run_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert run([*SMALL, "--out", str(out)]) == 0
    before = (out / "metrics.jsonl").read_text()
    assert run([*SMALL, "--out", str(out)]) == 2
    assert "exists; choose another name, or pass --overwrite" in capsys.readouterr().err
    assert (out / "metrics.jsonl").read_text() == before
    assert run([*SMALL, "--out", str(out), "--overwrite", "--epochs", "1"]) == 0
    assert len(lines(out / "metrics.jsonl")) == 1
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter").write_text("years of work")
    assert run([*SMALL, "--out", str(other), "--overwrite"]) == 2
    assert "is no run of dtrp train" in capsys.readouterr().err
    assert (other / "chapter").exists()


def test_max_updates_ends_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    assert run([*SMALL, "--max-updates", "6", "--out", str(tmp_path / "run")]) == 0
    assert [m["update"] for m in lines(tmp_path / "run" / "metrics.jsonl")] == [4, 6]


@pytest.mark.parametrize(
    "options",
    [
        ["--method", "bp", "--stages", "1"],
        ["--method", "fdg", "--grad-shrink", "0.5"],
        ["--method", "adl", "--num-microbatches", "4"],
        ["--method", "spectrain", "--prediction", "rollout", "--optimizer", "adam", "--lr", "0.001"],
        ["--optimizer", "adamw", "--lr-schedule", "multistep", "--warmup-updates", "2"],
        ["--optimizer", "nadam", "--lr-schedule", "constant", "--dtype", "float64"],
        ["--dtype", "bfloat16", "--prediction", "none"],
        ["--data", "random", "--model", "resnet20", "--max-updates", "1"],
        ["--model", "resnet14-8", "--channels-last"],
    ],
)
def test_options(options: list[str], tmp_path: Path) -> None:
    assert run([*SMALL, *options, "--out", str(tmp_path / "run")]) == 0
    assert all(m["train_loss"] < 5 for m in lines(tmp_path / "run" / "metrics.jsonl"))


def test_channels_last() -> None:
    config = TrainConfig(model="resnet14-8", channels_last=True)
    weights = [p for p in make_model(config, load_dataset(config, print)).parameters() if p.dim() == 4]
    assert len(weights) == 13
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)


def no_classes(path: Path) -> list[str]:
    path.mkdir()
    return ["--data", "folder", "--data-dir", str(path)]


def damaged(path: Path) -> list[str]:
    batches = path / "cifar-10-batches-py"
    batches.mkdir(parents=True)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]:
        (batches / name).write_bytes(pickle.dumps({b"data": 1})[:-3])
    return ["--data", "cifar10", "--data-dir", str(path)]


def written(text: str, name: str = "c.yaml") -> Callable[[Path], list[str]]:
    def write(path: Path) -> list[str]:
        path.mkdir()
        (path / name).write_text(text)
        return ["--config", str(path / name)]

    return write


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        (["--stages", "50"], "num_stages=50 but the model has"),
        (["--stages", "0"], "--stages 0: at least 1"),
        (["--stages", "two"], "--stages two: a number, or auto"),
        (["--cuts", "2,1"], "put them in rising order"),
        (["--cuts", "1,99"], "99 is out of range"),
        (["--cuts", "1,x"], "no list of layer numbers like 3,6,9"),
        (["--cuts", "1", "--stages", "3"], "make 2 stages but num_stages=3"),
        (["--batch-size", "3", "--num-microbatches", "4"], "--batch-size 3 is smaller than --num-microbatches 4"),
        (["--batch-size", "0"], "--batch-size 0: at least 1"),
        (["--method", "dtpr"], "unknown method 'dtpr'; did you mean 'dtrp'?"),
        (["--method", "DTRP"], "unknown method 'DTRP'; did you mean 'dtrp'?"),
        (["--model", "resnet21"], "unknown model 'resnet21'; did you mean 'resnet20'"),
        (["--data", "cifar11"], "unknown data 'cifar11'; did you mean 'cifar10'"),
        (["--optimizer", "agd"], "unknown optimizer 'agd'; did you mean 'sgd'"),
        (["--lr-schedule", "cosin"], "did you mean 'cosine'"),
        (["--prediction", "magic"], "unknown prediction 'magic'"),
        (["--method", "bp", "--prediction", "linear"], "no delay to predict over"),
        (["--grad-shrink", "2"], "a shrinking factor"),
        (["--momentum", "0", "--nesterov"], "there is no momentum to look ahead with"),
        (["--lr", "nan"], "--lr nan: a finite number"),
        (["--lr", "-1"], "--lr -1.0"),
        (["--epochs", "0"], "--epochs 0: at least 1"),
        (["--seed", "-1"], "--seed -1"),
        (["--device", "tpu9"], "--device tpu9: torch cannot use 'tpu9'"),
        (["--device", "cuda:99"], "torch cannot use 'cuda:99'"),
        (["--device", "cpu,cpu", "--stages", "3"], "devices has 2 entries for 3 stages"),
        (["--model", "mlp", "--channels-last"], "--channels-last with --model mlp, which has no convolutions"),
        (["--model", "vgg11"], "image_size=8 but vgg11 halves the image 5 times"),
        (["--data", "cifar10"], "download cifar-10-python.tar.gz"),
        (["--data", "cifar10", "--data-dir", "{tmp}/none"], "cifar-10-python.tar.gz"),
        (["--data", "digits", "--data-dir", "{tmp}"], "digits"),
        (no_classes, "folder"),
        (damaged, "data_batch_1"),
        (["--config", "{tmp}/none.yaml"], "cannot read"),
        (written("a: [1"), "is no YAML"),
        (written("a = ", "c.toml"), "is no TOML"),
        (written("- 1"), "holds no options"),
        (written("metod: bp"), "unknown option 'metod'; did you mean 'method'?"),
        (written("method: bpp"), "unknown method 'bpp'"),
        (written("momentum: many"), "'many' is not a valid float"),
        (written("epochs: {a: 1}"), "give one value"),
        (written("workers: 2:4"), "c.yaml: 2:4 is a number to the base of 60 in YAML; quote it: '2:4'"),
        (written("cuts: [1, 1:30.5]"), "quote it: '1:30.5'"),
        (written("lr: 0.1\nseed: 3\nlr: 0.2"), "c.yaml: lr is there 2 times; keep one"),
        (written("batch-size: 4\nbatch_size: 8"), "batch_size and batch-size are the same option; keep one"),
        (written("max-updates: 0x10"), "'0x10' is not a valid integer"),
        (written("seed: 2024-13-45"), "'2024-13-45' is not a valid integer"),
        (["--frobnicate"], "no such option: --frobnicate\n"),
        (["--stage", "2"], "no such option: --stage; did you mean '--stages'?"),
        (["--methd", "bp"], "no such option: --methd; did you mean '--method'?"),
        (["--workers", "124"], "num_stages=124 but the model has 6 layers"),
        (["--workers", "2:50"], "num_stages=50 but the model has 6 layers"),
        (["--workers", "3", "--cuts", "1,99"], "99 is out of range"),
        (["--workers", "3", "--keep", "graph,input"], "--keep graph,input names 2 stages, and there are 3"),
        (["--workers", "3", "--device", "cpu,cpu"], "--device cpu,cpu names 2 stages, and there are 3"),
        (["--workers", "2", "--replicas", "99"], "--batch-size 32 is smaller than --replicas 99"),
        (["--plan", "{tmp}/none"], "none cannot be read: No such file or directory; name a file of 'dtrp plan'"),
        (["--lr", "1e30", "--lr-schedule", "constant"], "the loss of mini-batch"),
        (["--model", "resnet18", "--batch-size", "1"], "Expected more than 1 value per channel"),
    ],
)
def test_a_mistake_is_answered_with_one_line_and_nothing_written(
    options: Any, answer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if callable(options):
        options = options(tmp_path / "given")
    options = [option.replace("{tmp}", str(tmp_path)) for option in options]
    before = sorted(tmp_path.rglob("*"))
    assert run([*SMALL, *options, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert answer in error
    assert error.startswith("dtrp: ")
    assert error.count("\n") == 1
    assert "Traceback" not in error
    assert sorted(tmp_path.rglob("*")) == before


def test_what_a_file_says_is_taken_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text("epochs: 010\nmax-updates: 1\nlr: 1e-2\nout: 007\nbatch_size: 1_6\n")
    assert run([*SMALL[:9], "--config", "c.yaml"]) == 0
    settings = yaml.safe_load(Path("007", "config").read_text())
    assert (settings["epochs"], settings["lr"], settings["batch-size"]) == (10, 0.01, 16)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_place_that_cannot_be_written_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o500)
    assert run([*SMALL, "--out", str(tmp_path / "run")]) == 2
    assert "cannot be written to" in capsys.readouterr().err


def test_out_below_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert run([*SMALL, "--out", str(tmp_path / "file" / "run")]) == 2
    assert "cannot be written to" in capsys.readouterr().err


def test_a_run_that_is_not_kept_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*SMALL, "--max-updates", "1"]) == 0
    assert "nothing of this run is kept; name a folder for it with --out" in capsys.readouterr().out
    assert run([*SMALL, "--max-updates", "1", "--out", str(tmp_path / "run")]) == 0
    assert "is kept" not in capsys.readouterr().out


LOST = """
import os, pty, sys
from dtrp.cli.endings import lost_terminal_ignored
terminal, end = pty.openpty()
os.dup2(end, 1), os.dup2(end, 2), os.close(end), os.close(terminal)
with lost_terminal_ignored():
    print("lost", flush=True)
    sys.exit("not reached")
print("dropped", flush=True)
"""


def test_a_terminal_that_is_closed_ends_nothing() -> None:
    assert subprocess.run([sys.executable, "-c", LOST], check=False).returncode == 0


def test_every_option_is_documented() -> None:
    for command in cli.commands.values():
        assert command.help
        for param in command.params:
            if param.param_type_name == "option":
                assert param.help, f"{command.name} --{param.name}"  # type: ignore[attr-defined]
    names = {param.name for param in cli.commands["train"].params}
    assert names == {field.name for field in dataclasses.fields(TrainConfig)} | {"config", "quiet"}


def test_without_options_it_is_the_default_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[TrainConfig] = []

    def stop(config: TrainConfig) -> Trainer:
        made.append(config)
        raise ValueError("that is enough")

    monkeypatch.setattr("dtrp.cli.running.Trainer", stop)
    assert run(["train"]) == 2
    assert made == [TrainConfig()]


def test_schedule_prints_a_grid_and_checks_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["schedule", "--method", "dtrp", "--stages", "4", "--minibatches", "8"]) == 0
    text = capsys.readouterr().out
    assert Schedule.parse(text) == Schedule.build("dtrp", 4, 8)
    assert "delay 0 | 0 1 2 3 4 5 5 5" in text
    assert run(["schedule", "--ahead", "1.5", "--order", "forward-first", "--num-microbatches", "2"]) == 0
    capsys.readouterr()
    file = tmp_path / "grid"
    file.write_text(text)
    assert run(["schedule", "--check", str(file)]) == 0
    capsys.readouterr()
    file.write_text(text.replace("B2 U F4", "B3 U F4"))
    assert run(["schedule", "--check", str(file)]) == 2
    shown = capsys.readouterr()
    assert shown.err == "dtrp: stage 2 runs B3 where B2 is next\n"
    assert ">B3<" in shown.out
    assert run(["schedule", "--ahead", "0.5"]) == 2
    assert "ahead=0.5" in capsys.readouterr().err


def test_methods(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["methods"]) == 0
    assert "dtrp-1f1b" in capsys.readouterr().out
    assert run(["methods", "fdg"]) == 0
    assert "arXiv:1906.09108" in capsys.readouterr().out


def test_the_live_line(tmp_path: Path) -> None:
    console = Console(force_terminal=True, width=120, record=True, file=io.StringIO())
    trainer = Trainer(TrainConfig(model="mlp", limit_train=64, limit_test=20, epochs=1, threads=1))
    with LiveReporter(console) as reporter:
        trainer.run(reporter)
    shown = console.export_text()
    assert "epoch   1" in shown
    assert "test accuracy" in shown


@pytest.mark.parametrize("width", [60, 80, 130])
def test_the_live_lines_fit_the_terminal(width: int) -> None:
    console = Console(force_terminal=True, width=width, file=io.StringIO())
    trainer = Trainer(TrainConfig(model="mlp", limit_train=64, limit_test=20, epochs=1, threads=1))
    with LiveReporter(console, table=False) as reporter:
        reporter.start(trainer)
        reporter._shown = 0.0
        reporter.epoch(EpochMetrics(1, 3, 2.31, 2.25, 0.125, 345.6, 12.3))
        reporter.update(0, 4, lambda: 2.5, 64)
        beside = Console(width=width, file=io.StringIO())
        beside.print(reporter._lines())
    bar, curves = beside.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert "4/1" in bar
    assert "loss ▁ 2.5000  accuracy ▁ 12.50%" in curves
    printed = [line for line in console.file.getvalue().splitlines() if "epoch   1" in line]  # type: ignore[attr-defined]
    assert all(("12 s" in line) and ("12.50%" in line) for line in printed), "on one line"
    assert any(("samples/s" in line) == (width > 110) for line in printed)


def test_a_log_gets_plain_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["train", "--model", "mlp", "--limit-train", "64", "--limit-test", "20", "--epochs", "2", "--threads", "1"]
    assert run(small) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "\r" not in shown
    assert [line[:9] for line in shown.splitlines()[2:4]] == ["epoch   1", "epoch   2"]
    assert type(make_reporter()) is PlainReporter
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert type(make_reporter()) is PlainReporter, "colours make no terminal of a log"


def test_a_terminal_gets_the_live_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = os.openpty()
    with os.fdopen(ours), os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "70")
        assert type(make_reporter()) is LiveReporter
        quiet = make_reporter(quiet=True)
        assert type(quiet) is PlainReporter
        assert quiet.console.width == 70, "and not that of a log"
        monkeypatch.setenv("TERM", "dumb")
        assert type(make_reporter()) is PlainReporter


@pytest.mark.parametrize(
    ("schedule", "warmup", "factors"),
    [
        ("constant", 0, {0: 1, 50: 1, 99: 1}),
        ("constant", 4, {0: 0.2, 3: 0.8, 4: 1, 99: 1}),
        ("cosine", 0, {0: 1, 50: 0.5, 100: 0}),
        ("multistep", 0, {0: 1, 49: 1, 50: 0.1, 74: 0.1, 75: 0.01, 99: 0.01}),
    ],
)
def test_learning_rate_schedules(schedule: str, warmup: int, factors: dict[int, float]) -> None:
    factor = lr_factor(schedule, warmup, 100)
    assert {n: factor(n) for n in factors} == pytest.approx(factors, abs=1e-12)


def test_curves_in_text() -> None:
    assert curve([]) == ""
    assert curve([3.0]) == "▁"
    assert curve([1.0, 1.0]) == "▁▁"
    assert curve([2.0, 1.0, float("nan"), 0.0]) == "█▅?▁"
    assert len(curve(list(range(1000)))) == 10
    assert curve(list(range(1000)))[0] == "▁"


def test_delays_in_words() -> None:
    assert summarize_delays({0: 8}) == "0"
    assert summarize_delays({0: 1, 1: 1, 5: 90}) == "0-5, mostly 5"
    assert summarize_delays({}) == "-"


def blocked(names: str, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python where some packages cannot be imported."""
    stop = f"import sys\nfor name in {names.split()!r}: sys.modules[name] = None\n"
    return subprocess.run(
        [sys.executable, "-c", stop + script, *arguments], capture_output=True, text=True, timeout=120
    )


def test_the_library_needs_torch_alone() -> None:
    script = (
        "import torch, dtrp\n"
        "pipe = dtrp.Pipeline(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)),\n"
        "                     lambda p: torch.optim.SGD(p, lr=0.1), torch.nn.functional.mse_loss, num_stages=2)\n"
        "pipe.step(torch.randn(4, 2), torch.randn(4, 2)); pipe.flush(); print('trained')\n"
    )
    done = blocked("numpy click rich yaml PIL sklearn scipy", script)
    assert done.stdout == "trained\n", done.stderr


def test_the_command_line_says_what_it_lacks() -> None:
    for name in ("click", "rich", "yaml"):
        done = blocked(name, "from dtrp.__main__ import main; sys.argv = ['dtrp', 'train']; main()")
        assert done.returncode == 2
        line = f"dtrp: the command line needs {name}, which is not installed; pip install 'dtrp[cli]'"
        assert done.stderr.splitlines()[-1] == line


def test_python_m_dtrp() -> None:
    done = subprocess.run([sys.executable, "-m", "dtrp", "train", "--model", "x"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("dtrp: ")
    assert done.stderr.count("\n") == 1
