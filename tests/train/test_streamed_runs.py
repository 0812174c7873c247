"""``dtrp train --data folder --stream``: one run on any number of loader workers and stages, resumed, and broken."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from image_folders import damage, write_images
from run_folders import check_same

from dtrp.cli import run
from dtrp.train import TrainConfig, Trainer
from dtrp.train.config import config_text, option_words, read_settings

SMALL = ["train", "--data", "folder", "--image-size", "16", "--model", "mlp", "--batch-size", "8", "--epochs", "2", "--lr", "0.01",
         "--threads", "1", "--stages", "2", "--num-microbatches", "2", "--quiet"]  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), train=16)


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed, decoded in the training process."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run([*command(images), "--loader-workers", "0", "--out", str(folder)]) == 0
    return folder


def command(images: Path) -> list[str]:
    return [*SMALL, "--stream", "--data-dir", str(images)]


def dtrp(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "dtrp", *arguments]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, env=environment, check=False)


def test_loader_workers_change_nothing(
    images: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*command(images), "--out", str(tmp_path / "run")]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith(
        "mlp on folder: 48 training and 12 test images in 3 classes, 3x16x16, streamed by 2 loader workers; dtrp, 2 stages"
    )
    check_same(tmp_path / "run", whole)
    assert (tmp_path / "run" / "listing").read_bytes() == (whole / "listing").read_bytes()


@pytest.mark.full
def test_ranks_change_nothing(images: Path, whole: Path, tmp_path: Path) -> None:
    done = dtrp(*command(images), "--workers", "2", "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    check_same(tmp_path / "run", whole)


@pytest.mark.full
@pytest.mark.parametrize("options", [["--replicas", "2"], ["--method", "dgl"]])
def test_ranks_of_other_kinds(images: Path, tmp_path: Path, options: list[str]) -> None:
    done = dtrp(*command(images), "--workers", "2", "--out", str(tmp_path / "run"), *options)
    assert done.returncode == 0, done.stderr
    if options[0] == "--method":
        assert run([*command(images), "--out", str(tmp_path / "one"), *options]) == 0
        check_same(tmp_path / "run", tmp_path / "one")


@pytest.mark.full
def test_a_run_that_is_broken_off_goes_on_to_the_bit(
    images: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Within an epoch, after kill -9, with other loader workers, and nothing listed or measured again."""
    folder = tmp_path / "run"
    slow = [*command(images), "--save-every", "1", "--keep-last", "20", "--out", str(folder)]
    process = subprocess.Popen([sys.executable, "-m", "dtrp", *slow], stdout=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not (folder / "saves" / "update-00000003" / "manifest.json").exists():
        assert time.monotonic() < until
        time.sleep(0.002)
    process.kill()
    process.wait()
    (folder / "summary.json").unlink(missing_ok=True)
    for save in folder.glob("saves/update-*"):
        if save.name > "update-00000003":
            shutil.rmtree(save)
    assert (folder / "listing").is_file()
    assert run(["train", "--resume", str(folder), "--loader-workers", "1", "--quiet"]) == 0
    assert "going on after update 3, what was in flight included" in capsys.readouterr().out
    check_same(folder, whole)


def test_the_listing_is_kept_where_the_caller_says(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = Path(shutil.copytree(images, tmp_path / "own"))
    once = [*command(own), "--max-updates", "1", "--loader-workers", "0", "--listing", str(tmp_path / "listing")]
    assert run(once) == 0
    written = (tmp_path / "listing").read_bytes()
    assert run(once) == 0
    assert (tmp_path / "listing").read_bytes() == written
    assert "listed anew" not in capsys.readouterr().out
    (own / "train" / "ant" / "00.jpg").unlink()
    assert run(once) == 0
    out = capsys.readouterr().out
    assert "own has changed since it was listed; it is listed anew" in out
    assert out.startswith("mlp on folder: 47 training")
    assert run([*once[:-1], str(own / "train" / "ant" / "01.jpg")]) == 2
    assert "01.jpg is no listing of images; choose another name for --listing" in capsys.readouterr().err
    assert run([*once[:-1], str(tmp_path / "nowhere" / "listing")]) == 2
    assert "nowhere/listing lies in no folder; make it first, or choose another name" in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.parametrize("workers", [pytest.param([], marks=pytest.mark.full), ["--workers", "2"]])
def test_a_damaged_file_ends_the_run_by_name(images: Path, tmp_path: Path, workers: list[str]) -> None:
    own = Path(shutil.copytree(images, tmp_path / "own"))
    damage(own / "train" / "bee" / "04.jpg")
    done = dtrp(
        *command(own), "--mean", "0.5,0.5,0.5", "--std", "0.2,0.2,0.2", "--out", str(tmp_path / "run"), *workers
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1
    assert "bee/04.jpg cannot be read as an image" in done.stderr
    assert "or pass --skip-damaged" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own"], "nothing half-written"


def test_damaged_files_are_counted(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = Path(shutil.copytree(images, tmp_path / "own"))
    damage(own / "train" / "bee" / "04.jpg")
    assert run([*command(own), "--skip-damaged", "--out", str(tmp_path / "run")]) == 0
    check_counted(capsys.readouterr().out, tmp_path / "run")


@pytest.mark.full
def test_damaged_files_are_counted_on_ranks(images: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(images, tmp_path / "own"))
    damage(own / "train" / "bee" / "04.jpg")
    done = dtrp(*command(own), "--skip-damaged", "--workers", "2", "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    check_counted(done.stdout, tmp_path / "run")


def check_counted(shown: str, folder: Path) -> None:
    assert "1 damaged file, in whose place others of the class were taken: " in shown.replace("\n", "")
    (text,) = json.loads((folder / "summary.json").read_text())["damaged"]
    assert "bee/04.jpg cannot be read" in text


@pytest.mark.full
def test_a_dead_loader_worker_ends_the_run_by_name(images: Path, tmp_path: Path) -> None:
    words = [*command(images), "--epochs", "4000", "--out", str(tmp_path / "run"), "--loader-workers", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dtrp", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    while not process.stdout.readline().startswith("epoch"):
        assert process.poll() is None
    (worker,) = map(int, subprocess.check_output(["pgrep", "-P", str(process.pid)], text=True).split())
    os.kill(worker, signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert error.count("\n") == 1
    assert f"loader worker 0 (process {worker}) was killed by SIGKILL; is the memory short?" in error
    assert f"go on with: dtrp train --resume {tmp_path / 'run'}" in error


@pytest.mark.full
def test_no_folder_is_said_once_on_ranks(tmp_path: Path) -> None:
    done = dtrp(*command(tmp_path / "nowhere"), "--workers", "2")
    assert done.returncode == 2
    assert done.stderr.startswith(f"dtrp: no folder {tmp_path}/nowhere; pass data_dir")
    assert done.stderr.count("\n") == 1


def test_few_images_are_held_in_memory_unless_it_is_asked(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(data="folder", data_dir=str(images), model="mlp", stages=1, loader_workers=0)
    in_memory = Trainer(config)
    assert in_memory.dataset is not None
    assert in_memory.source.details == " in 3 classes, 3x32x32, in memory"
    monkeypatch.setattr("dtrp.train.build._STREAMED_FROM_BYTES", 60 * 3 * 32**2)
    by_itself = Trainer(config)
    assert by_itself.dataset is None
    assert by_itself.source.details == " in 3 classes, 3x32x32, streamed"
    assert (by_itself.source.num_train, by_itself.source.num_test) == (48, 12)
    monkeypatch.setattr("dtrp.train.build._STREAMED_FROM_BYTES", 60 * 3 * 32**2 + 1)
    assert Trainer(config).dataset is not None


@pytest.mark.usefixtures("float64")
def test_bp_is_a_plain_loop_over_the_same_batches(images: Path) -> None:
    config = TrainConfig(
        data="folder", data_dir=str(images), stream=True, image_size=16, model="resnet14-8", method="bp", stages=2,
        num_microbatches=1, batch_size=8, max_updates=5, epochs=1, dtype="float64", lr_schedule="constant", lr=0.05,
        loader_workers=1,
    )  # fmt: skip
    trainer = Trainer(config)
    plain = copy.deepcopy(torch.nn.Sequential(*(layer for stage in trainer.pipe.stages for layer in stage)))
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for _, (x, y) in zip(range(5), trainer.source.train_batches(8, epoch=0), strict=False):
        assert x is not None
        assert y is not None
        torch.nn.functional.cross_entropy(plain(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    trainer.run()
    trained = torch.nn.Sequential(*(layer for stage in trainer.pipe.stages for layer in stage)).state_dict()
    assert all(torch.equal(trained[name], value) for name, value in plain.state_dict().items())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--stream", "--data", "digits"], "--stream with --data digits: it is for a folder of images"),
        (["--in-memory", "--data", "random"], "--in-memory with --data random: it is for a folder"),
        (["--loader-workers", "-1"], "--loader-workers -1: at least 0"),
        (["--mean", "0.5,0.5,0.5"], "--mean without --std: pass both"),
        (["--mean", "0.5", "--std", "1"], "--mean 0.5: three numbers from 0 to 1"),
        (["--mean", "0,0,0", "--std", "1,0,1"], "--std 1.0,0.0,1.0: images are divided by it"),
        (["--mean", "a,b"], "'a,b' is no list of numbers like 0.5,0.5,0.5"),
        (["--in-memory", "--skip-damaged"], "--skip-damaged with --in-memory"),
    ],
)
def test_options_that_do_not_fit(options: list[str], match: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*SMALL, "--data-dir", "/nowhere", *options]) == 2
    assert match in capsys.readouterr().err


def test_options_come_back_from_a_run(tmp_path: Path) -> None:
    config = TrainConfig(data="folder", stream=False, mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 0.5))
    options = {"mean": config.mean, "std": config.std, "stream": False}  # as 'dtrp plan' repeats them
    assert option_words(options) == ["--mean", "0.1,0.2,0.3", "--std", "1.0,1.0,0.5", "--in-memory"]
    values = read_settings(config_text(config))
    assert values is not None
    assert option_words(values) == [
        "--data", "folder", "--in-memory", "--mean", "0.1,0.2,0.3", "--std", "1.0,1.0,0.5"
    ]  # fmt: skip
    (tmp_path / "config.yaml").write_text(config_text(config))
    assert run(["train", "--config", str(tmp_path / "config.yaml"), "--data-dir", "/nowhere"]) == 2


def test_a_comparison_lists_the_folder_once(images: Path, tmp_path: Path) -> None:
    words = ["compare", *command(images)[1:], "--methods", "bp,dtrp", "--seeds", "1", "--epochs", "1", "--one-process"]
    words.remove("--quiet")
    folder = tmp_path / "compared"
    assert run([*words, "--loader-workers", "0", "--out", str(folder)]) == 0
    assert (folder / "listing").is_file()
    assert all(f"listing: {folder}/listing" in path.read_text() for path in folder.glob("*/config"))
