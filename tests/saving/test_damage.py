"""Checkpoints that something has happened to, drawn by hypothesis: refused in one line, or loaded as if nothing had.

Two hundred mutations: a hundred of them meet `Pipeline.load`, a hundred ``dtrp train --resume``. Where the manifest was made to fit
again, as a forger would, other weights may be loaded, since that is what a checkpoint is; but nothing runs, and nothing breaks.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import FIXED, answer
from damaged_checkpoints import Payload, forge
from helpers import adamw, assert_same, examples, minibatches, network, pipeline, saved_both_ways
from hypothesis import example, given, settings
from hypothesis import strategies as st

import dtrp
from dtrp.saving import inspect, manifest

NAMES = [".metadata", "__0_0.distcp", "manifest.json"]
STRANGE = [None, True, -1, 0, 1, 2**62, 2**70, 0.5, "", "x", "a\nb\x1b[2J", "\ud800", "../../x", [], {}, [[]], [0] * 50,
           {"tensor": "x"}, {"tuple": 3}, {"float": "nan"}, {"counter": [[0, 1]]}, {"dict": [[[], 1]]}, {"sparse": {}}]  # fmt: skip
Mutation = Callable[[Path, Path], bool]  # (checkpoint, what a payload would make) -> whether it was made to fit again


def flip(name: str, place: float, bit: int) -> Mutation:
    def job(folder: Path, ran: Path) -> bool:
        raw = bytearray((folder / name).read_bytes())
        raw[int(place * (len(raw) - 1))] ^= 1 << bit
        (folder / name).write_bytes(raw)
        return False

    return job


def cut(name: str, place: float) -> Mutation:
    def job(folder: Path, ran: Path) -> bool:
        raw = (folder / name).read_bytes()
        (folder / name).write_bytes(raw[: int(place * len(raw))])
        return False

    return job


def lose(name: str, fits: bool) -> Mutation:
    def job(folder: Path, ran: Path) -> bool:
        (folder / name).unlink()
        if fits and name != manifest.NAME:
            forge(folder)
        return fits and name != manifest.NAME

    return job


def rename(name: str, to: str, fits: bool) -> Mutation:
    def job(folder: Path, ran: Path) -> bool:
        (folder / name).rename(folder / to)
        if fits and manifest.NAME not in (name, to):
            forge(folder)
            return True
        return False

    return job


def add(name: str, content: bytes, fits: bool) -> Mutation:
    def job(folder: Path, ran: Path) -> bool:
        (folder / name).write_bytes(content)
        if fits:
            forge(folder)
        return fits

    return job


def link(name: str) -> Mutation:
    def job(folder: Path, ran: Path) -> bool:
        (folder / name).rename(folder.parent / "elsewhere")
        (folder / name).symlink_to(folder.parent / "elsewhere")
        return False

    return job


def swap(first: str, second: str, fits: bool) -> Mutation:
    def job(folder: Path, ran: Path) -> bool:
        a, b = (folder / first).read_bytes(), (folder / second).read_bytes()
        (folder / first).write_bytes(b)
        (folder / second).write_bytes(a)
        if fits and manifest.NAME not in (first, second):
            forge(folder)
            return True
        return False

    return job


def edit(choices: list[int], strange: Any, fits: bool) -> Mutation:
    """Walk into the manifest by ``choices``, and put something else there, or nothing."""

    def job(folder: Path, ran: Path) -> bool:
        def change(said: Any) -> None:
            *path, last = choices
            for choice in path:
                keys = list(said) if isinstance(said, dict) else list(range(len(said)))
                if not keys or not isinstance(said[keys[choice % len(keys)]], dict | list):
                    break
                said = said[keys[choice % len(keys)]]
            keys = list(said) if isinstance(said, dict) else list(range(len(said)))
            if not keys:
                return
            if strange == "lose it":
                del said[keys[last % len(keys)]]
            else:
                said[keys[last % len(keys)]] = strange

        if fits:
            forge(folder, change)
            return True
        said = json.loads((folder / manifest.NAME).read_bytes())
        change(said)
        (folder / manifest.NAME).write_text(json.dumps(said))
        return False

    return job


def hide(name: str, how: str, fits: bool) -> Mutation:
    """A payload in place of a file, or within the metadata."""

    def job(folder: Path, ran: Path) -> bool:
        payload: Any = Payload(ran)
        if how == "torch":
            with (folder / name).open("wb") as file:
                torch.save(payload, file)
        else:
            if how == "within":
                inner = pickle.loads((folder / ".metadata").read_bytes())
                inner.planner_data = payload
                payload = inner
            (folder / name).write_bytes(pickle.dumps(payload))
        if fits and name != manifest.NAME:
            forge(folder)
            return True
        return False

    return job


FILES, FITS = st.sampled_from(NAMES), st.booleans()
SHARES = st.floats(0, 1, exclude_max=True)
MUTATIONS: st.SearchStrategy[Mutation] = st.one_of(
    st.builds(flip, FILES, SHARES, st.integers(0, 7)),
    st.builds(cut, FILES, SHARES),
    st.builds(lose, FILES, FITS),
    st.builds(rename, FILES, st.sampled_from([*NAMES, "__1_0.distcp", "more", ".hidden"]), FITS),
    st.builds(add, st.sampled_from(["more", "__1_0.distcp", ".manifest.json.x", "a\nb"]), st.binary(max_size=20), FITS),
    st.builds(link, FILES),
    st.builds(swap, FILES, FILES, FITS),
    *[
        st.builds(
            edit,
            st.lists(st.integers(0, 40), min_size=1, max_size=7),
            st.sampled_from([*STRANGE, "lose it"]),
            st.sampled_from([True, True, False]),
        )
    ]
    * 3,
    st.builds(hide, FILES, st.sampled_from(["pickle", "torch", "within"]), FITS),
)


def make() -> dtrp.Pipeline:
    return pipeline(network(), adamw, num_stages=3, method="fdg", num_microbatches=2)


def gone_on(pipe: dtrp.Pipeline) -> dict[str, Any]:
    for x, y in minibatches(3, seed=9):
        pipe.step(x, y)
    pipe.flush()
    return pipe.model_state_dict()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exact and a portable checkpoint."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    pipe = make()
    return saved_both_ways(pipe, folder)


@pytest.fixture(scope="module")
def untouched(saved: Path) -> dict[str, dict[str, Any]]:
    """What comes of them."""
    result = {}
    for kind in ("exact", "portable"):
        pipe = make()
        pipe.load(saved / kind)
        result[kind] = gone_on(pipe)
    return result


@pytest.fixture(scope="module")
def seen() -> Counter[str]:
    return Counter()


@settings(FIXED, max_examples=examples(100))
@given(kind=st.sampled_from(["exact", "exact", "portable"]), mutation=MUTATIONS)
def test_loading(
    saved: Path, untouched: dict[str, dict[str, Any]], seen: Counter[str], kind: str, mutation: Mutation
) -> None:
    with tempfile.TemporaryDirectory() as beside:
        folder, ran = Path(beside) / "checkpoint", Path(beside) / "ran"
        shutil.copytree(saved / kind, folder)
        forged = mutation(folder, ran)
        torch.manual_seed(1)
        pipe = make()
        before = pipe.model_state_dict()
        refused = extra = None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                extra = pipe.load(folder)
        except dtrp.CheckpointError as error:
            refused = str(error)
        if refused is not None:
            seen["refused"] += 1
            assert refused.isprintable()
            assert str(folder) in refused
            if "of no use now" not in refused:
                assert_same(before, pipe.model_state_dict())
                gone_on(pipe)
        elif not forged:
            seen["loaded"] += 1
            assert extra == {"epoch": 1}
            assert_same(gone_on(pipe), untouched[kind])
        else:
            seen["forged"] += 1
            try:
                gone_on(pipe)
            except dtrp.StageError:
                seen["wrong later"] += 1
        assert not ran.exists()


# -- dtrp train --resume ------------------------------------------------------------------------------------------

TRAIN = ["train", "--data=digits", "--model=mlp", "--limit-train=60", "--limit-test=20", "--batch-size=16", "--epochs=2",
         "--threads=1", "--stages=3", "--num-microbatches=2", "--save-every=3", "--keep-last=9", "--quiet"]  # fmt: skip


@pytest.fixture(scope="module")
def broken_off(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed right before its end, and beside it the model of one that was not."""
    folder = tmp_path_factory.mktemp("runs")
    assert answer([*TRAIN, f"--out={folder / 'run'}"]) == (0, "")
    shutil.copy(folder / "run" / "model.pt", folder / "model.pt")
    (folder / "run" / "summary.json").unlink()
    shutil.rmtree(folder / "run" / "saves" / "update-00000008")
    assert [path.name for path in sorted((folder / "run" / "saves").iterdir())] == [
        f"update-{n:08d}" for n in (3, 4, 6)
    ]
    return folder


@settings(FIXED, max_examples=examples(100))
@example(mutations=[lose(manifest.NAME, False), edit([16], 0, True)])  # its number of updates
@given(mutations=st.lists(MUTATIONS, min_size=1, max_size=3))
def test_resuming(broken_off: Path, seen: Counter[str], mutations: list[Mutation]) -> None:
    """One to three of the run's saves, the newest first, are not what they were."""
    with tempfile.TemporaryDirectory() as beside:
        run, ran = Path(beside) / "run", Path(beside) / "ran"
        shutil.copytree(broken_off / "run", run)
        saves = sorted((run / "saves").iterdir(), reverse=True)
        forged = []
        for save, mutation in zip(saves, mutations, strict=False):
            os.rename(save, Path(beside) / "checkpoint")
            forged.append(mutation(Path(beside) / "checkpoint", ran))
            os.rename(Path(beside) / "checkpoint", save)
        before = {name: (run / name).read_bytes() for name in ("config", "metrics.jsonl", "model.pt")}
        code, error = answer(["train", "--resume", str(run), "--quiet"])
        seen[f"exit code {code}"] += 1
        assert code in (0, 2), error
        assert not ran.exists()
        # A mutation may have put a hidden file into a checkpoint; what a process leaves lies beside one.
        assert not [path for place in (run, run / "saves") for path in place.iterdir() if path.name.startswith(".")]
        if code:
            assert error.startswith("dtrp: "), error
            assert error.count("\n") == 1, error
            assert error.rstrip("\n").isprintable(), error
            if "of no use now" not in error:
                assert len(mutations) == 3 or any(forged), error
            if "no save to go on from" in error:
                assert before == {name: (run / name).read_bytes() for name in before}
                assert all(save.name in error for save in saves)
            return
        assert json.loads((run / "summary.json").read_text())["updates"] == 8
        assert inspect(run / "saves" / "update-00000008").kind == "portable"
        if not any(forged):
            assert_same(torch.load(run / "model.pt"), torch.load(broken_off / "model.pt"))


def test_some_were_refused_and_some_loaded(seen: Counter[str]) -> None:
    if seen.total() >= 200:  # all of the module has run here
        assert seen["refused"] > 50
        assert seen["loaded"] + seen["forged"] > 5
        assert seen["wrong later"] < 10
        assert seen["exit code 0"] > 40
        assert seen["exit code 2"] > 5
