"""A hostile world: random command lines, configuration files and damaged data, drawn by hypothesis.

Whatever comes, the answer is exit code 0 with a whole run folder, or 2 with one line that names what is wrong and nothing
written. Never a traceback.
"""

from __future__ import annotations

import contextlib
import json
import math
import pickle
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from damage import FIXED, answer, damages
from helpers import examples
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from dtrp.methods import list_methods

SMALL = {"data": "digits", "model": "mlp", "limit-train": 40, "limit-test": 20, "batch-size": 16, "epochs": 2,
         "max-updates": 4, "threads": 1}  # fmt: skip
FILES = ["config", "data.json", "metrics.jsonl", "model.pt", "saves", "summary.json"]

JUNK = st.sampled_from(
    [
        "",
        " ",
        "-1",
        "0",
        "1",
        "1e400",
        "nan",
        "inf",
        "-inf",
        "1.5",
        "two",
        "None",
        "true",
        "1,2",
        "/",
        "9" * 30,
        "\x00",
        "é",
    ]
)
COUNTS = st.sampled_from([*"12358" * 3, "0", "-3", "1000", "2147483648", "18446744073709551617"])
REALS = st.sampled_from([*("0.01", "0.5", "1") * 4, "0", "2", "1e-300", "1e300", "-1", "nan", "inf"])


def one_of(*names: str) -> st.SearchStrategy[str]:
    return st.sampled_from([*names * 3, names[0] + "x"])


VALUES: dict[str, st.SearchStrategy[str]] = {
    "method": one_of(*list_methods()),
    "stages": st.one_of(COUNTS, st.just("auto")),
    "cuts": st.sampled_from(["1", "1,2", "2,1", "0", "-1", "1,1", "99", "1,,2", ""]),
    "num-microbatches": st.one_of(COUNTS, st.just("auto")),
    "microbatch-samples": COUNTS,
    "ahead": REALS,
    "order": one_of("backward-first", "forward-first"),
    "leads": st.sampled_from(["1,0", "0,0", "2,1,0", "0", "-1,0", "0,1", "9,0", "1,0.5", "", ","]),
    "orders": st.sampled_from(["FB", "BF,FB", "RFIW", "FIW,FIW", "FFBB", "BBFF,FB", "W", "", ",", "F" * 99]),
    "keep": st.sampled_from(["auto", "graph", "input", "input,graph", "graph,graph,graph", ",", "keep"]),
    "memory-limit": st.sampled_from(["1", "0", "-1", "1MB", "2GiB", "1e9", "9" * 40, "3 bananas"]),
    "grad-shrink": REALS,
    "lr-shrink": REALS,
    "prediction": one_of("linear", "rollout", "informed", "none"),
    "epochs": st.sampled_from(["0", "1", "2", "-1", "x"]),
    "max-updates": st.sampled_from(["0", "1", "3", "-1", "x"]),
    "limit-train": COUNTS,
    "limit-test": COUNTS,
    "batch-size": COUNTS,
    "optimizer": one_of("sgd", "adam", "adamw", "nadam"),
    "lr": REALS,
    "momentum": REALS,
    "weight-decay": REALS,
    "lr-schedule": one_of("constant", "cosine", "multistep"),
    "warmup-updates": COUNTS,
    "max-grad-norm": REALS,
    "clip": one_of("stage", "global"),
    "on-nonfinite": one_of("stop", "skip"),
    "device": st.sampled_from(["cpu", "cpu,cpu", "cuda:99", "", "tpu", ","]),
    "dtype": one_of("float32", "float64", "bfloat16"),
    "threads": st.sampled_from(["0", "1", "-1", "x", "9" * 12, "9" * 30]),
    "seed": COUNTS,
    "prediction-error-every": COUNTS,
    "image-size": COUNTS,
    "data": one_of("digits", "random", "folder", "cifar10", "cifar100", "mnist"),
    "data-arg": st.sampled_from(["a=1", "a", "=", "a=1:2"]),
    "loss": st.sampled_from(
        ["mse", "torch.nn.functional:cross_entropy", "no.such:loss", "/nowhere.py:loss", ":", "torch:no"]
    ),
    "metric": st.sampled_from(["accuracy", "top5", "top9", "torch.nn.functional:cross_entropy", "no.such:metric", ":"]),
    "callback": st.sampled_from(["x", "no.such:Log", "torch.nn:Linear", "torch:float32", ":"]),
    "best": one_of("highest", "lowest"),
    "data-dir": st.sampled_from(["", "/nowhere", "/dev/null", "/"]),
    "loader-workers": st.sampled_from(["0", "1", "-1", "x"]),
    "mean": st.sampled_from(["0.5,0.5,0.5", "0.5", "", "nan,nan,nan", "a,b,c"]),
    "std": st.sampled_from(["0.5,0.5,0.5", "0,0,0", "", "inf,inf,inf"]),
    "listing": st.sampled_from(["", "/nowhere", "/dev/null", "/"]),
    "model": one_of("mlp", "vgg11"),
    "replicas": st.sampled_from(["0", "-1", "x"]),
    "workers": st.sampled_from(["0", "-1", "x", "4:2", "0:3", "1:", ":", "2:4:6"]),
    "max-restarts": st.sampled_from(["0", "1", "-1", "x"]),
    "save-every": st.sampled_from(["1", "3", "2s", "0.000001s", "1.5h", "0", "0s", "-1", "5 m", "1e9", "9" * 30]),
    "keep-last": st.sampled_from(["1", "2", "9", "0", "-1", "x"]),
    "plan": st.sampled_from(["", "/nowhere", "/dev/null", "/"]),
    "config": st.sampled_from(["", "/nowhere", "/dev/null", "/"]),
}
FLAGS = [
    "augment",
    "no-augment",
    "nesterov",
    "no-nesterov",
    "trace",
    "quiet",
    "stream",
    "in-memory",
    "skip-damaged",
    "overwrite",
    "frobnicate",
]


def starts_processes(entry: tuple[Any, Any]) -> bool:
    """A launch takes seconds; what workers do with a command line is `test_workers.py`'s business."""
    return entry[0] in ("workers", "replicas") and str(entry[1]).strip().isdecimal() and str(entry[1]).strip() != "0"


OPTIONS = (
    st.sampled_from(sorted(VALUES))
    .flatmap(
        lambda name: st.tuples(st.just(name), st.integers(0, 9).flatmap(lambda kind: VALUES[name] if kind else JUNK))
    )
    .filter(lambda option: not starts_processes(option))
)


def check(arguments: list[str], folder: Path) -> int:
    """Run a command whose --out is in ``folder``: nothing is there afterwards but a whole run, if it went well."""
    out = folder / "run"
    code, error = answer([*arguments, "--out", str(out)])
    assert code in (0, 2), (code, error)
    if code:
        assert error.startswith("dtrp: "), error
        assert error.count("\n") == 1, error
        assert len(error) > len("dtrp: \n")
        assert not list(folder.iterdir()), "nothing is written"
        return code
    files = sorted(path.name for path in out.iterdir())
    whole = [name for name in files if name not in ("trace.json", "code.json")]
    assert whole == FILES or whole == [name for name in FILES if name != "saves"]
    assert [path.name for path in folder.iterdir()] == ["run"]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["updates"] == lines[-1]["update"]
    assert torch.load(out / "model.pt", weights_only=True)
    return code


@pytest.fixture(scope="module")
def codes() -> Counter[int]:
    """How the commands of this module ended: a property that nothing gets past says little."""
    return Counter()


def command_line(options: list[tuple[str, str]], flags: list[str]) -> list[str]:
    typed = {name: str(value) for name, value in SMALL.items()} | dict(options)
    return ["train", *(f"--{name}={value}" for name, value in typed.items()), *(f"--{flag}" for flag in flags)]


@settings(FIXED, max_examples=examples(300))
@example(options=[], flags=[])
@given(options=st.lists(OPTIONS, max_size=4), flags=st.lists(st.sampled_from(FLAGS[:-1] * 2 + FLAGS[-1:]), max_size=1))
def test_command_lines(codes: Counter[int], options: list[tuple[str, str]], flags: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        codes[check(command_line(options, flags), Path(folder))] += 1


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.dates(), st.binary(max_size=4)
)
VALUES_OF_A_FILE = st.one_of(
    SCALARS, st.lists(SCALARS, max_size=3), st.dictionaries(st.text(max_size=3), SCALARS, max_size=2)
)
ENTRIES = st.integers(0, 9).flatmap(
    lambda kind: (
        OPTIONS.map(typed)
        if kind > 2
        else st.tuples(st.sampled_from(sorted(VALUES)), VALUES_OF_A_FILE)
        if kind
        else st.tuples(st.one_of(st.text(max_size=6), st.integers(), st.none()), SCALARS)
    )
)


def typed(option: tuple[str, str]) -> tuple[str, Any]:
    """The value as a file's own type, where it is one."""
    name, text = option
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return name, kind(text)
    return name, text


def as_toml(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return json.dumps(value, default=str)


@settings(FIXED, max_examples=examples(300))
@given(entries=st.lists(ENTRIES, max_size=3), toml=st.booleans())
def test_configuration_files(codes: Counter[int], entries: list[tuple[Any, Any]], toml: bool) -> None:
    values = {**SMALL, **{entry[0]: entry[1] for entry in entries if not starts_processes(entry)}}
    text = yaml.safe_dump(values, allow_unicode=True)
    if toml:
        text = "".join(
            f"{json.dumps(str(key))} = {as_toml(value)}\n" for key, value in values.items() if value is not None
        )
    check_file("config", "c.toml" if toml else "c.yaml", text.encode(errors="replace"), codes)


def check_file(option: str, name: str, content: bytes, codes: Counter[int], *more: str) -> None:
    with tempfile.TemporaryDirectory() as beside, tempfile.TemporaryDirectory() as folder:
        (Path(beside) / name).write_bytes(content)
        codes[check(["train", f"--{option}={Path(beside) / name}", *more], Path(folder))] += 1


TEXT = b"\n".join(f"{name}: {value}".encode() for name, value in {**SMALL, "cuts": "[1, 2]", "lr": 0.01}.items())


@settings(FIXED, max_examples=examples(60))
@given(damage=damages(len(TEXT)))
def test_damaged_configuration_files(codes: Counter[int], damage: Callable[[bytes], bytes]) -> None:
    check_file("config", "c.yaml", damage(TEXT), codes, "--epochs=1", "--max-updates=2", "--threads=1", "--limit-train=40",
               "--limit-test=20", "--model=mlp", "--batch-size=16")  # fmt: skip


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    arguments = ["plan", "--data", "digits", "--model", "mlp", "--workers", "2", "--batch-size", "16", "--repeats", "1",
                 "--latency", "0.001", "--bandwidth", "1GB", "--neighbours", "0", "--out", str(path)]  # fmt: skip
    assert answer(arguments)[0] == 0
    return path.read_bytes()


@settings(FIXED, max_examples=examples(60))
@given(data=st.data())
def test_damaged_plans(codes: Counter[int], plan_file: bytes, data: st.DataObject) -> None:
    content = data.draw(damages(len(plan_file)))(plan_file)
    check_file("plan", "plan.json", content, codes, "--model=mlp", "--epochs=1", "--max-updates=2", "--threads=1",
               "--limit-train=40", "--limit-test=20")  # fmt: skip


def write_images(folder: Path) -> None:
    draw = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i, ending in enumerate(("png", "jpg", "bmp")):
            Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / name / f"{i}.{ending}")


def write_cifar(folder: Path) -> None:
    draw = np.random.default_rng(0)
    folder = folder / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        content = {b"data": draw.integers(0, 256, (4, 3072), dtype=np.uint8), b"labels": [1, 2, 3, 4]}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"c%d" % i for i in range(10)]}, protocol=2))


@pytest.fixture(scope="module", params=["folder", "cifar10"])
def data_set(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("data") / request.param
    (write_images if request.param == "folder" else write_cifar)(folder)
    return request.param, folder


@settings(FIXED, max_examples=examples(110))
@given(data=st.data())
def test_damaged_data(codes: Counter[int], data_set: tuple[str, Path], data: st.DataObject) -> None:
    """A damaged file is refused by its name, or its values are other ones; sizes and pickles in it cannot do harm."""
    name, original = data_set
    with tempfile.TemporaryDirectory() as beside, tempfile.TemporaryDirectory() as folder:
        copied = Path(beside) / name
        shutil.copytree(original, copied)
        victim = data.draw(st.sampled_from(sorted(path for path in copied.rglob("*") if path.is_file())))
        raw = victim.read_bytes()
        # Half of them near the beginning, where formats keep their sizes and types.
        size = data.draw(st.sampled_from([len(raw), min(len(raw), 100)]))
        victim.write_bytes(data.draw(damages(size))(raw))
        arguments = [
            "train",
            f"--data={name}",
            f"--data-dir={copied}",
            "--model=mlp",
            "--epochs=1",
            "--threads=1",
            "--batch-size=4",
        ]
        arguments += ["--image-size=8"] if name == "folder" else []
        codes[check(arguments, Path(folder))] += 1


def test_some_of_them_went_well_and_some_did_not(codes: Counter[int]) -> None:
    number = examples(600)
    if codes.total() >= number:  # all of the module has run here
        assert codes[0] > number / 6
        assert codes[2] > number / 6
