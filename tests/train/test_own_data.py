"""``dtrp train --data``, ``--loss`` and ``--metric``: data, a loss and metrics of the user's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from run_folders import Page, check_same, metrics
from torch import Tensor, nn
from user_files import user_files

from dtrp.cli import run
from dtrp.data import InMemory
from dtrp.train import TrainConfig, Trainer, class_loss
from dtrp.train.config import config_text, option_words, read_settings
from dtrp.train.scores.criterion import ClassLoss, make_criterion, means

SOURCE = """
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset


class Noisy(Dataset):
    num_classes = 3

    def __init__(self, num, stray=None):
        self.num, self.stray = num, stray

    def __len__(self):
        return self.num

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        x = torch.randn(6, generator=generator)
        label = index % 3 if index != 41 or self.stray is None else self.stray
        return x + index % 3 + 0.1 * torch.randn(6), label


class Stream(IterableDataset):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return (self.data[index] for index in range(len(self.data)))

    def __len__(self):
        return len(self.data)


def points(num=96, stray=None):
    return Noisy(num, stray), Noisy(30)


def stream():
    return Stream(Noisy(96)), Stream(Noisy(30))


def numbers():
    x = torch.randn(96, 6, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, x.sum(1, keepdim=True)), TensorDataset(x[:30], x[:30].sum(1, keepdim=True))


def many():
    x = torch.randn(96, 6)
    return TensorDataset(x, torch.arange(96)), TensorDataset(x, torch.arange(96))


def net(outputs=3):
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, outputs))


def squares(out, target):
    return (out - target).square().mean()


def distance(out, target):
    return (out - target).abs().mean().item()


def vector(out, target):
    return out


def fails(out, target):
    raise RuntimeError("no score")
"""
DATA = "mine_of_a_test.py"
TRAIN = ["train", "--model", f"{DATA}:net", "--threads", "1", "--quiet", "--batch-size", "8", "--epochs", "2", "--stages", "2",
         "--loader-workers", "0", "--lr", "0.05", "--num-microbatches", "1"]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with user_files(tmp_path, monkeypatch, {DATA: SOURCE}) as place:
        yield place


def dtrp(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "dtrp", *arguments]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, env=environment, check=False)


@pytest.mark.parametrize("data", ["points", "stream"])
def test_bp_trains_on_it_as_a_plain_loop_does(folder: Path, data: str) -> None:
    config = TrainConfig(
        data=f"{DATA}:{data}", model=f"{DATA}:net", method="bp", stages=2, batch_size=8, epochs=2, dtype="float64",
        lr_schedule="constant", lr=0.05, loader_workers=0, threads=1, num_microbatches=1,
    )  # fmt: skip
    trainer = Trainer(config)
    layers = [layer for stage in trainer.pipe.stages for layer in stage]
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for epoch in range(2):
        for x, y in trainer.source.train_batches(8, epoch=epoch):
            torch.nn.functional.cross_entropy(plain(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    x, y = (torch.cat([batch[part] for batch in trainer.source.test_batches()]) for part in (0, 1))
    result = trainer.run()
    trained = nn.Sequential(*layers).state_dict()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(trained[name], value, rtol=1e-10, atol=1e-10)
    assert result.epochs[-1].test_accuracy == float((plain(x).argmax(1) == y).double().mean())
    assert result.epochs[-1].test_loss == pytest.approx(nn.functional.cross_entropy(plain(x), y).item(), rel=1e-6)


@pytest.mark.parametrize("data", ["points", "stream"])
def test_a_run_is_taken_up_within_an_epoch(folder: Path, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*TRAIN, "--data", f"{DATA}:{data}", "--save-every", "5", "--keep-last", "9"]
    assert run([*words, "--out", "whole"]) == 0
    assert run([*words, "--out", "part", "--max-updates", "12"]) == 0  # whose schedule is another
    assert run([*words, "--out", "run"]) == 0
    for path in Path("run/saves").iterdir():
        if path.name > "update-00000005":
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
    Path("run/summary.json").unlink()
    Path("run/metrics.jsonl").write_text("")
    with open(DATA, "a") as file:
        file.write("# changed\n")
    capsys.readouterr()
    assert run([*words, "--out", "run"]) == 0
    out = capsys.readouterr().out.replace("\n", " ")
    assert "going on after update 5, what was in flight included" in out
    assert f"{DATA}:{data} has changed since this run began" in out
    assert (f"the first 40 samples of the epoch are read again, and left out: {DATA}:stream" in out) == (
        data == "stream"
    )
    check_same(Path("run"), Path("whole"))


def test_a_loss_and_metrics_of_the_users(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*TRAIN, "--data", f"{DATA}:numbers", "--model-arg", "outputs=1", "--loss", f"{DATA}:squares"]
    words += ["--metric", f"{DATA}:distance", "--metric", "torch.nn.functional:mse_loss", "--best", "lowest"]
    assert run([*words, "--epochs", "3", "--keep-last", "1", "--out", "run"]) == 0
    out = capsys.readouterr().out
    assert "accuracy" not in out
    lines = metrics(Path("run"))
    assert all(line["scores"] == {"mse_loss": pytest.approx(line["test_loss"], rel=1e-6)} for line in lines)
    assert f"test distance {lines[-1]['test_accuracy']:.4g}, mse_loss {lines[-1]['test_loss']:.4g}, " in out
    best = min(lines, key=lambda line: line["test_accuracy"])["update"]
    assert {f"update-{update:08d}" for update in (best, 36)} == {path.name for path in Path("run/saves").iterdir()}
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["scores"] == lines[-1]["scores"]
    grid = ["--methods", "bp,dtrp", "--stages", "2", "--seeds", "1", "--one-process", "--out", "grid"]
    shared = [word for word in words[1:] if word not in ("--quiet",)]
    shared = [word for i, word in enumerate(shared) if "--stages" not in shared[max(0, i - 1) : i + 1]]
    assert run(["compare", *shared, *grid]) == 0
    assert "distance" in capsys.readouterr().out
    assert run(["report", "run", "grid", "--out", "report.html"]) == 0
    page = Page(Path("report.html"))
    assert "Test distance" in page.figures["accuracy"]
    assert "distance" in page.text
    assert "accuracy, %" not in page.text


def test_top_5_is_told_from_a_hundred_classes_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*TRAIN, "--data", f"{DATA}:many", "--epochs", "1"]
    assert run([*words, "--model-arg", "outputs=100", "--out", "run"]) == 0
    (line,) = metrics(Path("run"))
    assert 0 < line["scores"]["top5"] < 1
    assert f"top5 {line['scores']['top5']:.2%}" in capsys.readouterr().out
    assert run([*words, "--model-arg", "outputs=99", "--out", "fewer"]) == 0
    assert "scores" not in metrics(Path("fewer"))[0]
    criterion = make_criterion(
        None, ("top5",), Trainer(TrainConfig(data=f"{DATA}:points", model="mlp")).source, class_loss, supplied=True
    )
    out, y = torch.randn(40, 7), torch.randint(7, (40,))
    best = out.argsort(-1, descending=True)[:, :5]
    expected = sum(int(label) in best[i].tolist() for i, label in enumerate(y)) / 40
    assert means([criterion.judge(out, y)])["top5"] == pytest.approx(expected)


def test_labels_of_several_forms() -> None:
    loss = ClassLoss(class_loss, ignores=True)
    out, y = torch.randn(4, 5, 7), torch.randint(7, (4, 5))
    y[0, 0] = -100
    want = nn.functional.cross_entropy(out.movedim(-1, 1), y)
    torch.testing.assert_close(loss(out, y), want)
    torch.testing.assert_close(loss(out.movedim(-1, 1), y.to(torch.int32)), want)
    for label in (7, -1):
        y[1, 1] = label
        with pytest.raises(ValueError, match=rf"a label is {label}, and the model has 7 outputs: labels are 0 to 6"):
            loss(out, y)
        with pytest.raises(ValueError, match="a label is"):
            loss.check_labels(y)
    wrong: list[tuple[Any, Tensor]] = [(out, y[:, :3]), ({"logits": out}, y), (out, torch.rand(4, 5))]
    for given, target in wrong:
        with pytest.raises(ValueError, match="the model's output is .*; logits .* go together"):
            loss(given, target)


def test_the_settings_in_a_file_and_on_a_command_line() -> None:
    config = TrainConfig(data="a.py:b", data_arg=("n=3",), loss="a:l", metric=("a:m", "top5"), best="lowest")
    settings = read_settings(config_text(config))
    assert settings is not None
    names = ("data", "data-arg", "loss", "metric", "best")
    words = option_words({name: settings[name] for name in names})
    assert words == ["--data", "a.py:b", "--data-arg", "n=3", "--loss", "a:l", "--metric", "a:m", "--metric", "top5",
                     "--best", "lowest"]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", f"{DATA}:pints"], "unknown function 'pints'; did you mean 'points'"),
        (["--data", f"{DATA}:net"], "it returned a Sequential; return (train, test)"),
        (["--data", f"{DATA}:points", "--data-arg", "number=3"], "unexpected keyword argument 'number'; its arguments are"),
        (["--data", f"{DATA}:points", "--data-arg", "stray=3"], "a label is 3, and the model has 3 outputs: labels are 0 to 2"),
        (["--data", f"{DATA}:points", "--data-arg", "stray=word"], "training samples: the targets are of type int, str; return"),
        (["--data", f"{DATA}:points", "--data-dir", "x"], "--data-dir with --data"),
        (["--data", f"{DATA}:points", "--no-augment"], "--no-augment with --data"),
        (["--data", f"{DATA}:points", "--stream"], "--stream with --data"),
        (["--data", "digits", "--data-arg", "a=1"], "--data-arg a=1 with --data digits"),
        (["--data", f"{DATA}:numbers"], "the targets of mine_of_a_test.py:numbers are float32, and cross entropy needs classes"),
        (["--data", f"{DATA}:numbers", "--loss", f"{DATA}:squares"], "the accuracy needs classes, whole numbers; pass --metric"),
        (["--data", f"{DATA}:points", "--loss", f"{DATA}:vector"], "returned a tensor of shape (8, 3); return the mean"),
        (["--data", f"{DATA}:points", "--loss", "mse"], "--loss mse: pass package.module:function"),
        (["--data", f"{DATA}:points", "--metric", f"{DATA}:fails"], "line 69: RuntimeError: no score"),
        (["--data", f"{DATA}:points", "--metric", f"{DATA}:vector"], "returned a tensor of shape (8, 3); return the mean"),
        (["--data", f"{DATA}:points", "--metric", "top6"], "unknown metric 'top6'; did you mean 'top5'"),
        (["--data", f"{DATA}:points", "--best", "lowest"], "--best lowest of accuracy"),
        (["--data", f"{DATA}:many", "--model", "mlp"], "the number of classes is not known"),
        (["--data", f"{DATA}:points", "--model", "resnet20"], "it reads square images (C, H, H), and samples are of shape (6,)"),
        (["--data", f"{DATA}:points", "--model", "gpt"], "it reads tokens (T,)"),
        (["--data", f"{DATA}:points", "--method", "dgl"], "its auxiliary networks are for images"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(
    folder: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*TRAIN, *options, "--out", "run"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not Path("run").exists()


def test_a_built_in_network_reads_vectors(folder: Path) -> None:
    assert run([*TRAIN, "--data", f"{DATA}:points", "--model", "mlp", "--epochs", "1", "--out", "run"]) == 0


def test_data_in_memory_knows_its_classes() -> None:
    source = Trainer(TrainConfig(model="mlp", limit_train=40, limit_test=20)).source
    assert isinstance(source, InMemory)
    assert source.class_names == tuple(map(str, range(10)))


@pytest.mark.full
def test_ranks_and_loader_workers_change_nothing(folder: Path) -> None:
    words = [*TRAIN, "--data", f"{DATA}:points", "--epochs", "3"]
    assert run([*words, "--out", "alone"]) == 0
    for out, options in (
        ("loaders", ["--loader-workers", "2"]),
        ("ranks", ["--workers", "2"]),
        ("both", ["--workers", "2", "--loader-workers", "2"]),
    ):
        done = dtrp(*words, *options, "--out", out)
        assert done.returncode == 0, done.stderr
        check_same(Path(out), Path("alone"))


@pytest.mark.full
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("data", ["points", "stream"])
def test_a_killed_run_goes_on_to_the_bit(folder: Path, workers: int, data: str) -> None:
    """A model file and a data file of the user's: killed by kill -9, started again, reported."""
    words = [*TRAIN, "--data", f"{DATA}:{data}", "--epochs", "6", "--save-every", "3", "--loader-workers", "1"]
    words += ["--workers", "2"] if workers == 2 else []
    assert run([*words, "--out", "whole"]) == 0 if workers == 1 else dtrp(*words, "--out", "whole").returncode == 0
    process = subprocess.Popen([sys.executable, "-m", "dtrp", *words, "--out", "run"], stdout=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not list(Path("run/saves").glob("update-*/manifest.json")):
        assert time.monotonic() < until
        time.sleep(0.002)
    process.kill()
    process.wait()
    time.sleep(3)  # its ranks see that it is gone
    done = dtrp(*words, "--out", "run")
    assert done.returncode == 0, done.stderr
    check_same(Path("run"), Path("whole"))
    assert run(["report", "run", "--out", "report.html"]) == 0
    again = dtrp("train", "--resume", "run", "--epochs", "7")
    assert again.returncode == 0, again.stderr
