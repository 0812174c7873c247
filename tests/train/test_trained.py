"""``dtrp evaluate``, ``predict`` and ``export``: what a run's model says, in one process."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from image_folders import write_images
from PIL import Image
from run_folders import metrics
from torch import nn
from user_files import user_files

from dtrp.cli import run
from dtrp.data import load_data
from dtrp.models import get_model
from dtrp.saving import read_model
from dtrp.train import TrainConfig, Trainer
from dtrp.train.trained.loading import TrainedRun

SHORT = ["train", "--threads", "1", "--quiet", "--epochs", "2", "--stages", "2"]
SOURCE = """
import torch
from pathlib import Path
from torch import nn
from torch.utils.data import Dataset


class Letters(Dataset):
    classes = ["a", "b", "c"]

    def __len__(self):
        return 60

    def __getitem__(self, index):
        return self.from_words(index % 3), index % 3

    def from_words(self, k):
        return torch.eye(3)[k].repeat(2) + 0.01 * torch.randn(6)

    def from_file(self, path):
        return self.from_words(self.classes.index(Path(path).read_text()[0]))


class Blind(Letters):
    from_file = None


def letters():
    return Letters(), Letters()


def blind():
    return Letters(), Blind()


def others():
    data = Letters()
    data.classes = ["a", "c", "b"]
    return data, data


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)
        self.register_buffer("scale", torch.ones(1), persistent=False)
        self.outer.weight = self.inner.weight

    def forward(self, x):
        return self.head(self.outer(self.inner(x).tanh()) * self.scale)


def tied():
    return Tied()


def parts():
    return [nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)), nn.Sequential(nn.Tanh(), nn.Linear(8, 3))]


def whole():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
"""
MINE = "letters_of_a_test.py"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with user_files(tmp_path, monkeypatch, {MINE: SOURCE}) as place:
        yield place


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("digits") / "run"
    assert run([*SHORT, "--model", "resnet14-8", "--lr", "0.1", "--out", str(out)]) == 0
    return out


def told(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert run([*words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_it_says_what_the_run_said(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = metrics(digits)[-1]
    found = told(capsys, "evaluate", str(digits))
    assert (found["update"], found["num_samples"]) == (last["update"], 359)
    assert found["loss"] == pytest.approx(last["test_loss"], rel=1e-6)
    assert found["scores"] == {"accuracy": last["test_accuracy"]}
    data = load_data("digits")
    model = get_model("resnet14-8", 1, 10)
    model.load_state_dict(torch.load(digits / "model.pt"))
    x = (data.test_x - data.mean[:, None, None]) / data.std[:, None, None]  # type: ignore[union-attr]
    right = model.eval()(x).argmax(1) == data.test_y
    shares = {str(k): float(right[data.test_y == k].double().mean()) for k in range(10)}
    assert [entry["class"] for entry in found["worst"]] == sorted(shares, key=lambda k: (shares[k], int(k)))[:5]
    assert all(entry["accuracy"] == shares[entry["class"]] for entry in found["worst"])
    assert run(["evaluate", str(digits), "--metric", "top5", "--limit-test", "50", "--threads", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"resnet14-8 on digits, after update {last['update']}: 50 test images"
    assert "top5 " in lines[1]
    assert lines[-1].endswith("samples/s on cpu, without reading them")


def test_weights_of_other_updates(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, last = metrics(digits)
    for at, line in (
        ("last", last),
        (str(first["update"]), first),
        ("best", max(first, last, key=lambda m: m["test_accuracy"])),
    ):
        found = told(capsys, "evaluate", str(digits), "--at", at)
        assert (found["update"], found["scores"]["accuracy"]) == (line["update"], line["test_accuracy"])
    for at, match in (
        ("7", "no weights after 7 updates; there are those after 23, 46"),
        ("first", "last, best, or a number"),
    ):
        assert run(["evaluate", str(digits), "--at", at]) == 2
        assert match in capsys.readouterr().err
    broken = shutil.copytree(digits, tmp_path / "run", dirs_exist_ok=True)
    (broken / "model.pt").write_bytes(b"nonsense")
    assert run(["evaluate", str(broken)]) == 2
    assert "model.pt cannot be read" in capsys.readouterr().err
    (broken / "model.pt").unlink()
    assert told(capsys, "evaluate", str(broken))["scores"] == {"accuracy": last["test_accuracy"]}


@pytest.mark.parametrize("model", ["tied", "parts", "whole"])
def test_models_of_all_forms_in_the_middle_of_an_epoch(
    folder: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights of a run that has no epoch yet, as its stages have them."""
    words = [
        *SHORT,
        "--data",
        f"{MINE}:letters",
        "--model",
        f"{MINE}:{model}",
        "--batch-size",
        "4",
        "--loader-workers",
        "0",
    ]
    words += ["--method", "bp"] if model == "tied" else []
    if model == "tied":
        words[words.index("--stages") + 1] = "1"
    assert run([*words, "--save-every", "7", "--keep-last", "9", "--out", "run"]) == 0
    last = metrics(Path("run"))[-1]
    found = told(capsys, "evaluate", "run")
    assert found["scores"]["accuracy"] == last["test_accuracy"]
    assert found["loss"] == pytest.approx(last["test_loss"], rel=1e-6)
    for path in Path("run/saves").iterdir():
        if path.name != "update-00000007":
            shutil.rmtree(path)
    for name in ("model.pt", "summary.json"):
        Path("run", name).unlink()
    Path("run/metrics.jsonl").write_text("")
    found = told(capsys, "evaluate", "run")
    assert (found["update"], found["num_samples"]) == (7, 60)
    assert run(["export", "run", "--out", "plain.pt"]) == 0
    sys.path.insert(0, ".")
    made = getattr(__import__(MINE.removesuffix(".py")), model)()
    plain = nn.Sequential(*made) if isinstance(made, list) else made
    plain.load_state_dict(torch.load("plain.pt"))
    weights = read_model("run/saves/update-00000007")
    assert all(torch.equal(value, weights[name]) for name, value in plain.state_dict().items() if name in weights)
    trained = TrainedRun.open("run").model()
    x = torch.randn(5, 6)
    torch.testing.assert_close(trained(x), plain.eval()(x))


@pytest.mark.parametrize("name", ["torch", "safetensors"])
def test_an_exported_file_loads_into_the_plain_model(
    digits: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    file = "run.pt" if name == "torch" else "run.safetensors"
    assert run(["export", str(digits), "--format", name]) == 0
    load = capsys.readouterr().out.splitlines()[1].strip()
    safetensors = pytest.importorskip("safetensors.torch") if name == "safetensors" else None
    state = torch.load(file) if safetensors is None else safetensors.load_file(file)
    assert load.startswith("model.load_state_dict(")
    assert file in load
    model = get_model("resnet14-8", 1, 10)
    model.load_state_dict(state)
    want = torch.load(digits / "model.pt")
    assert all(torch.equal(value, want[key]) for key, value in model.state_dict().items())
    before = Path(file).read_bytes()
    assert run(["export", str(digits), "--format", name]) == 2
    assert f"{file} is there already; pass --overwrite" in capsys.readouterr().err
    assert Path(file).read_bytes() == before
    assert run(["export", str(digits), "--format", name, "--overwrite"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [file]
    assert run(["export", str(digits), "--out", "/nowhere/x.pt"]) == 2
    assert "is no folder; make it" in capsys.readouterr().err


def test_safetensors_that_is_not_installed(
    digits: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.delitem(sys.modules, "safetensors.torch", raising=False)
    assert run(["export", str(digits), "--format", "safetensors"]) == 2
    assert "needs that package; pip install 'dtrp[safetensors]'" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["--stream", "--in-memory"])
def test_image_files_are_treated_as_in_the_test(folder: Path, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    images = write_images(folder / "images", train=8)
    words = ["--data", "folder", "--data-dir", str(images), "--image-size", "16", how, "--loader-workers", "0"]
    assert run([*SHORT, *words, "--model", "mlp", "--batch-size", "8", "--out", "run"]) == 0
    capsys.readouterr()
    config = TrainConfig(
        data="folder", data_dir=str(images), image_size=16, stream=how == "--stream", model="mlp", loader_workers=0
    )
    source = Trainer(config).source
    model = TrainedRun.open("run").model()
    ((x, y),) = source.test_batches()
    assert y is not None
    shares = model(x).softmax(1)
    files = sorted((images / "test").rglob("*"), key=lambda path: (path.parent.name, path.name))
    files = [path for path in files if path.is_file()]
    assert run(["predict", "run", *map(str, files), "--top", "1"]) == 0
    found = sorted(line.rpartition(": ")[2] for line in capsys.readouterr().out.splitlines())
    best = shares.max(1)
    want = sorted(
        f"{source.class_names[int(k)]} {float(p):.1%}" for p, k in zip(best.values, best.indices, strict=True)
    )
    assert found == want
    shutil.rmtree(images / "train")  # the data is not needed
    assert run(["predict", "run", str(files[0])]) == 0
    assert capsys.readouterr().out.count("%") == 3
    (folder / "no.jpg").write_text("nothing")
    for name, match in (
        ("no.jpg", "no.jpg cannot be read as an image"),
        ("nowhere.jpg", "there is no file nowhere.jpg"),
    ):
        assert run(["predict", "run", name]) == 2
        assert match in capsys.readouterr().err


def test_other_data(folder: Path, digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = write_images(folder / "images", train=8)
    words = ["--data", "folder", "--data-dir", str(images), "--image-size", "16", "--in-memory"]
    assert run([*SHORT, *words, "--model", "mlp", "--batch-size", "8", "--out", "run"]) == 0
    there = shutil.copytree(images, folder / "there")
    shutil.rmtree(images)
    assert run(["evaluate", "run"]) == 2
    assert "images" in capsys.readouterr().err
    found = told(capsys, "evaluate", "run", "--data-dir", str(there))
    assert found["scores"]["accuracy"] == metrics(Path("run"))[-1]["test_accuracy"]
    (there / "train" / "bee").rename(there / "train" / "wasp")
    (there / "test" / "bee").rename(there / "test" / "wasp")
    assert run(["evaluate", "run", "--data-dir", str(there)]) == 2
    assert "the classes of folder are " in capsys.readouterr().err
    assert run(["evaluate", str(digits), "--data", "random"]) == 2
    assert "does not take inputs" in capsys.readouterr().err


def test_files_of_data_of_the_users(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        *SHORT,
        "--model",
        f"{MINE}:whole",
        "--batch-size",
        "4",
        "--loader-workers",
        "0",
        "--lr",
        "0.1",
        "--epochs",
        "6",
    ]
    assert run([*words, "--data", f"{MINE}:letters", "--out", "run"]) == 0
    for name in "abc":
        (folder / name).write_text(name)
    capsys.readouterr()
    assert run(["predict", "run", "a", "b", "c", "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:4] for line in lines] == ["a: a", "b: b", "c: c"]
    assert all(line.count("%") == 2 for line in lines)
    (folder / "d").write_text("d")
    assert run(["predict", "run", "d"]) == 2
    assert f"d: {MINE}, line 21: ValueError: 'd' is not in list" in capsys.readouterr().err
    assert run(["evaluate", "run", "--data", f"{MINE}:others"]) == 2
    assert "the classes of letters_of_a_test.py:others are a, c, b, and the run's a, b, c" in capsys.readouterr().err
    assert run([*words, "--data", f"{MINE}:blind", "--epochs", "1", "--out", "blind"]) == 0
    assert run(["predict", "blind", "a"]) == 2
    assert "give its test data a method from_file(path)" in capsys.readouterr().err


def test_a_text_goes_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "text.txt").write_text("to be or not to be, that is the question\n" * 40)
    text = ["--data", "text", "--data-dir", "text.txt", "--model", "gpt", "--width", "16", "--heads", "2", "--layers", "2",
            "--context", "8", "--optimizer", "adamw", "--lr", "0.01"]  # fmt: skip
    assert run([*SHORT, *text, "--epochs", "6", "--out", "run"]) == 0
    (folder / "begin.txt").write_text("to be, that is")
    capsys.readouterr()
    assert run(["predict", "run", "begin.txt", "--length", "20", "--temperature", "0"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("to be, that is")
    assert len(out) == len("to be, that is") + 20 + 1
    assert run(["predict", "run", "begin.txt", "--length", "20", "--seed", "1"]) == 0
    drawn = capsys.readouterr().out
    assert run(["predict", "run", "begin.txt", "--length", "20", "--seed", "1"]) == 0
    assert capsys.readouterr().out == drawn
    (folder / "begin.txt").write_text("TO BE")
    assert run(["predict", "run", "begin.txt"]) == 2
    assert "the run's text has no 'B'; it knows " in capsys.readouterr().err
    assert run(["evaluate", "run"]) == 0
    assert "accuracy" in capsys.readouterr().out


def test_folders_without_weights(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["evaluate", "nowhere"]) == 2
    assert "nowhere is no run; name the folder that 'dtrp train --out' has written" in capsys.readouterr().err
    (folder / "begun").mkdir()
    (folder / "begun" / "config").write_text("model: mlp\n")
    assert run(["export", "begun"]) == 2
    assert "begun has no weights yet: no epoch is through" in capsys.readouterr().err
    (folder / "begun" / "config").write_text("model: mlp\nlabel-smoothing: 1\n")
    assert run(["export", "begun"]) == 2
    assert "has the setting label_smoothing, which this version of dtrp does not know" in capsys.readouterr().err


def test_a_run_of_an_older_version(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = shutil.copytree(digits, tmp_path / "old")
    (old / "data.json").unlink()
    assert told(capsys, "evaluate", str(old))["scores"] == told(capsys, "evaluate", str(digits))["scores"]
    Image.new("L", (8, 8), 120).save(tmp_path / "grey.png")
    assert run(["predict", str(old), str(tmp_path / "grey.png")]) == 0


def test_a_network_that_has_changed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*SHORT, "--data", f"{MINE}:letters", "--batch-size", "4", "--loader-workers", "0", "--epochs", "1"]
    assert run([*words, "--model", f"{MINE}:whole", "--out", "run"]) == 0
    config = Path("run/config").read_text()
    Path("run/config").write_text(config.replace(f"{MINE}:whole", f"{MINE}:tied"))
    assert run(["evaluate", "run"]) == 2
    assert f"are not those of --model {MINE}:tied as it is now" in capsys.readouterr().err
