"""Portable checkpoints: the state dicts of a flushed pipeline, independent of how the model was cut into stages.

The keys are those of nested dicts, ``model.<name>`` and ``optimizer.state.<name>.<entry>``, so that plain
`torch.distributed.checkpoint` reads the model::

    state = {"model": model.state_dict()}
    torch.distributed.checkpoint.load(state, checkpoint_id=folder)
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..optim.factories import group_options
from ..stage.stage import Stage
from ..typing import Json, StateDict
from . import state_dict
from .coding import Decoder, Encoder, TensorSpec, tensor_keys
from .manifest import Checkpoint, CheckpointError, first_line, inspect


def encode_part(encoder: Encoder, stage: Stage) -> dict[str, Json]:
    """A stage's part of `Pipeline.state_dict` as JSON; its tensors go to the encoder."""
    part = state_dict.state_part(stage)

    def encode_section(section: StateDict, prefix: str) -> dict[str, Json]:
        groups = []
        for i, group in enumerate(section["param_groups"]):
            key = f"optimizer.param_groups.{prefix}stage{stage.index}.{i}"
            options = encoder.encode(group_options(group), key)
            groups.append({"params": group["params"], "options": options})
        states = {name: encoder.encode(v, f"optimizer.state.{name}") for name, v in section["state"].items()}
        written = "model." if prefix == "model." else ""  # the names in the other sections begin with the section
        model = {name: encoder.encode(v, f"{written}{name}") for name, v in section["model"].items()}
        return {"model": model, "state": states, "param_groups": groups}

    return {
        **encode_section(part, "model."),
        "scheduler": encoder.encode(part["scheduler"], f"scheduler.stage{stage.index}"),
        **{
            name: None if part[name] is None else encode_section(part[name], f"{name}.") for name in state_dict.SECTIONS
        },
        "buffers": part["buffers"],
    }


def merge_parts(parts: list[dict[str, Json]]) -> dict[str, Json]:
    """The state in the manifest, from what `encode_part` returned for all stages."""
    state = state_dict.merge_state(parts)
    for section in state_dict.sections(state):
        section.update(section.pop("optimizer"))
    return state


def nested(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The tensors in nested dicts, as a plain program would save them; a name with dots is one key."""
    result: dict[str, Any] = {}
    for key, tensor in tensors.items():
        if key.startswith("model."):
            result.setdefault("model", {})[key.removeprefix("model.")] = tensor
        elif key.startswith("optimizer.state."):
            name, _, entry = key.removeprefix("optimizer.state.").rpartition(".")
            state = result.setdefault("optimizer", {}).setdefault("state", {})
            state.setdefault(name, {})[entry] = tensor
        else:
            result[key] = tensor
    return result


def decode(found: Checkpoint, names: set[str] | None = None) -> StateDict:
    """The return value of `Pipeline.state_dict` when the checkpoint was written, on the CPU.

    Args:
        found: portable checkpoint.
        names: names of the model's entries to read; the other entries are on the meta device. None: all.

    Raises:
        CheckpointError: it is damaged.
    """
    from .tensors import read_tensors  # torch may have been built without torch.distributed

    state, entries, cpu = found.manifest["state"], found.manifest["tensors"], torch.device("cpu")

    def is_wanted(name: str) -> bool:
        return names is None or name in names

    keys = tensor_keys(state["scheduler"])
    for section in state_dict.sections(state):
        coded_entries = [*section["model"].items(), *section["state"].items()]
        keys += tensor_keys([coded for name, coded in coded_entries if is_wanted(name)])
        keys += tensor_keys(section["param_groups"])
    specs = {key: TensorSpec(key, entries[key]) for key in keys}
    decoder = Decoder(read_tensors(found.folder, found.manifest["files"], specs), specs)

    def decode_entry(name: str, coded: Json) -> Any:
        if is_wanted(name):
            return decoder.decode(coded, cpu)
        if "tensor" not in coded:
            return None
        spec = TensorSpec(coded["tensor"], entries[coded["tensor"]])
        return torch.empty(spec.layout.shape, dtype=spec.dtype, device="meta")

    def decode_section(section: dict[str, Json]) -> StateDict:
        states = {name: decoder.decode(coded, cpu) for name, coded in section["state"].items() if is_wanted(name)}
        groups = [
            {"params": list(group["params"]), **decoder.decode(group["options"], cpu)}
            for group in section["param_groups"]
        ]
        model = {name: decode_entry(name, coded) for name, coded in section["model"].items()}
        return {"model": model, "optimizer": {"state": states, "param_groups": groups}}

    beside = {name: state[name] for name in state_dict.SECTIONS if state.get(name) is not None}
    return {
        **decode_section(state),
        **{name: decode_section(section) for name, section in beside.items()},
        **({"buffers": state["buffers"]} if "buffers" in state else {}),
        "scheduler": decoder.decode(state["scheduler"], cpu),
        "num_updates": found.num_updates,
    }


def read_state(folder: str | os.PathLike[str]) -> StateDict:
    """A portable checkpoint as state dicts on the CPU, for a plain model and a plain optimizer.

    ::

        state = dtrp.saving.read_state("checkpoint")
        model.load_state_dict(state["model"])
        torch.distributed.checkpoint.state_dict.set_optimizer_state_dict(model, optimizer, state["optimizer"])

    Returns:
        What `Pipeline.state_dict` returns: ``{"model", "optimizer", "scheduler", "num_updates"}``, and ``"aux"`` where
        there are auxiliary networks, ``"loss"`` where the loss is trained.

    Raises:
        CheckpointError: no checkpoint, a damaged one, or an exact one.
    """
    found = inspect(folder)
    if found.kind != "portable":
        raise CheckpointError(f"{folder} is an exact checkpoint; load it into a pipeline, or save with portable=True")
    with reading(found):
        return decode(found)


def read_model(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The model's state dict, on the CPU, of a checkpoint of either kind.

    In an exact one stages have made as many updates as they had then, a parameter that is tied within a stage has its first
    name alone, and buffers that are not persistent are there too.

    Raises:
        CheckpointError: no checkpoint, or a damaged one.
    """
    found = inspect(folder)
    with reading(found):
        if found.kind == "portable":
            model: dict[str, Any] = decode(found)["model"]
            return model
        from .tensors import read_tensors  # torch may have been built without torch.distributed

        parts = [found.manifest["state"][f"{stage}.0"] for stage in range(found.num_stages)]
        coded = [part[name] for part in parts for name in ("parameters", "buffers", "extra_state")]
        specs = {key: TensorSpec(key, found.manifest["tensors"][key]) for key in tensor_keys(coded)}
        decoder = Decoder(read_tensors(found.folder, found.manifest["files"], specs), specs)
        values = [decoder.decode(entry, torch.device("cpu")) for entry in coded]
        return {name: value for entry in values for name, value in entry.items() if value is not None}


@contextmanager
def reading(found: Checkpoint) -> Iterator[None]:
    """Context in which errors caused by a manifest's values of the wrong type become CheckpointErrors."""
    try:
        yield
    except CheckpointError as error:
        if str(found.folder) in str(error):
            raise
        raise CheckpointError(f"{found.folder}: {error}") from error
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
        raise CheckpointError(
            f"{found.folder}: the manifest holds what does not belong there ({type(error).__name__}: {first_line(error)}); "
            "use another checkpoint"
        ) from error
