"""A flushed pipeline as state dicts that know nothing of its stages, in a checkpoint.

The keys are those of nested dicts, ``model.<name>`` and ``optimizer.state.<name>.<entry>``, so that plain
`torch.distributed.checkpoint` reads the model::

    state = {"model": model.state_dict()}
    torch.distributed.checkpoint.load(state, checkpoint_id=folder)
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..stage.stage import Stage
from . import state_dict
from .coding import Decoder, Encoder, Spec, tensor_keys
from .manifest import Checkpoint, CheckpointError, inspect

T = TypeVar("T")


def encode_part(encoder: Encoder, stage: Stage) -> dict[str, Any]:
    """What a stage adds to `Pipeline.state_dict`, as JSON, its tensors in the encoder."""
    part = state_dict.state_part(stage)

    def section(of: dict[str, Any], prefix: str) -> dict[str, Any]:
        groups = []
        for i, group in enumerate(of["param_groups"]):
            options = {name: value for name, value in group.items() if name != "params"}
            key = f"optimizer.param_groups.{prefix or 'aux.'}stage{stage.index}.{i}"
            groups.append({"params": group["params"], "options": encoder.encode(options, key)})
        return {
            "model": {name: encoder.encode(value, f"{prefix}{name}") for name, value in of["model"].items()},
            "state": {name: encoder.encode(value, f"optimizer.state.{name}") for name, value in of["state"].items()},
            "param_groups": groups,
        }

    return {
        **section(part, "model."),
        "scheduler": encoder.encode(part["scheduler"], f"scheduler.stage{stage.index}"),
        "aux": None if part["aux"] is None else section(part["aux"], ""),
        "buffers": part["buffers"],
    }


def nested(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The tensors as dicts in dicts, as a plain program would save them; a name with dots is one name."""
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


def decode(found: Checkpoint, names: set[str] | None = None, device: torch.device | None = None) -> dict[str, Any]:
    """What `Pipeline.state_dict` returned when the checkpoint was written.

    Args:
        found: a portable checkpoint.
        names: of the entries of the model whose tensors are wanted; others are of no memory. None: all.
        device: of the tensors.

    Raises:
        CheckpointError: it is damaged.
    """
    from .tensors import read_tensors  # torch may have been built without torch.distributed

    state, device = found.manifest["state"], device or torch.device("cpu")
    wanted: list[str] = tensor_keys(state["scheduler"])
    parts = [state, state["aux"]] if "aux" in state else [state]
    for part in parts:
        for kind in ("model", "state"):
            for name, coded in part[kind].items():
                if names is None or name in names:
                    wanted += tensor_keys(coded)
        wanted += tensor_keys(part["param_groups"])
    said = found.manifest["tensors"]
    specs = {key: Spec(key, said[key]) for key in wanted}
    decoder = Decoder(read_tensors(found.folder, found.manifest["files"], specs), specs)

    def entry(name: str, coded: Any) -> Any:
        if names is None or name in names:
            return decoder.decode(coded, device)
        spec = Spec(coded["tensor"], said[coded["tensor"]]) if "tensor" in coded else None
        return torch.empty(spec.layout.shape, dtype=spec.dtype, device="meta") if spec is not None else None

    def section(of: dict[str, Any]) -> dict[str, Any]:
        return {
            "model": {name: entry(name, coded) for name, coded in of["model"].items()},
            "optimizer": {
                "state": {
                    name: decoder.decode(coded, device)
                    for name, coded in of["state"].items()
                    if names is None or name in names
                },
                "param_groups": [
                    {"params": list(group["params"]), **decoder.decode(group["options"], device)}
                    for group in of["param_groups"]
                ],
            },
        }

    return {
        **section(state),
        **({"aux": section(state["aux"])} if "aux" in state else {}),
        **({"buffers": state["buffers"]} if "buffers" in state else {}),
        "scheduler": decoder.decode(state["scheduler"], device),
        "num_updates": found.num_updates,
    }


def read_state(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """A portable checkpoint as state dicts on the CPU, for a plain model and a plain optimizer.

    ::

        state = dtrp.saving.read_state("checkpoint")
        model.load_state_dict(state["model"])
        torch.distributed.checkpoint.state_dict.set_optimizer_state_dict(model, optimizer, state["optimizer"])

    Returns:
        What `Pipeline.state_dict` returns: ``{"model", "optimizer", "scheduler", "num_updates"}``, and ``"aux"`` where there
        are auxiliary networks.

    Raises:
        CheckpointError: no checkpoint, a damaged one, or an exact one.
    """
    found = inspect(folder)
    if found.kind != "portable":
        raise CheckpointError(f"{folder} is an exact checkpoint; load it into a pipeline, or save with portable=True")
    return guarded(found, lambda: decode(found))


def guarded(found: Checkpoint, job: Callable[[], T]) -> T:
    """Do what reads a manifest's values; what is not of its type there is refused in one line."""
    try:
        return job()
    except CheckpointError as error:
        if str(found.folder) in str(error):
            raise
        raise CheckpointError(f"{found.folder}: {error}") from error
    except (
        KeyError,
        IndexError,
        TypeError,
        ValueError,
        AttributeError,
        OverflowError,
        RecursionError,
        RuntimeError,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else "no reason given"
        raise CheckpointError(
            f"{found.folder}: the manifest holds what does not belong there ({type(error).__name__}: {reason}); "
            "use another checkpoint"
        ) from error
