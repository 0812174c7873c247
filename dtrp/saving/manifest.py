"""The manifest of a checkpoint: what the checkpoint holds, and the size and SHA-256 of its files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..typing import Json
from ..validation import is_whole

NAME = "manifest.json"
METADATA = ".metadata"  # of torch.distributed.checkpoint
_FORMAT, _VERSION = "dtrp checkpoint", 1
_MOST_BYTES = 2**28  # of a manifest: read as JSON it takes many times as much
_MOST_CHARACTERS = 2000  # of a message
_BLOCK_BYTES = 2**20


class CheckpointError(ValueError):
    """A checkpoint cannot be written, is damaged, or does not fit; the message names the file, or what to change.

    The message is one printable line, whatever names a checkpoint holds.
    """

    def __init__(self, message: str) -> None:
        shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
        super().__init__(shown if len(shown) <= _MOST_CHARACTERS else f"{shown[:_MOST_CHARACTERS]}...")


class PartlyLoadedError(CheckpointError):
    """A checkpoint was refused when parts of it were in place already; the pipeline is of no use."""


def first_line(error: BaseException, default: str = "no reason given") -> str:
    """The first line of an error's message."""
    return str(error).splitlines()[0] if str(error) else default


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        folder: its folder.
        kind: ``"exact"`` or ``"portable"``.
        method: name of the method of the pipeline that wrote it.
        num_stages: number of stages of that pipeline.
        num_replicas: number of replicas of that pipeline.
        num_microbatches: number of micro-batches in a mini-batch of that pipeline.
        num_updates: number of mini-batches stepped.
        extra: value that the caller added.
        manifest: the whole manifest.
        microbatch_samples: the least samples of a micro-batch in that pipeline, where the mini-batch has them.
    """

    folder: Path
    kind: Literal["exact", "portable"]
    method: str
    num_stages: int
    num_replicas: int
    num_microbatches: int
    num_updates: int
    extra: Json
    manifest: dict[str, Json]
    microbatch_samples: int = 1


_COUNTS = {"num_stages": 1, "num_replicas": 1, "num_microbatches": 1, "num_updates": 0, "next_microbatch": 0,
           "seed": 0, "threads": 1}  # the least value of each  # fmt: skip


def inspect(folder: str | os.PathLike[str]) -> Checkpoint:
    """Read the manifest of a checkpoint that `Pipeline.save` has written, and check all files; no tensor is read.

    Where a save that was to replace ``folder`` died between its two renames, the checkpoint before it is read.

    Raises:
        CheckpointError: no checkpoint, or a damaged one, with the name of the file.
    """
    found = glance(folder)
    try:
        for problem in _problems(found.folder, found.manifest["files"]):
            raise CheckpointError(f"{problem} use another checkpoint")
    except OSError as error:
        raise CheckpointError(f"{found.folder} cannot be read: {error}") from error
    return found


def glance(folder: str | os.PathLike[str]) -> Checkpoint:
    """Like `inspect`, without checking the other files, which may be large.

    Raises:
        CheckpointError: no checkpoint, or its manifest is damaged.
    """
    path = Path(folder).expanduser()
    try:
        if not path.exists() and previous(path).exists():
            path = previous(path)
        if path.is_file():
            raise CheckpointError(
                f"{folder} is a file, and a checkpoint is a folder that pipe.save() has written; a state dict of torch.save goes "
                "to pipe.load_state_dict(torch.load(file)), that of a model to model.load_state_dict before the Pipeline is made"
            )
        if not path.is_dir():
            raise CheckpointError(f"{folder}: no such folder; pass one that pipe.save() has written")
        manifest = _read(path)
    except RecursionError:
        raise CheckpointError(f"{path / NAME} is damaged: it is nested too deeply; use another checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from error
    names = ("kind", "num_stages", "num_replicas", "num_microbatches", "num_updates", "extra")
    entries = {name: manifest[name] for name in names}
    entries["microbatch_samples"] = manifest.get("microbatch_samples", 1)  # which older ones lack
    return Checkpoint(path, method=str(manifest["method"]["name"]), manifest=manifest, **entries)


def is_manifest(path: Path) -> bool:
    """Whether a file is a manifest, be it an incomplete one."""
    with path.open("rb") as file:
        start = file.read(_BLOCK_BYTES)
        file.seek(-min(path.stat().st_size, _BLOCK_BYTES), os.SEEK_END)
        return any(json.dumps(_FORMAT).encode() in part for part in (start, file.read()))


def previous(folder: Path) -> Path:
    """Where the checkpoint that ``folder`` replaces lies until the new one is in its place."""
    return folder.with_name(f".{folder.name}.old")


def written(manifest: dict[str, Json]) -> bytes:
    """A manifest as the bytes of its file, always spelled in the same way, so that every changed byte is noticed.

    Raises:
        CheckpointError: it is larger than `inspect` reads.
    """
    checksum = hashlib.sha256(_spelled(manifest)).hexdigest()
    raw = _spelled({**manifest, "checksum": checksum})
    if len(raw) > _MOST_BYTES:
        raise CheckpointError(
            f"the manifest would have {len(raw):,} bytes; at most {_MOST_BYTES:,}: pass a smaller extra"
        )
    return raw


def header(kind: Literal["exact", "portable"], extra: Json) -> dict[str, Json]:
    """The entries with which every manifest begins.

    Raises:
        TypeError: ``extra`` cannot be written as JSON.
    """
    try:
        if json.loads(json.dumps(extra, allow_nan=False)) != extra:
            raise TypeError("it would come back changed")
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(
            f"extra cannot be written as JSON ({error}); pass dicts with text for keys, lists, text, finite numbers, "
            "booleans and None"
        ) from None
    return {"format": _FORMAT, "version": _VERSION, "kind": kind, "extra": extra}


def describe(path: Path) -> dict[str, Json]:
    """The entry of a file in the manifest: its size and its SHA-256."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def _spelled(value: Json) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _read(folder: Path) -> dict[str, Json]:
    path = folder / NAME
    if path.is_symlink() or not path.is_file():
        raise CheckpointError(f"{path} is missing; pass a folder that pipe.save() has written")
    if path.stat().st_size > _MOST_BYTES:
        raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes; a manifest has at most {_MOST_BYTES:,}")
    raw = path.read_bytes()
    try:
        manifest = json.loads(raw, parse_constant=_refuse_constant)
    except ValueError:
        raise CheckpointError(f"{path} is damaged: it is not JSON; use another checkpoint") from None
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise CheckpointError(f"{path} is damaged, or no manifest of dtrp; use another checkpoint")
    if manifest.get("version") != _VERSION:
        raise CheckpointError(
            f"{path} is of version {manifest.get('version')!r} and this dtrp reads version {_VERSION}; use the dtrp that wrote it"
        )
    try:
        whole = written({name: value for name, value in manifest.items() if name != "checksum"}) == raw
    except ValueError:  # 1e999 is infinite
        whole = False
    if not whole:
        raise CheckpointError(f"{path} is damaged: its checksum is another; use another checkpoint")
    wrong = [name for name, least in _COUNTS.items() if not is_count(manifest.get(name), least)]
    wrong += [name for name in ("method", "files", "tensors", "state") if not isinstance(manifest.get(name), dict)]
    if not wrong and "name" not in manifest["method"]:
        wrong = ["method"]
    wrong += [] if manifest.get("kind") in ("exact", "portable") else ["kind"]
    wrong += [] if "extra" in manifest else ["extra"]
    wrong += [] if is_count(manifest.get("microbatch_samples", 1), 1) else ["microbatch_samples"]
    if wrong:
        raise CheckpointError(f"{path}: {wrong[0]!r} is missing or not of its type; use another checkpoint")
    return manifest


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def is_count(value: Any, least: int = 0) -> bool:
    """Whether a value from a manifest is a whole number that torch can hold."""
    return is_whole(value, least) and value < 2**63


def are_counts(values: Any, length: int | None = None) -> bool:
    """Whether a value from a manifest is a list of whole numbers, of ``length`` ones if that is given."""
    return isinstance(values, list | tuple) and all(map(is_count, values)) and length in (None, len(values))


def _problems(folder: Path, files: dict[str, Json]) -> Iterator[str]:
    """What is wrong with the files of a checkpoint."""
    present = {path.name: path for path in folder.iterdir() if path.name != NAME}
    for name in sorted(present.keys() - files.keys()):
        yield f"{folder / name} is no part of the checkpoint; remove it, or"
    for name, entry in sorted(files.items()):
        path = present.get(name)
        if not isinstance(entry, dict) or entry.keys() != {"bytes", "sha256"}:
            yield f"{folder / NAME}: what it says of the file {name!r} is not of its type;"
        elif path is None:
            yield f"{folder / name} is missing;"
        elif path.is_symlink() or not path.is_file():
            yield f"{path} is no ordinary file;"
        elif path.stat().st_size != entry["bytes"]:
            yield f"{path} is damaged: it has {path.stat().st_size:,} bytes, not {entry['bytes']};"
        elif describe(path) != entry:
            yield f"{path} is damaged: its SHA-256 is another;"
    if METADATA not in files:
        yield f"{folder / METADATA} is missing;"
