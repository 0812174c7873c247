"""Tensors to and from files, through `torch.distributed.checkpoint`; safe to read.

Its planner, writer and reader are used by their interfaces, and the ranks speak through the pipeline's own connections, so
that a wait can be interrupted and a rank that fails is named. Plain `FileSystemReader` would unpickle whatever
``.metadata`` holds, open whatever path it names, and unpickle what is no tensor.
"""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan

from .coding import Spec
from .manifest import METADATA, CheckpointError

# What the pickle of a Metadata refers to; each only builds an object of its own.
_ALLOWED = {
    ("torch", "Size"), ("torch.serialization", "_get_layout"), ("torch.storage", "_get_dtype_from_pickle_storage_type"),
    ("collections", "OrderedDict"),
    *(("torch.distributed.checkpoint.metadata", name) for name in (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
}  # fmt: skip
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


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        dtype = getattr(torch, name, None) if module == "torch" else None
        if (module, name) not in _ALLOWED and not isinstance(dtype, torch.dtype):
            raise CheckpointError(f"it refers to {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


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
            metadata = _Unpickler(io.BytesIO(path.read_bytes())).load()
            self._check(metadata)
        except Exception as error:
            raise CheckpointError(f"{path} is refused: {error}; use another checkpoint") from None
        assert isinstance(metadata, Metadata)
        metadata.storage_meta = StorageMeta()
        return metadata

    def _check(self, metadata: Any) -> None:
        if type(metadata) is not Metadata or not isinstance(metadata.state_dict_metadata, dict):
            raise CheckpointError("it is no metadata of torch.distributed.checkpoint")
        for key, entry in metadata.state_dict_metadata.items():
            if not isinstance(key, str) or type(entry) is not TensorStorageMetadata:
                raise CheckpointError(f"{str(key)[:60]!r} is no tensor")
        for index, info in metadata.storage_data.items():
            name, start, length = info.relative_path, info.offset, info.length
            if type(index) is not MetadataIndex or not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
                raise CheckpointError(f"it names the file {str(name)[:60]!r}, which is no plain file name")
            if name not in self._sizes:
                raise CheckpointError(f"it names the file {name!r}, which is no part of the checkpoint")
            if not 0 <= start <= start + length <= self._sizes[name] or getattr(info, "transform_descriptors", None):
                raise CheckpointError(f"it points outside of {name!r}")


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
        held = sum(chunk.sizes.numel() for chunk in entry.chunks)
        if held != spec.numel:
            raise CheckpointError(f"{folder / METADATA} has {held} elements of the tensor {key!r}, not {spec.numel}")
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
