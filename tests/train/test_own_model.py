"""``dtrp train --model``: networks of the user's own, and of other libraries."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from user_files import user_files

from dtrp.cli import run
from dtrp.train import build
from dtrp.train.config import TrainConfig, config_text, option_words, read_settings
from dtrp.train.user_code import call_function, parse_arguments

SOURCE = """
import torch
from torch import nn
from beside import WIDTH


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x):
        return x + self.layer(x).tanh()


class Net(nn.Module):
    def __init__(self, depth, width):
        super().__init__()
        self.stem, self.head = nn.Linear(64, width), nn.Linear(width, 10)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, x):
        x = self.stem(x.flatten(1))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def any_module(depth=4, width=WIDTH):
    return Net(depth, width)


def sequential():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))


def parts():
    return [nn.Sequential(nn.Flatten(), nn.Linear(64, 16)), nn.Sequential(nn.Tanh(), nn.Linear(16, 10))]


def nothing():
    return 3


def no_parts():
    return [nn.Tanh(), "head"]


def fails():
    raise RuntimeError("no weights")


number = 5
"""
TRAIN = ["train", "--threads", "1", "--quiet", "--dtype", "float64", "--batch-size", "64", "--limit-train", "300",
         "--limit-test", "50", "--lr-schedule", "constant"]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with user_files(tmp_path, monkeypatch, {"nets_of_a_test.py": SOURCE, "beside.py": "WIDTH = 16\n"}) as place:
        yield place


def plain(model: nn.Module, config: TrainConfig) -> dict[str, Tensor]:
    """The weights after a plain loop over the run's mini-batches."""
    source = build.open_source(config, print, "cpu")
    optimizer = build.make_optimizer(config)(list(model.parameters()))
    for epoch in range(config.epochs):
        for x, y in source.train_batches(config.batch_size, epoch=epoch):
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize(
    ("options", "make"),
    [
        (["--model", "nets_of_a_test.py:sequential", "--stages", "2"], "sequential"),
        (["--model", "nets_of_a_test:any_module", "--stages", "3"], "any_module"),
        (["--model", "nets_of_a_test:any_module", "--points", "blocks.1,head"], "any_module"),
        (["--model", "nets_of_a_test.py:parts"], "parts"),
    ],
)
def test_bp_trains_it_as_a_plain_loop_does(folder: Path, options: list[str], make: str) -> None:
    assert run([*TRAIN, *options, "--method", "bp", "--epochs", "2", "--out", "run"]) == 0
    torch.manual_seed(0)
    model = call_function("--model", f"nets_of_a_test.py:{make}", {})
    whole = nn.Sequential(*model) if isinstance(model, list) else model
    config = TrainConfig(dtype="float64", limit_train=300, limit_test=50, epochs=2, lr_schedule="constant")
    want = plain(whole.double(), config)
    found = torch.load("run/model.pt")
    assert found.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(found[name], want[name], rtol=1e-10, atol=1e-10)


def test_the_run_remembers_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "nets_of_a_test.py:any_module", "--model-arg", "depth=3", "--model-arg", "width=8"]
    assert run([*TRAIN, *options, "--points", "blocks.1,head", "--epochs", "3", "--out", "whole"]) == 0
    assert run([*TRAIN, *options, "--points", "blocks.1,head", "--epochs", "2", "--out", "run"]) == 0
    assert (Path("run/config").read_text().count("depth=3"), Path("run/config").read_text().count("- head")) == (1, 1)
    capsys.readouterr()
    with open("nets_of_a_test.py", "a") as file:
        file.write("# changed\n")
    assert run(["train", "--resume", "run", "--epochs", "3"]) == 0
    assert "nets_of_a_test.py:any_module has changed since this run began" in capsys.readouterr().out
    a, b = (torch.load(f"{name}/model.pt") for name in ("whole", "run"))
    assert a["blocks.2.layer.weight"].shape == (8, 8)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_settings_in_a_file_and_on_a_command_line() -> None:
    config = TrainConfig(model="nets.py:make", model_arg=("depth=3", "names=[a, b]"), points=("a.1", "b"))
    settings = read_settings(config_text(config))
    assert settings is not None
    assert settings["model-arg"] == ["depth=3", "names=[a, b]"]
    words = option_words({name: settings[name] for name in ("model", "model-arg", "points")})
    assert words == [
        "--model",
        "nets.py:make",
        "--model-arg",
        "depth=3",
        "--model-arg",
        "names=[a, b]",
        "--points",
        "a.1,b",
    ]
    assert "model-arg" not in (read_settings(config_text(TrainConfig())) or {})
    given = parse_arguments("--model-arg", ["a=3", "b=text", "c=[1, 2]", "d=1e-3", "e=null", "f=x: y: z"])
    assert given == {"a": 3, "b": "text", "c": [1, 2], "d": "1e-3", "e": None, "f": "x: y: z"}


@pytest.mark.full
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # torch's launcher leaves its logs open
def test_workers_train_it_as_one_process_does(folder: Path) -> None:
    model = ["--model", "nets_of_a_test.py:any_module", "--epochs", "2"]
    assert run([*TRAIN, *model, "--stages", "2", "--out", "alone"]) == 0
    assert run([*TRAIN, *model, "--workers", "2", "--out", "workers"]) == 0
    a, b = (torch.load(f"{name}/model.pt") for name in ("alone", "workers"))
    assert all(torch.equal(a[name], b[name]) for name in a)


SHORT = ["--epochs", "1", "--limit-train", "100", "--limit-test", "20", "--threads", "1"]


def test_it_is_compared(folder: Path) -> None:
    grid = ["--methods", "bp,dtrp", "--stages", "2", "--seeds", "1", "--one-process", "--out", "grid"]
    assert run(["compare", "--model", "nets_of_a_test.py:any_module", *SHORT, *grid]) == 0
    assert (Path("grid") / "dtrp-K2-A2-seed0" / "summary.json").is_file()


@pytest.mark.full
def test_it_is_planned(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", "nets_of_a_test.py:any_module"]
    assert run(["plan", *model, "--workers", "2", "--repeats", "1", "--latency", "1e-5", "--bandwidth", "1GB"]) == 0
    assert "--model nets_of_a_test.py:any_module" in capsys.readouterr().out
    assert (
        run(["train", *model, *SHORT, "--plan", "plan.json", "--batch-size", "64", "--out", "planned", "--quiet"]) == 0
    )
    assert run(["train", "--resume", "planned", "--epochs", "2", "--quiet"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nets_of_a_test.py:nothing"], "returned a int; return an nn.Sequential, a list of modules"),
        (["nets_of_a_test.py:no_parts"], "returned a list with a Tanh"),
        (["nets_of_a_test.py:fails"], r"nets_of_a_test.py, line 50: RuntimeError: no weights"),
        (["nets_of_a_test.py:anymodule"], "unknown function 'anymodule'; did you mean 'any_module'"),
        (["nets_of_a_test.py:number"], "number is a int, and no function"),
        (["nets_of_a_test.py:"], "pass package.module:function, or path/file.py:function"),
        (["net_of_a_test.py:x"], "there is no file net_of_a_test.py"),
        (["no.such:x"], "there is no module no "),
        (["broken_of_a_test.py:x"], "broken_of_a_test.py, line 2: SyntaxError"),
        (["missing_of_a_test.py:x"], "ModuleNotFoundError: No module named 'not_there'"),
        (["nets_of_a_test.py:any_module", "--model-arg", "dept=3"], "unexpected keyword argument 'dept'; its arguments are"),
        (["nets_of_a_test.py:any_module", "--model-arg", "depth"], "--model-arg depth: pass name=value"),
        (["nets_of_a_test.py:any_module", "--model-arg", "depth=3", "--model-arg", "depth=3"], "depth is there twice"),
        (["nets_of_a_test.py:any_module", "--layers", "3"], "pass its arguments as --model-arg name=value"),
        (["nets_of_a_test.py:any_module", "--points", "blocks.9"], "unknown submodule in points: 'blocks.9'"),
        (["nets_of_a_test.py:any_module", "--points", "blocks.1", "--stages", "2"], "both say where stages begin"),
        (["nets_of_a_test.py:parts", "--points", "1"], "--points with a list of modules"),
        (["nets_of_a_test.py:parts", "--stages", "3"], "the list has 2 modules"),
        (["resnet20", "--model-arg", "a=3"], "has options of its own"),
        (["resnet20", "--stem", "imagenet"], "has no choice of it"),
        (["timm:no_such_network"], "timm"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(
    folder: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "broken_of_a_test.py").write_text("x = 1\nx = = 2\n")
    (folder / "missing_of_a_test.py").write_text("import not_there\n")
    assert run([*TRAIN, "--model", *options, "--out", "run"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not Path("run").exists()


def test_the_stem_follows_the_size() -> None:
    def first(size: int, **settings: Any) -> nn.Module:
        data = type(
            "Data", (), {"sample_shape": (3, size, size), "num_classes": 10, "name": "folder", "is_text": False}
        )()
        model = build.make_model(TrainConfig(model="resnet18", **settings), data)
        return next(member for member in model.modules() if isinstance(member, nn.Conv2d))  # type: ignore[union-attr]

    assert [first(size).kernel_size for size in (32, 63, 64)] == [(3, 3), (3, 3), (7, 7)]
    assert first(224, stem="cifar").kernel_size == (3, 3)
    assert first(32, stem="imagenet").kernel_size == (7, 7)


@pytest.mark.full
def test_a_network_of_transformers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed; pip install 'dtrp[transformers]'")
    (folder / "text.txt").write_text("to be or not to be, that is the question\n" * 40)
    sizes = ["n_embd=16", "n_layer=2", "n_head=2", "n_positions=16", "tie_word_embeddings=false"]
    text = ["--data", "text", "--data-dir", "text.txt", "--context", "8", "--limit-train", "64", "--limit-test", "8"]
    options = [word for size in sizes for word in ("--model-arg", size)]
    assert run(["train", "--model", "hf:gpt2", *options, *text, "--epochs", "1", "--stages", "2", "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "hf:gpt2 on text" in out
    assert "perplexity" in out
    assert run(["train", "--model", "hf:gpt3", *text]) == 2
    assert "unknown folder, or type of model, 'gpt3'" in capsys.readouterr().err
