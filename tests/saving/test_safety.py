"""A checkpoint that is damaged, or made to do harm, is refused in one line; nothing has changed then, and nothing of it runs."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import random
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from damaged_checkpoints import Payload, check_refused, forge, make
from helpers import assert_same, minibatches, saved_both_ways
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

import dtrp
from dtrp.saving import inspect, manifest, read_state

KINDS = ["exact", "portable"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints called by their kinds."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    pipe = make()
    return saved_both_ways(pipe, folder)


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved / request.param, tmp_path / "c")
    return tmp_path / "c"


def test_untouched_it_loads(folder: Path) -> None:
    forge(folder)
    assert make().load(folder) == {"epoch": 1}


# -- damage ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "manifest.json"])
def test_a_flipped_bit_anywhere(folder: Path, name: str) -> None:
    raw = (folder / name).read_bytes()
    draws = random.Random(0)
    for i in range(25):
        place = draws.randrange(len(raw) * 8) if i else 0
        changed = bytearray(raw)
        changed[place // 8] ^= 1 << place % 8
        (folder / name).write_bytes(changed)
        with pytest.raises(dtrp.CheckpointError, match=name.replace(".", r"\.")):
            inspect(folder)
    check_refused(folder, name)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "manifest.json"])
def test_a_truncated_and_a_missing_file(folder: Path, name: str) -> None:
    raw = (folder / name).read_bytes()
    for length in (0, 1, len(raw) // 2, len(raw) - 1):
        (folder / name).write_bytes(raw[:length])
        check_refused(folder, f"{name} is damaged")
    (folder / name).unlink()
    check_refused(folder, f"{name} is missing")


def test_files_and_links_that_do_not_belong_there(folder: Path, tmp_path: Path) -> None:
    (folder / "more").write_text("")
    check_refused(folder, "more is no part of the checkpoint")
    (folder / "more").unlink()
    (folder / "__0_0.distcp").rename(tmp_path / "elsewhere")
    (folder / "__0_0.distcp").symlink_to(tmp_path / "elsewhere")
    check_refused(folder, "__0_0.distcp is no ordinary file")


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    check_refused(tmp_path / "nowhere", "no such folder")
    torch.save({}, tmp_path / "model.pt")
    check_refused(
        tmp_path / "model.pt",
        r"model\.pt is a file, and a checkpoint is a folder .* pipe\.load_state_dict\(torch\.load",
    )
    (tmp_path / "empty").mkdir()
    check_refused(tmp_path / "empty", "manifest.json is missing")
    for text in (
        "",
        "no JSON",
        "[]",
        "{}",
        "null",
        "[" * 200_000,
        '{"format": "dtrp checkpoint", "version": 2}',
        "\xff",
    ):
        (tmp_path / "empty" / "manifest.json").write_text(text, encoding="latin-1")
        check_refused(tmp_path / "empty", "manifest.json is (damaged|of version 2)")


# -- harm -----------------------------------------------------------------------------------------------------


def read(folder: Path) -> Any:
    with (folder / ".metadata").open("rb") as file:
        return pickle.load(file)


def write(folder: Path, metadata: Any) -> None:
    with (folder / ".metadata").open("wb") as file:
        pickle.dump(metadata, file)
    forge(folder)


def test_a_payload_in_the_metadata_does_not_run(folder: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    good = read(folder)
    bad = copy.deepcopy(good)
    bad.planner_data = Payload(ran)
    for payload in (Payload(ran), [Payload(ran)], bad):
        write(folder, payload)
        check_refused(folder, r"\.metadata is refused: it refers to posix\.mkdir")
        assert not ran.exists()
    write(folder, {"a": 1})
    check_refused(folder, "no metadata of torch.distributed.checkpoint")
    write(folder, good)
    make().load(folder)
    with (folder / ".metadata").open("rb") as file:  # the payload is one: plain reading runs it
        write(folder, Payload(ran))
        file.seek(0)
    read(folder)
    assert ran.exists()


def test_a_payload_in_place_of_a_tensor_does_not_run(saved: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    shutil.copytree(saved / "portable", tmp_path / "c")
    metadata = read(tmp_path / "c")
    key = "model.head.weight"
    torch.save(Payload(ran), tmp_path / "c" / "__0_0.distcp")
    size = (tmp_path / "c" / "__0_0.distcp").stat().st_size
    for info in metadata.storage_data.values():
        info.offset, info.length = 0, size
    write(tmp_path / "c", metadata)
    check_refused(tmp_path / "c", "the manifest promises|the tensors cannot be read")
    assert not ran.exists()
    metadata.state_dict_metadata[key] = BytesStorageMetadata()  # which plain DCP unpickles
    write(tmp_path / "c", metadata)
    check_refused(tmp_path / "c", "'model.head.weight' is no tensor")
    with pytest.raises(dtrp.CheckpointError, match="is no tensor"):
        read_state(tmp_path / "c")
    assert not ran.exists()


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/passwd", "..", ".metadata", "a/b", "a\\b", "", "unknown.distcp", 3]
)
def test_paths_out_of_the_folder(folder: Path, tmp_path: Path, name: Any) -> None:
    shutil.copy(folder / "__0_0.distcp", tmp_path / "outside")
    metadata = read(folder)
    for info in metadata.storage_data.values():
        info.relative_path = name
    write(folder, metadata)
    check_refused(folder, r"\.metadata is refused: it names the file")


@pytest.mark.parametrize(("offset", "length"), [(-1, 10), (0, 10**12), (10**12, 1), (5, -2), ("0", 1)])
def test_places_outside_of_a_file(folder: Path, offset: Any, length: Any) -> None:
    metadata = read(folder)
    for info in metadata.storage_data.values():
        info.offset, info.length = offset, length
    write(folder, metadata)
    check_refused(folder, r"\.metadata is refused")


def test_sizes_that_nothing_holds(folder: Path) -> None:
    def change(said: dict[str, Any]) -> None:
        key = next(key for key in said["tensors"] if key.endswith("head.weight"))
        said["tensors"][key] |= {"shape": [10**9, 10**9], "strides": [10**9, 1], "span": 10**18}

    forge(folder, change)
    check_refused(folder, "promises .* bytes of tensors")


@pytest.mark.full
@pytest.mark.sampled(2)
def test_any_value_of_the_manifest_of_another_type(folder: Path) -> None:
    """Each of 150 places, drawn, holds something else: loaded, or refused and nothing has changed."""
    said = json.loads((folder / manifest.NAME).read_bytes())
    places: list[list[Any]] = []

    def walk(value: Any, path: list[Any]) -> None:
        if path and path[0] not in ("files", "checksum", "extra"):
            places.append(path)
        if isinstance(value, dict | list):
            for key in value if isinstance(value, dict) else range(len(value)):
                walk(value[key], [*path, key])

    walk(said, [])
    draws = random.Random(1)
    raw = (folder / manifest.NAME).read_bytes()
    messages: list[str] = []
    for path in draws.sample(places, min(150, len(places))):
        (folder / manifest.NAME).write_bytes(raw)
        strange = draws.choice([None, "x", -1, 2**70, [], {}, [[]], {"tensor": "x"}, 0.5, True, {"tuple": 3}])

        def change(said: dict[str, Any], path: list[Any] = path, strange: Any = strange) -> None:
            for key in path[:-1]:
                said = said[key]
            said[path[-1]] = strange

        forge(folder, change)
        pipe = make()
        before = pipe.model_state_dict()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                pipe.load(folder)
        except dtrp.CheckpointError as error:
            messages.append(str(error))
            if "cannot be put in place" in str(error):
                continue
            assert_same(before, pipe.model_state_dict())
            pipe.step(*minibatches(1)[0])
            pipe.flush()
    assert len(messages) > 75
    assert sum("cannot be put in place" in message for message in messages) < 5
    assert not any("\n" in message for message in messages)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("NaN", "manifest.json is damaged: it is not JSON"),
        ("-Infinity", "manifest.json is damaged: it is not JSON"),
        ("1e999", "manifest.json is damaged: its checksum"),
        ("1" * 5000, "manifest.json is damaged: it is not JSON"),
        ("[" * 100_000 + "]" * 100_000, "manifest.json is damaged: it is nested too deeply"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "manifest.json is damaged: it is nested too deeply"),
        ('{"a":1,"a":2}', "manifest.json is damaged: its checksum"),
    ],
    ids=["nan", "infinity", "too large", "many digits", "lists", "dicts", "twice"],
)
def test_what_is_hardly_json(folder: Path, extra: str, message: str) -> None:
    """With the checksum of a forger who spells as `json` would, were it let."""
    said = (folder / manifest.NAME).read_text().replace('"extra":{"epoch":1}', f'"extra":{extra}')
    whole = re.sub(r'"checksum":"[0-9a-f]*",', "", said)
    assert f'"extra":{extra}' in whole
    checksum = hashlib.sha256(whole.encode()).hexdigest()
    (folder / manifest.NAME).write_text(whole.replace("{", f'{{"checksum":"{checksum}",', 1))
    check_refused(folder, message)


def test_names_that_a_terminal_would_obey(folder: Path) -> None:
    """Quoted so that they are one line, and short."""
    for name in ("a\nb", "\x1b[2J", "\ud800", "\u202e", "x" * 10_000):
        forge(folder, lambda said, name=name: said["files"].update({name: {"bytes": 1, "sha256": "0"}}))  # type: ignore[misc]
        check_refused(folder, "is missing; use another|x{500}")
    with pytest.raises(dtrp.CheckpointError) as caught:
        inspect(folder)
    assert len(str(caught.value)) < 3000


def test_a_manifest_that_is_too_large(folder: Path) -> None:
    """No more is read of it than its size."""
    with (folder / manifest.NAME).open("r+b") as file:
        file.truncate(2**40)
    check_refused(folder, "manifest.json has 1,099,511,627,776 bytes; a manifest has at most")


def test_an_extra_that_is_too_large_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "_MOST_BYTES", 30_000)
    with pytest.raises(
        dtrp.CheckpointError, match=r"the manifest would have [\d,]+ bytes; at most 30,000: pass a smaller extra"
    ):
        make().save(tmp_path / "saved", extra="x" * 30_000)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda part: part["position"].__setitem__(0, 2**62), "is more than its lead"),
        (lambda part: part["position"].__setitem__(1, part["position"][1] - 1), "of its form"),
        (lambda part: part["position"].__setitem__(3, [2**62]), "is not what is left"),
        (lambda part: part["position"].__setitem__(3, [0, *part["position"][3]]), "is not what is left"),
        (lambda part: part["notes"].reverse(), "is out of order"),
        (lambda part: part["notes"].pop(), "is not what is left"),
        (lambda part: part["stash"].pop(), "is not what is kept"),
        (lambda part: part["stash"][0].update(version=2**62), None),
        (lambda part: part["arrived"].append(None), "lacks its gradients"),
        (lambda part: part.update(version=part["version"] + 1), "is of another run"),
        (lambda part: part.update(num_updates=2**62), "is of another run"),
        (lambda part: part["samples"].append(1), "is not what is left"),
    ],
)
def test_places_that_no_run_is_in(saved: Path, tmp_path: Path, change: Any, message: str | None) -> None:
    """They would stop the engine in the middle, or take all memory."""
    shutil.copytree(saved / "exact", tmp_path / "c")
    forge(tmp_path / "c", lambda said: change(said["state"]["0.0"]))
    if message is not None:
        check_refused(tmp_path / "c", message)
    else:
        pipe = make()
        pipe.load(tmp_path / "c")
        pipe.flush()


def test_what_is_no_file(folder: Path) -> None:
    """A pipe that nobody writes to is not waited for."""
    for name in ("__0_0.distcp", "manifest.json"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        check_refused(folder, f"{name} is (no ordinary file|missing)")
        (folder / name).unlink()
        (folder / name).mkdir()
        check_refused(folder, f"{name} is (no ordinary file|missing)")


def test_a_file_that_cannot_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Path.open

    def failing(self: Path, *args: Any, **options: Any) -> Any:
        if self.name == "__0_0.distcp":
            raise OSError(5, "Input/output error", str(self))
        return own(self, *args, **options)

    monkeypatch.setattr(Path, "open", failing)
    check_refused(folder, "cannot be read: .*Input/output error: '.*__0_0.distcp'")


def test_plain_pytorch_reads_what_is_written_here(folder: Path, recwarn: pytest.WarningsRecorder) -> None:
    key = "model.head.weight" if folder.joinpath("manifest.json").read_text().find('"portable"') > 0 else None
    if key is None:
        key = next(key for key in read(folder).state_dict_metadata if key.endswith("parameter.head.weight"))
    state = {key: torch.zeros(3, 5)}
    dcp.load(state, checkpoint_id=folder)
    assert state[key].abs().sum() > 0
