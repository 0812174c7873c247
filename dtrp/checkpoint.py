"""State dicts that do not know how the model was cut.

Names are the unsplit model's. The optimizer's part has the form that
`torch.distributed.checkpoint.state_dict` uses: ``{"state": {name: {...}}, "param_groups": [{"params":
[names], ...options}]}``, groups with equal options merged over the stages.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .stage import Stage


def model_state_dict(stages: Sequence[Stage]) -> dict[str, Tensor]:
    """A snapshot of the whole model's state dict, under the unsplit model's names."""
    return {name: _snapshot(value) for stage in stages for name, value in stage.module.state_dict().items()}


def optimizer_state_dict(stages: Sequence[Stage]) -> dict[str, Any]:
    """A snapshot of all stages' optimizers as one, by parameter name."""
    state: dict[str, Any] = {}
    groups: list[dict[str, Any]] = []
    for stage in stages:
        if stage.optimizer is None:
            continue
        names = _names(stage)
        for p, entry in stage.optimizer.state.items():
            state[names[id(p)]] = {key: _snapshot(value) for key, value in entry.items()}
        for group in stage.optimizer.param_groups:
            options = {key: _snapshot(value) for key, value in group.items() if key != "params"}
            params = [names[id(p)] for p in group["params"]]
            same = next((g for g in groups if {k: v for k, v in g.items() if k != "params"} == options), None)
            if same is None:
                groups.append({"params": params, **options})
            else:
                same["params"] += params
    return {"state": state, "param_groups": groups}


def scheduler_state_dict(stages: Sequence[Stage]) -> dict[str, Any] | None:
    """The learning-rate scheduler's state, the same at every stage; None without one."""
    for stage in stages:
        if stage.lr_scheduler is not None:
            state: dict[str, Any] = copy.deepcopy(stage.lr_scheduler.state_dict())
            return state
    return None


def load_into(stages: Sequence[Stage], state: dict[str, Any]) -> None:
    """Load what `Pipeline.state_dict` returned, at this or another number of stages.

    Everything is checked before anything is written.

    Raises:
        TypeError: no dict.
        ValueError: a part is missing, or names or shapes are not this model's.
    """
    if not isinstance(state, dict):
        raise TypeError(f"the state is a {type(state).__name__}; pass what pipe.state_dict() returned")
    missing = [key for key in ("model", "optimizer", "scheduler", "num_updates") if key not in state]
    if missing:
        raise ValueError(f"the state dict lacks {', '.join(missing)}; pass what pipe.state_dict() returned")
    own = {name: value for stage in stages for name, value in stage.module.state_dict().items()}
    _check_names(own, state["model"])
    if (state["scheduler"] is None) != (scheduler_state_dict(stages) is None):
        raise ValueError(
            "the state dict and this pipeline differ in having a learning-rate scheduler; make both with one"
        )
    options: dict[str, dict[str, Any]] = {}
    for group in state["optimizer"]["param_groups"]:
        for name in group["params"]:
            options[name] = {key: value for key, value in group.items() if key != "params"}
    plans = []
    for stage in stages:
        if stage.optimizer is None:
            continue
        names = _names(stage)
        index = _numbers(stage)
        groups = []
        for group in stage.optimizer.param_groups:
            members = [names[id(p)] for p in group["params"]]
            unknown = [name for name in members if name not in options]
            if unknown:
                raise ValueError(
                    f"the state dict has no optimizer options for {unknown[0]}; it trained other parameters"
                )
            if any(options[name] != options[members[0]] for name in members):
                raise ValueError(
                    f"{members[0]} and another parameter of its group have different options in the state dict; make the "
                    "optimizer with the same parameter groups"
                )
            if options[members[0]].keys() != group.keys() - {"params"}:
                raise ValueError(
                    f"the state dict's optimizer has the options {', '.join(sorted(options[members[0]]))}, this one "
                    f"{', '.join(sorted(group.keys() - {'params'}))}; it was saved with another optimizer"
                )
            groups.append({**options[members[0]], "params": [index[name] for name in members]})
        entries = {
            index[name]: copy.deepcopy(state["optimizer"]["state"][name])
            for name in stage.names
            if name in state["optimizer"]["state"]
        }
        plans.append((stage.optimizer, {"state": entries, "param_groups": groups}))
    for stage in stages:
        stage.module.load_state_dict({name: state["model"][name] for name in stage.module.state_dict()})
    for optimizer, plan in plans:
        optimizer.load_state_dict(plan)
    for stage in stages:
        if stage.lr_scheduler is not None:
            stage.lr_scheduler.load_state_dict(copy.deepcopy(state["scheduler"]))
            assert stage.optimizer is not None
            _reseat(stage.lr_scheduler, stage.optimizer.param_groups)
        stage.version = state["num_updates"]
        stage.forget_predictions()


def _reseat(scheduler: Any, groups: list[dict[str, Any]]) -> None:
    """A scheduler's lists by parameter group are those of its own stage; only the time it tells is common."""
    if hasattr(scheduler, "base_lrs"):
        scheduler.base_lrs = [group.get("initial_lr", group["lr"]) for group in groups]
    if hasattr(scheduler, "_last_lr"):
        scheduler._last_lr = [group["lr"] for group in groups]
    for inner in getattr(scheduler, "_schedulers", ()):
        _reseat(inner, groups)


def _names(stage: Stage) -> dict[int, str]:
    """The names of a stage's trainable parameters, by the parameter's id."""
    return {id(p): name for name, p in zip(stage.names, stage.parameters, strict=True)}


def _numbers(stage: Stage) -> dict[str, int]:
    """The number under which an optimizer's own state dict knows each parameter."""
    assert stage.optimizer is not None
    names = _names(stage)
    members = [p for group in stage.optimizer.param_groups for p in group["params"]]
    return {names[id(p)]: i for i, p in enumerate(members)}


def write_model(state: dict[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write a plain state dict, on the CPU, whole or not at all."""
    path = Path(path)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        temporary = Path(file.name)
        try:
            torch.save({name: _on_cpu(value) for name, value in state.items()}, file)
            file.flush()
            os.fsync(file.fileno())
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _on_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _snapshot(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def _check_names(own: dict[str, Any], given: dict[str, Any]) -> None:
    lost, strange = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    if lost or strange:
        parts = [f"lacks {lost[0]}"] if lost else []
        parts += [f"has {strange[0]}, which the model has not"] if strange else []
        raise ValueError(
            f"the state dict is another model's: it {' and '.join(parts)} ({len(lost) + len(strange)} names differ)"
        )
    for name, value in own.items():
        if isinstance(value, Tensor) and value.shape != given[name].shape:
            raise ValueError(
                f"the state dict is another model's: {name} has shape {tuple(given[name].shape)} there, "
                f"{tuple(value.shape)} here"
            )
