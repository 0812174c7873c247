"""The folder of a checkpoint on real disks: full, read-only, failing, shared; whatever happens, the one before is there."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same, minibatches, network, pipeline
from launching import Server, start_ranks
from torch import nn

import dtrp
from dtrp.cli import run
from dtrp.saving import inspect
from dtrp.saving.folder import Replacement


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[Callable[[str], None]]:
    """A disk of this size on ``folder``; what is yielded mounts it again with other options."""
    if os.geteuid():
        pytest.skip("mounting a small disk needs root")
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a small disk cannot be mounted here: {error}")

    def again(options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True, capture_output=True)

    try:
        yield again
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def wide() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 500), nn.Tanh(), nn.Linear(500, 100), nn.Tanh(), nn.Linear(100, 3))


def make() -> dtrp.Pipeline:
    return pipeline(wide(), num_stages=3)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("portable", [False, True])
def test_a_full_disk(tmp_path: Path, portable: bool) -> None:
    disk, batches = tmp_path / "disk", minibatches(8)
    with mounted(disk, "16M") as again:
        pipe = make()
        for x, y in batches[:3]:
            pipe.step(x, y)
        pipe.save(disk / "saved", portable=portable, extra=3)
        before = files(disk)
        used = sum(map(len, before.values()))
        again(f"size={(used * 3 // 2) // 4096 * 4096}")  # room for a half of another one
        losses = []
        for i, (x, y) in enumerate(batches[3:]):
            if i == 2:
                with pytest.raises(
                    dtrp.CheckpointError, match=r"nothing was saved to .*No space left.*as it was"
                ) as told:
                    pipe.save(disk / "saved", portable=portable, extra=5)
                assert "\n" not in str(told.value)
                with pytest.raises(dtrp.CheckpointError, match="No space left"):
                    pipe.save(disk / "another", portable=portable)
                assert files(disk) == before
            losses.append(pipe.step(x, y))
        other = make()
        assert other.load(disk / "saved") == 3
        if not portable:
            assert all(torch.equal(other.step(x, y), loss) for (x, y), loss in zip(batches[3:], losses, strict=True))
        again("size=16M")
        pipe.save(disk / "saved", portable=portable, extra=8)
        assert inspect(disk / "saved").extra == 8
        assert os.listdir(disk) == ["saved"]


TRAIN = ["train", "--model", "mlp", "--limit-train", "400", "--limit-test", "50", "--batch-size", "32", "--threads", "1",
         "--stages", "2", "--epochs", "3", "--save-every", "4", "--quiet"]  # fmt: skip


def test_a_run_on_a_full_disk_says_so_and_goes_on_when_there_is_room(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*TRAIN, "--out", str(tmp_path / "whole")]) == 0
    used = sum(map(len, files(tmp_path / "whole").values()))
    with mounted(tmp_path / "disk", str(used // 4096 * 4096)) as again:
        folder = tmp_path / "disk" / "run"
        capsys.readouterr()
        assert run([*TRAIN, "--keep-last", "9", "--out", str(folder)]) == 2
        said = capsys.readouterr()
        assert said.err.count("\n") == 1
        assert "No space left on device" in said.err
        assert not (folder / "summary.json").exists()
        saves = sorted((folder / "saves").iterdir())
        assert saves
        for path in saves:
            assert inspect(path).num_updates == int(path.name.removeprefix("update-"))
        assert run(["train", "--resume", str(folder), "--quiet"]) == 2  # still full
        assert "No space left on device" in capsys.readouterr().err
        again("size=64M")
        assert run(["train", "--resume", str(folder), "--quiet"]) == 0
        assert "going on after update" in capsys.readouterr().out
        assert_same(torch.load(folder / "model.pt"), torch.load(tmp_path / "whole" / "model.pt"))


def test_a_disk_that_only_reads(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "16M") as again:
        pipe = make()
        pipe.save(tmp_path / "disk" / "saved", extra=1)
        again("ro")
        with pytest.raises(dtrp.CheckpointError, match="nothing was saved to .*Read-only file system"):
            pipe.save(tmp_path / "disk" / "saved", extra=2)
        with pytest.raises(dtrp.CheckpointError, match="nothing was saved to .*Read-only file system"):
            pipe.save(tmp_path / "disk" / "new" / "saved")
        pipe.step(*minibatches(1)[0])
        assert pipe.load(tmp_path / "disk" / "saved") == 1


@pytest.mark.skipif(not os.geteuid(), reason="root may write everywhere")
def test_a_folder_that_others_own(tmp_path: Path) -> None:
    pipe = make()
    pipe.save(tmp_path / "saved", extra=1)
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(dtrp.CheckpointError, match="nothing was saved to .*Permission denied"):
            pipe.save(tmp_path / "saved", extra=2)
    finally:
        tmp_path.chmod(0o755)
    assert pipe.load(tmp_path / "saved") == 1


FAILING = {
    "the old one does not move": ("rename", lambda path: path.name == "saved"),
    "the new one does not move": ("rename", lambda path: path.name == ".saved.new"),
    "the new one is not on the disk": ("fsync", lambda path: path.name == ".saved.new"),
    "the renaming is not on the disk": ("fsync", lambda path: path.name == "disk"),
    "no new one can be made": ("mkdir", lambda path: path.name == ".saved.new"),
}


@pytest.mark.parametrize("where", FAILING)
def test_a_disk_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    call, fails = FAILING[where]
    disk = tmp_path / "disk"
    pipe = make()
    pipe.save(disk / "saved", extra=1)
    before = files(disk)

    def failing(own: Any) -> Any:
        def job(path: Any, *args: Any, **options: Any) -> Any:
            at = Path(f"/proc/self/fd/{path}").readlink() if isinstance(path, int) else path
            if fails(at) and failures:
                raise failures.pop()
            return own(path, *args, **options)

        return job

    failures = [OSError(errno.EIO, "Input/output error")]
    if call == "fsync":
        monkeypatch.setattr(os, "fsync", failing(os.fsync))
    else:
        monkeypatch.setattr(Path, call, failing(getattr(Path, call)))
    with pytest.raises(dtrp.CheckpointError, match="nothing was saved to .*Input/output error.*as it was"):
        pipe.save(disk / "saved", extra=2)
    assert not failures
    assert files(disk) == before
    assert os.listdir(disk) == ["saved"]
    pipe.step(*minibatches(1)[0])
    pipe.save(disk / "saved", extra=3)
    assert inspect(disk / "saved").extra == 3


def test_what_is_interrupted_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = make()
    pipe.save(tmp_path / "saved", extra=1)

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dtrp.saving.manifest.written", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pipe.save(tmp_path / "saved", extra=2)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["saved"]
    other = make()
    assert other.load(tmp_path / "saved") == 1
    other.save(tmp_path / "saved", extra=3)


# -- what is in the way -----------------------------------------------------------------------------------------


def test_nothing_of_others_is_replaced(tmp_path: Path) -> None:
    pipe = make()
    pipe.save(tmp_path / "good")
    in_the_way: dict[str, Callable[[Path], Any]] = {
        "a file": lambda path: path.write_text("mine"),
        "a folder": lambda path: (path.mkdir(), (path / "thesis").write_text("mine")),
        "another's manifest": lambda path: (path.mkdir(), (path / "manifest.json").write_text('{"name": "mine"}')),
        "an empty manifest": lambda path: (path.mkdir(), (path / "manifest.json").write_text("")),
        "more than a checkpoint": lambda path: (copy(tmp_path / "good", path), (path / "notes").write_text("mine")),
        "a folder in it": lambda path: (copy(tmp_path / "good", path), (path / "sub").mkdir()),
        "a link": lambda path: path.symlink_to(tmp_path / "good"),
        "a link to nowhere": lambda path: path.symlink_to(tmp_path / "nowhere"),
    }
    for i, (what, put) in enumerate(in_the_way.items()):
        for name in ("{}", ".{}.new", ".{}.old"):
            target = tmp_path / f"{i}{name.format('')}" / "saved"
            target.parent.mkdir()
            put(target.with_name(name.format(target.name)))
            before = sorted(
                (str(path), path.is_symlink() or path.is_dir() or path.read_bytes()) for path in tmp_path.rglob("*")
            )
            with pytest.raises(dtrp.CheckpointError, match="exists and is no checkpoint; choose another name"):
                pipe.save(target)
            after = sorted(
                (str(path), path.is_symlink() or path.is_dir() or path.read_bytes()) for path in tmp_path.rglob("*")
            )
            assert before == after, what


def copy(source: Path, target: Path) -> None:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())


def test_what_a_save_has_left_is_replaced(tmp_path: Path) -> None:
    pipe = make()
    pipe.save(tmp_path / "good")
    left: dict[str, Callable[[Path], Any]] = {
        "empty": lambda path: None,
        "without a manifest": lambda path: (path / "manifest.json").unlink(),
        "a part of a manifest": lambda path: (path / "manifest.json").write_bytes(
            (path / "manifest.json").read_bytes()[:-40]
        ),
        "nothing but a manifest": lambda path: [p.unlink() for p in path.iterdir() if p.name != "manifest.json"],
        "damaged": lambda path: (path / "__0_0.distcp").write_bytes(b""),
        "in the middle": lambda path: (path / ".manifest.json.x7").write_text("{"),
    }
    for i, (what, damage) in enumerate(left.items()):
        for name in ("saved", ".saved.new", ".saved.old"):
            parent = tmp_path / f"{i}{name}"
            parent.mkdir()
            if what == "empty":
                (parent / name).mkdir()
            else:
                copy(tmp_path / "good", parent / name)
                damage(parent / name)
            pipe.save(parent / "saved", extra=i)
            assert inspect(parent / "saved").extra == i
            assert os.listdir(parent) == ["saved"], (what, name)


def test_a_link_can_be_loaded_and_not_saved_to(tmp_path: Path) -> None:
    pipe = make()
    pipe.save(tmp_path / "saved", extra=1)
    (tmp_path / "latest").symlink_to("saved")
    assert make().load(tmp_path / "latest") == 1
    with pytest.raises(dtrp.CheckpointError, match="latest exists and is no checkpoint"):
        pipe.save(tmp_path / "latest")
    (tmp_path / "parent").symlink_to(tmp_path)
    pipe.save(tmp_path / "parent" / "other", extra=2)
    assert inspect(tmp_path / "other").extra == 2


# -- two runs ---------------------------------------------------------------------------------------------------


def test_two_that_save_to_one_place(tmp_path: Path) -> None:
    first, second = Replacement(tmp_path / "saved"), Replacement(tmp_path / "saved")
    first.begin()
    (first.new / "__0_0.distcp").write_text("first")
    with pytest.raises(
        dtrp.CheckpointError, match="another process is saving to .*saved; give each run a folder of its own"
    ):
        second.begin()
    second.discard()
    second.close()
    with pytest.raises(dtrp.CheckpointError, match="another process is saving"):
        make().save(tmp_path / "saved")
    assert (first.new / "__0_0.distcp").read_text() == "first"
    first.replace()
    first.close()
    make().save(tmp_path / "saved", extra=2)
    assert inspect(tmp_path / "saved").extra == 2


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*args: Any) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr("fcntl.flock", flock)
    make().save(tmp_path / "saved", extra=1)
    make().save(tmp_path / "saved", extra=2)
    assert inspect(tmp_path / "saved").extra == 2


@pytest.mark.full
def test_processes_that_save_to_one_place_at_once(tmp_path: Path) -> None:
    """What is there in the end is all one's own."""
    server = Server()
    try:
        with ExitStack() as stack:
            runs = [
                stack.enter_context(
                    start_ranks(server, tmp_path / str(seed), 1, "save_many", str(tmp_path / "saved"), seed)
                )
                for seed in range(3)
            ]
            assert all(outcome.returncode == 0 for each in runs for outcome in each.wait(60.0)), [
                r.logs() for r in runs
            ]
    finally:
        server.close()
    other = pipeline(network(), num_stages=2)
    _, _, bias = other.load(tmp_path / "saved")
    assert other.model_state_dict()["head.bias"].tolist() == bias
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
