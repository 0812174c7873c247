"""Tensors to and from files, through `torch.distributed.checkpoint`; safe to read.

Its planner, writer and reader are used by their interfaces, and the ranks speak through the pipeline's own connections, so
that a wait can be interrupted and a rank that fails is named. Plain `FileSystemReader` would unpickle whatever
``.metadata`` holds, open whatever path it names, and unpickle what is no tensor.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan

from ..tensors.pickles import ForbiddenName, Record, Unpickler
from .coding import DTYPES, Spec
from .manifest import METADATA, CheckpointError, is_count

_METADATA = Metadata.__module__
# What the pickle of a Metadata refers to, and what stands for it: for classes and functions records, for dtypes their names.
_STAND_INS: dict[tuple[str, str], Any] = {
    (module, name): type(name, (Record,), {})
    for module, name in (
        ("torch", "Size"), ("torch.serialization", "_get_layout"), (_StorageInfo.__module__, "_StorageInfo"),
        *((_METADATA, name) for name in (
            "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
            "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    )
} | {("torch", name): name for name in DTYPES}  # fmt: skip
_MOST_DIMS = 64  # that torch has
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


class Writer(FileSystemWriter):
    """Writes a rank's tensors; its metadata says nothing of this machine's paths."""

    def storage_meta(self) -> StorageMeta | None:
        return StorageMeta()


class Saving:
    """One rank's part in writing tensors, in three steps with an exchange between them.

    Args:
        folder: to write into; there, and empty but for other ranks' files.
        tensors: by key, nested dicts; a key is one rank's alone.
        place: of this rank among all.
    """

    def __init__(self, folder: Path, tensors: dict[str, Any], place: int) -> None:
        self._tensors, self._place = tensors, place
        self._planner = DefaultSavePlanner()
        self._writer = Writer(folder, single_file_per_rank=True, sync_files=True)

    def prepare(self) -> SavePlan:
        """This rank's plan."""
        self._planner.set_up_planner(self._tensors, None, self._place == 0)
        self._writer.set_up_storage_writer(self._place == 0)
        return self._writer.prepare_local_plan(self._planner.create_local_plan())

    def write(self, plans: list[SavePlan]) -> list[Any]:
        """Write this rank's file, given all ranks' plans; where each tensor is."""
        plans, self._metadata = self._planner.create_global_plan(plans)
        plans = self._writer.prepare_global_plan(plans)
        plan = self._planner.finish_plan(plans[self._place])
        if not plan.items:
            return []
        results: list[Any] = self._writer.write_data(plan, self._planner).wait()
        return results

    def finish(self, results: list[list[Any]]) -> None:
        """Write the metadata, given where all ranks' tensors are; the first rank alone."""
        self._writer.finish(self._metadata, results)


class Reader(FileSystemReader):
    """Reads the tensors of a checkpoint whose files have been checked, and nothing else.

    Args:
        folder: of the checkpoint.
        sizes: bytes of each file that may be opened.
    """

    def __init__(self, folder: Path, sizes: dict[str, int]) -> None:
        super().__init__(folder)
        self._folder, self._sizes = folder, sizes

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = self._folder / METADATA
        try:
            return self._rebuilt(_state_of(Unpickler(path.read_bytes(), _STAND_INS).load(), "Metadata", dict))
        except Exception as error:  # a damaged pickle can raise anything
            reason = f"it refers to {error}, which no checkpoint needs" if isinstance(error, ForbiddenName) else error
            raise CheckpointError(f"{path} is refused: {reason}; use another checkpoint") from None

    def _rebuilt(self, said: dict[str, Any]) -> Metadata:
        """What `Saving` has written, made anew of what a file says: tensors, each whole in one place."""
        tensors: dict[str, Any] = {}
        for key, record in _checked(said.get("state_dict_metadata"), dict).items():
            if type(record) is not _STAND_INS[_METADATA, "TensorStorageMetadata"]:
                raise CheckpointError(f"{str(key)[:60]!r} is no tensor")
            entry = _state_of(record, "TensorStorageMetadata", dict)
            size, (chunk,) = _size(entry.get("size")), _checked(entry.get("chunks"), list)
            place, zeros = _state_of(chunk, "ChunkStorageMetadata", dict), torch.Size([0] * len(size))
            if _size(place.get("offsets")) != zeros or _size(place.get("sizes")) != size:
                raise CheckpointError(f"{str(key)[:60]!r} is not in one piece")
            dtype = DTYPES[_checked(_state_of(entry.get("properties"), "TensorProperties", tuple)[0], str)]
            piece = ChunkStorageMetadata(zeros, size)
            tensors[_checked(key, str)] = TensorStorageMetadata(TensorProperties(dtype), size, [piece])
        places: dict[MetadataIndex, _StorageInfo] = {}
        for index, record in _checked(said.get("storage_data"), dict).items():
            key = _checked(_state_of(index, "MetadataIndex", dict).get("fqn"), str)
            info = _state_of(record, "_StorageInfo", dict)
            name, start, length = (info.get(field) for field in ("relative_path", "offset", "length"))
            if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
                shown = name[:60] if isinstance(name, str) else type(name).__name__
                raise CheckpointError(f"it names the file {shown!r}, which is no plain file name")
            if name not in self._sizes:
                raise CheckpointError(f"it names the file {name!r}, which is no part of the checkpoint")
            inside = is_count(start) and is_count(length) and start + length <= self._sizes[name]
            if not inside or info.get("transform_descriptors"):
                raise CheckpointError(f"it points outside of {name!r}")
            places[MetadataIndex(key, tensors[key].chunks[0].offsets)] = _StorageInfo(name, start, length)
        return Metadata(tensors, storage_data=places, storage_meta=StorageMeta())


def _checked(value: Any, kind: type) -> Any:
    """A value from a file, of this very type."""
    if type(value) is not kind:
        found = f"a {type(value).__name__} where a {kind.__name__} is expected"
        raise CheckpointError(f"it is no metadata of torch.distributed.checkpoint: {found}")
    return value


def _state_of(record: Any, name: str, kind: type) -> Any:
    """What an object of the class ``name`` was left with, as its stand-in has it."""
    module = _StorageInfo.__module__ if name == _StorageInfo.__name__ else _METADATA
    return _checked(_checked(record, _STAND_INS[module, name]).state, kind)


def _size(record: Any) -> torch.Size:
    """What a stand-in for a `torch.Size` stands for."""
    (sizes,) = _checked(record, _STAND_INS["torch", "Size"]).arguments
    if len(_checked(sizes, tuple)) > _MOST_DIMS or not all(map(is_count, sizes)):
        raise CheckpointError("a size in it is no size")
    return torch.Size(sizes)


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        raise CheckpointError(f"{read_item.dest_index.fqn} is no tensor, and nothing else is read from these files")


def read_tensors(folder: Path, files: dict[str, Any], specs: dict[str, Spec]) -> dict[str, Tensor]:
    """The tensors of these keys, on the CPU, contiguous.

    Raises:
        CheckpointError: a file that is refused, or does not hold them.
    """
    total, room = sum(spec.nbytes for spec in specs.values()), sum(said["bytes"] for said in files.values())
    if total > room:
        raise CheckpointError(
            f"{folder}: the manifest promises {total:,} bytes of tensors, and its files have {room:,}"
        )
    tensors = {key: torch.empty(spec.layout.shape, dtype=spec.dtype) for key, spec in specs.items()}
    specs = {key: spec for key, spec in specs.items() if spec.numel}  # the others have nothing to read
    reader = Reader(folder, {name: said["bytes"] for name, said in files.items()})
    metadata = reader.read_metadata()
    for key, spec in specs.items():
        entry = metadata.state_dict_metadata.get(key)
        if (
            not isinstance(entry, TensorStorageMetadata)
            or tuple(entry.size) != spec.layout.shape
            or entry.properties.dtype != spec.dtype
        ):
            raise CheckpointError(f"{folder / METADATA} does not have the tensor {key!r} as the manifest says")
    planner = _Planner(flatten_state_dict=False)
    try:
        planner.set_up_planner({key: tensors[key] for key in specs}, metadata, True)
        reader.set_up_storage_reader(metadata, True)
        plan = reader.prepare_local_plan(planner.create_local_plan())
        plan = reader.prepare_global_plan(planner.create_global_plan([plan]))[0]
        reader.read_data(planner.finish_plan(plan), planner).wait()
    except CheckpointError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{folder}: the tensors cannot be read ({reason}); use another checkpoint") from None
    return tensors
