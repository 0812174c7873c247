"""The manifest of a checkpoint: what is in it, and what its files must be."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

NAME = "manifest.json"
METADATA = ".metadata"  # of torch.distributed.checkpoint
_FORMAT, _VERSION = "dtrp checkpoint", 1
_MOST_BYTES = 2**28  # of a manifest: read as JSON it takes many times as much
_MOST_CHARACTERS = 2000  # of a message
_BLOCK_BYTES = 2**20


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, or is damaged, or does not fit; the message says which file or what to change.

    It is one line that can be shown, whatever names a checkpoint holds.
    """

    def __init__(self, message: str) -> None:
        shown = message if message.isprintable() else "".join(map(_printable, message))
        super().__init__(shown if len(shown) <= _MOST_CHARACTERS else f"{shown[:_MOST_CHARACTERS]}...")


def _printable(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds, its files checked.

    Attributes:
        folder: where it is.
        kind: ``"exact"`` or ``"portable"``.
        method: the name of the method.
        num_stages, num_replicas, num_microbatches: of the pipeline that wrote it.
        num_updates: mini-batches stepped.
        extra: what the caller has added.
        manifest: all of the manifest.
    """

    folder: Path
    manifest: dict[str, Any]

    @property
    def kind(self) -> Literal["exact", "portable"]:
        kind: Literal["exact", "portable"] = self.manifest["kind"]
        return kind

    @property
    def method(self) -> str:
        return str(self.manifest["method"]["name"])

    @property
    def num_stages(self) -> int:
        return int(self.manifest["num_stages"])

    @property
    def num_replicas(self) -> int:
        return int(self.manifest["num_replicas"])

    @property
    def num_microbatches(self) -> int:
        return int(self.manifest["num_microbatches"])

    @property
    def num_updates(self) -> int:
        return int(self.manifest["num_updates"])

    @property
    def extra(self) -> Any:
        return self.manifest["extra"]


_COUNTS = {"num_stages": 1, "num_replicas": 1, "num_microbatches": 1, "num_updates": 0, "next_microbatch": 0,
           "seed": 0, "threads": 1}  # fmt: skip


def inspect(folder: str | os.PathLike[str]) -> Checkpoint:
    """Look at a checkpoint that `Pipeline.save` has written: every file is checked, and no tensor is read.

    Where a save that replaced ``folder`` died between its two renames, the one before it is what is looked at.

    Raises:
        CheckpointError: no checkpoint, or a damaged one, with the name of the file.
    """
    found = glance(folder)
    try:
        _check_files(found.folder, found.manifest["files"])
    except OSError as error:
        raise CheckpointError(f"{found.folder} cannot be read: {error}") from error
    return found


def glance(folder: str | os.PathLike[str]) -> Checkpoint:
    """As `inspect`, but the other files, which may be large, have not been looked at.

    Raises:
        CheckpointError: no checkpoint, or its manifest is damaged.
    """
    path = Path(folder).expanduser()
    try:
        if not path.exists() and previous(path).exists():
            path = previous(path)
        if not path.is_dir():
            raise CheckpointError(f"{folder}: no such folder; pass one that pipe.save() has written")
        return Checkpoint(path, _read(path))
    except RecursionError:
        raise CheckpointError(f"{path / NAME} is damaged: it is nested too deeply; use another checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from error


def is_manifest(path: Path) -> bool:
    """Whether a file is a manifest, if not a whole one."""
    with path.open("rb") as file:
        start = file.read(_BLOCK_BYTES)
        file.seek(-min(path.stat().st_size, _BLOCK_BYTES), os.SEEK_END)
        return any(json.dumps(_FORMAT).encode() in part for part in (start, file.read()))


def previous(folder: Path) -> Path:
    """Where the checkpoint that ``folder`` replaces is, until the new one is in its place."""
    return folder.with_name(f".{folder.name}.old")


def written(manifest: dict[str, Any]) -> bytes:
    """A manifest as the bytes of its file: one spelling, so that a changed byte shows.

    Raises:
        CheckpointError: it is larger than any that is read.
    """
    checksum = hashlib.sha256(_spelled(manifest)).hexdigest()
    raw = _spelled({**manifest, "checksum": checksum})
    if len(raw) > _MOST_BYTES:
        raise CheckpointError(
            f"the manifest would have {len(raw):,} bytes; at most {_MOST_BYTES:,}: pass a smaller extra"
        )
    return raw


def header(kind: Literal["exact", "portable"], extra: Any) -> dict[str, Any]:
    """How every manifest begins.

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


def describe(path: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        for block in _blocks(file):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _blocks(file: Any) -> Iterator[bytes]:
    return iter(lambda: file.read(_BLOCK_BYTES), b"")


def _spelled(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _read(folder: Path) -> dict[str, Any]:
    path = folder / NAME
    if path.is_symlink() or not path.is_file():
        raise CheckpointError(f"{path} is missing; pass a folder that pipe.save() has written")
    if path.stat().st_size > _MOST_BYTES:
        raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes; a manifest has at most {_MOST_BYTES:,}")
    raw = path.read_bytes()
    try:
        manifest = json.loads(raw, parse_constant=_no_number)
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
    wrong += [] if manifest.get("kind") in ("exact", "portable") else ["kind"]
    wrong += [] if "extra" in manifest else ["extra"]
    if wrong:
        raise CheckpointError(f"{path}: {wrong[0]!r} is missing or not of its type; use another checkpoint")
    return manifest


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


def is_count(value: Any, least: int = 0) -> bool:
    """Whether a value from a manifest is a whole number that torch can hold."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63


def _check_files(folder: Path, files: dict[str, Any]) -> None:
    there = {path.name: path for path in folder.iterdir() if path.name != NAME}
    strange = sorted(there.keys() - files.keys())
    if strange:
        raise CheckpointError(
            f"{folder / strange[0]} is no part of the checkpoint; remove it, or use another checkpoint"
        )
    for name, said in sorted(files.items()):
        if not isinstance(said, dict) or said.keys() != {"bytes", "sha256"}:
            raise CheckpointError(f"{folder / NAME}: what it says of the file {name!r} is not of its type")
        path = there.get(name)
        if path is None:
            raise CheckpointError(f"{folder / name} is missing; use another checkpoint")
        if path.is_symlink() or not path.is_file():
            raise CheckpointError(f"{path} is no ordinary file; use another checkpoint")
        size = path.stat().st_size
        if size != said["bytes"]:
            raise CheckpointError(
                f"{path} is damaged: it has {size:,} bytes, not {said['bytes']}; use another checkpoint"
            )
        if describe(path) != said:
            raise CheckpointError(f"{path} is damaged: its SHA-256 is another; use another checkpoint")
    if METADATA not in files:
        raise CheckpointError(f"{folder / METADATA} is missing; use another checkpoint")
