"""Tensors to and from files, through `torch.distributed.checkpoint`; safe to read.

Its planners, writer and reader are called by their public methods, and ranks exchange plans over the pipeline's
connections, so that a wait can be interrupted and a rank that fails is named. Plain `FileSystemReader` would unpickle
anything in ``.metadata``, open any path that it names, and unpickle entries that are no tensors.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan

from ..tensors.pickles import ForbiddenName, Record, Unpickler
from ..tensors.torch_private import storage_info_class
from ..typing import Json
from .coding import DTYPES, TensorSpec
from .manifest import METADATA, CheckpointError, are_counts, first_line

StorageInfo = storage_info_class()
_METADATA = dcp.Metadata.__module__
# Stand-ins for the names in the pickle of a `Metadata`: records for classes and functions, names for dtypes.
_STAND_INS: dict[tuple[str, str], Any] = {
    (module, name): type(name, (Record,), {})
    for module, name in (
        ("torch", "Size"), ("torch.serialization", "_get_layout"), (StorageInfo.__module__, StorageInfo.__name__),
        *((_METADATA, name) for name in (
            "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
            "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    )
} | {("torch", name): name for name in DTYPES}  # fmt: skip
_MOST_DIMS = 64  # of any tensor of torch
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


class Writer(FileSystemWriter):
    """Writes a rank's tensors; its metadata names no paths of this machine."""

    def storage_meta(self) -> dcp.StorageMeta | None:
        return dcp.StorageMeta()


class TensorWriter:
    """One rank's part in writing tensors, in three steps with an exchange between them.

    Args:
        folder: existing folder to write into, empty but for other ranks' files.
        tensors: tensors by key, or nested dicts of them; no two ranks have the same key.
        place: place of this rank among all.
    """

    def __init__(self, folder: Path, tensors: dict[str, Any], place: int) -> None:
        self._tensors, self._place = tensors, place
        self._planner = DefaultSavePlanner()
        self._writer = Writer(folder, single_file_per_rank=True, sync_files=True)

    def prepare(self) -> SavePlan:
        """Make this rank's plan."""
        self._planner.set_up_planner(self._tensors, None, self._place == 0)
        self._writer.set_up_storage_writer(self._place == 0)
        return self._writer.prepare_local_plan(self._planner.create_local_plan())

    def write(self, plans: list[SavePlan]) -> list[Any]:
        """Write this rank's file, given all ranks' plans; returns where each tensor is."""
        plans, self._metadata = self._planner.create_global_plan(plans)
        plans = self._writer.prepare_global_plan(plans)
        plan = self._planner.finish_plan(plans[self._place])
        return list(self._writer.write_data(plan, self._planner).wait()) if plan.items else []

    def finish(self, results: list[list[Any]]) -> None:
        """Write the metadata, given where all ranks' tensors are; the first rank alone."""
        self._writer.finish(self._metadata, results)


class Reader(FileSystemReader):
    """Reads the tensors of a checkpoint whose files have been checked, and nothing else.

    Args:
        folder: folder of the checkpoint.
        sizes: size of each file that may be opened, in bytes.
    """

    def __init__(self, folder: Path, sizes: dict[str, int]) -> None:
        super().__init__(folder)
        self._folder, self._sizes = folder, sizes

    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp.Metadata:
        path = self._folder / METADATA
        try:
            return self._rebuilt(_state_of(Unpickler(path.read_bytes(), _STAND_INS).load(), "Metadata", dict))
        except Exception as error:  # a damaged pickle can raise anything
            reason = f"it refers to {error}, which no checkpoint needs" if isinstance(error, ForbiddenName) else error
            raise CheckpointError(f"{path} is refused: {reason}; use another checkpoint") from None

    def _rebuilt(self, content: dict[str, Any]) -> dcp.Metadata:
        """The metadata of tensors, each in one piece in one file, built from stand-ins."""
        records = _checked(content.get("state_dict_metadata"), dict)
        tensors = {_checked(key, str): _tensor_metadata(key, record) for key, record in records.items()}
        places: dict[dcp.MetadataIndex, Any] = {}
        for index, record in _checked(content.get("storage_data"), dict).items():
            key = _checked(_state_of(index, "MetadataIndex", dict).get("fqn"), str)
            info = _state_of(record, StorageInfo.__name__, dict)
            name, start, length = (info.get(field) for field in ("relative_path", "offset", "length"))
            if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
                shown = name[:60] if isinstance(name, str) else type(name).__name__
                raise CheckpointError(f"it names the file {shown!r}, which is no plain file name")
            if name not in self._sizes:
                raise CheckpointError(f"it names the file {name!r}, which is no part of the checkpoint")
            inside = are_counts([start, length]) and start + length <= self._sizes[name]
            if not inside or info.get("transform_descriptors"):
                raise CheckpointError(f"it points outside of {name!r}")
            places[dcp.MetadataIndex(key, tensors[key].chunks[0].offsets)] = StorageInfo(name, start, length)
        return dcp.Metadata(tensors, storage_data=places, storage_meta=dcp.StorageMeta())  # type: ignore[arg-type]


def _tensor_metadata(key: Any, record: Any) -> dcp.TensorStorageMetadata:
    """The metadata of one tensor, built from its stand-in."""
    if type(record) is not _STAND_INS[_METADATA, "TensorStorageMetadata"]:
        raise CheckpointError(f"{str(key)[:60]!r} is no tensor")
    entry = _state_of(record, "TensorStorageMetadata", dict)
    size, (chunk,) = _size(entry.get("size")), _checked(entry.get("chunks"), list)
    place, zeros = _state_of(chunk, "ChunkStorageMetadata", dict), torch.Size([0] * len(size))
    if _size(place.get("offsets")) != zeros or _size(place.get("sizes")) != size:
        raise CheckpointError(f"{str(key)[:60]!r} is not in one piece")
    dtype = DTYPES[_checked(_state_of(entry.get("properties"), "TensorProperties", tuple)[0], str)]
    return dcp.TensorStorageMetadata(dcp.TensorProperties(dtype), size, [dcp.ChunkStorageMetadata(zeros, size)])


def _checked(value: Any, kind: type) -> Any:
    """A value from a file, of this very type."""
    if type(value) is not kind:
        found = f"a {type(value).__name__} where a {kind.__name__} is expected"
        raise CheckpointError(f"it is no metadata of torch.distributed.checkpoint: {found}")
    return value


def _state_of(record: Any, name: str, kind: type) -> Any:
    """The state of an object of the class ``name``, from its stand-in."""
    module = StorageInfo.__module__ if name == StorageInfo.__name__ else _METADATA
    return _checked(_checked(record, _STAND_INS[module, name]).state, kind)


def _size(record: Any) -> torch.Size:
    """A `torch.Size`, from its stand-in."""
    (sizes,) = _checked(record, _STAND_INS["torch", "Size"]).arguments
    if len(_checked(sizes, tuple)) > _MOST_DIMS or not are_counts(sizes):
        raise CheckpointError("a size in it is no size")
    return torch.Size(sizes)


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        raise CheckpointError(f"{read_item.dest_index.fqn} is no tensor, and nothing else is read from these files")


def read_tensors(folder: Path, files: dict[str, Json], specs: dict[str, TensorSpec]) -> dict[str, Tensor]:
    """Read the tensors of ``specs``: on the CPU, contiguous, by key.

    Raises:
        CheckpointError: a file is refused, or does not hold them.
    """
    sizes = {name: entry["bytes"] for name, entry in files.items()}
    total, room = sum(spec.nbytes for spec in specs.values()), sum(sizes.values())
    if total > room:
        raise CheckpointError(
            f"{folder}: the manifest promises {total:,} bytes of tensors, and its files have {room:,}"
        )
    tensors = {key: torch.empty(spec.layout.shape, dtype=spec.dtype) for key, spec in specs.items()}
    to_read = {key: t for key, t in tensors.items() if t.numel()}
    reader = Reader(folder, sizes)
    metadata = reader.read_metadata()
    for key, t in to_read.items():
        entry = metadata.state_dict_metadata.get(key)
        found = (entry.size, entry.properties.dtype) if isinstance(entry, dcp.TensorStorageMetadata) else None
        if found != (t.shape, t.dtype):
            raise CheckpointError(f"{folder / METADATA} does not have the tensor {key!r} as the manifest says")
    planner = _Planner(flatten_state_dict=False)
    try:
        planner.set_up_planner(to_read, metadata, True)
        reader.set_up_storage_reader(metadata, True)
        plan = reader.prepare_local_plan(planner.create_local_plan())
        plan = reader.prepare_global_plan(planner.create_global_plan([plan]))[0]
        reader.read_data(planner.finish_plan(plan), planner).wait()
    except CheckpointError:
        raise
    except Exception as error:
        reason = first_line(error, type(error).__name__)
        raise CheckpointError(f"{folder}: the tensors cannot be read ({reason}); use another checkpoint") from None
    return tensors
