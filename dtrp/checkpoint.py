"""State dicts that do not know how the model was cut.

Names are the unsplit model's. The optimizer's part has the form that
`torch.distributed.checkpoint.state_dict` uses: ``{"state": {name: {...}}, "param_groups": [{"params":
[names], ...options}]}``, groups with equal options merged over the stages.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .files import whole_file
from .stage import Stage

T = TypeVar("T")


def model_part(stage: Stage) -> dict[str, Tensor]:
    """A snapshot of a stage's part of the model's state dict, under the unsplit model's names."""
    stage.check_gradients()
    return {name: _snapshot(value) for name, value in stage.module.state_dict().items()}


def merge_model(parts: Sequence[dict[str, T]]) -> dict[str, T]:
    """The whole model's state dict, or what is said of its entries, from all stages' parts."""
    return {name: value for part in parts for name, value in part.items()}


def state_part(stage: Stage) -> dict[str, Any]:
    """A snapshot of what one stage adds to `Pipeline.state_dict`."""
    part: dict[str, Any] = {"model": model_part(stage), "state": {}, "param_groups": [], "scheduler": None}
    if stage.optimizer is not None:
        names = _names(stage)
        for p, entry in stage.optimizer.state.items():
            part["state"][names[id(p)]] = {key: _snapshot(value) for key, value in entry.items()}
        for group in stage.optimizer.param_groups:
            options = {key: _snapshot(value) for key, value in group.items() if key != "params"}
            part["param_groups"].append({"params": [names[id(p)] for p in group["params"]], **options})
    if stage.lr_scheduler is not None:
        part["scheduler"] = copy.deepcopy(stage.lr_scheduler.state_dict())
    return part


def merge_state(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """``{"model", "optimizer", "scheduler"}`` from all stages' parts, in which their number does not show."""
    state: dict[str, Any] = {}
    groups: list[dict[str, Any]] = []
    for part in parts:
        state |= part["state"]
        for group in part["param_groups"]:
            same = next((g for g in groups if _options(g) == _options(group)), None)
            if same is None:
                groups.append(dict(group))
            else:
                same["params"] = same["params"] + group["params"]
    return {
        "model": merge_model([part["model"] for part in parts]),
        "optimizer": {"state": state, "param_groups": groups},
        "scheduler": next((part["scheduler"] for part in parts if part["scheduler"] is not None), None),
    }


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def shapes_of(module: nn.Module) -> dict[str, torch.Size | None]:
    """The shape of every tensor of the module's state dict; None for what is no tensor."""
    return {name: value.shape if isinstance(value, Tensor) else None for name, value in module.state_dict().items()}


def check_state(
    stages: Sequence[Stage], state: dict[str, Any], shapes: dict[str, torch.Size | None], *, scheduler: bool
) -> Callable[[], None]:
    """Check what `Pipeline.state_dict` returned, at this or another number of stages.

    Args:
        stages: those to load it into.
        state: what it returned.
        shapes: of the whole model, as `shapes_of`.
        scheduler: whether the stages have learning-rate schedulers.

    Returns:
        What loads it. Nothing has been written before.

    Raises:
        TypeError: no dict.
        ValueError: a part is missing, or names or shapes are not this model's.
    """
    if not isinstance(state, dict):
        raise TypeError(f"the state is a {type(state).__name__}; pass what pipe.state_dict() returned")
    missing = [key for key in ("model", "optimizer", "scheduler", "num_updates") if key not in state]
    if missing:
        raise ValueError(f"the state dict lacks {', '.join(missing)}; pass what pipe.state_dict() returned")
    _check_names(shapes, state["model"])
    _check_ties(stages, state["model"])
    if (state["scheduler"] is None) == scheduler:
        raise ValueError(
            "the state dict and this pipeline differ in having a learning-rate scheduler; make both with one"
        )
    plans = []
    for stage in stages:
        if stage.optimizer is None:
            continue
        names = _names(stage)
        index = _numbers(stage)
        given = [(name, _options(group)) for group in state["optimizer"]["param_groups"] for name in group["params"]]
        options: dict[str, dict[str, Any]] = _by_own_name(stage, given)
        states = _by_own_name(stage, list(state["optimizer"]["state"].items()))
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
        entries = {index[name]: copy.deepcopy(states[name]) for name in index if name in states}
        plans.append((stage.optimizer, {"state": entries, "param_groups": groups}))

    def load() -> None:
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

    return load


def options_of(stage: Stage) -> list[dict[str, Any]]:
    """The options of a stage's optimizer, group by group; a learning rate as it was before any scheduler."""
    groups = stage.optimizer.param_groups if stage.optimizer is not None else []
    return [{**_options(group), "lr": group.get("initial_lr", group["lr"])} for group in groups]


def set_options(stage: Stage, options: list[dict[str, Any]]) -> None:
    """Give a stage's optimizer these options, which `options_of` has returned; where its schedule is, it stays."""
    if stage.optimizer is None:
        return
    for group, own in zip(stage.optimizer.param_groups, options, strict=True):
        lr, before = own["lr"], group.get("initial_lr", group["lr"])
        group.update({name: value for name, value in own.items() if name not in ("lr", "initial_lr")})
        if lr != before:
            group["lr"] = group["lr"] * (lr / before) if before else lr
            group["initial_lr"] = lr
    if stage.lr_scheduler is not None:
        _reseat(stage.lr_scheduler, stage.optimizer.param_groups)


def _reseat(scheduler: Any, groups: list[dict[str, Any]]) -> None:
    """A scheduler's lists by parameter group are those of its own stage; only the time it tells is common."""
    if hasattr(scheduler, "base_lrs"):
        scheduler.base_lrs = [group.get("initial_lr", group["lr"]) for group in groups]
    if hasattr(scheduler, "_last_lr"):
        scheduler._last_lr = [group["lr"] for group in groups]
    for inner in getattr(scheduler, "_schedulers", ()):
        _reseat(inner, groups)


def _by_own_name(stage: Stage, entries: Sequence[tuple[str, T]]) -> dict[str, T]:
    """What a state dict says of parameters, of which the stage may know some by another of their names."""
    known: dict[str, str] = {}
    result = {}
    for name, entry in entries:
        own = stage.called.get(name, name)
        if known.setdefault(own, name) != name:
            raise ValueError(
                f"{known[own]} and {name} are one parameter of this model, and the state dict trained two; untie them in the model"
            )
        result[own] = entry
    return result


def _names(stage: Stage) -> dict[int, str]:
    """The names of a stage's parameters, by the parameter's id; an optimizer may hold frozen ones too."""
    names = {id(p): name for name, p in stage.module.named_parameters()}
    return names | {id(p): name for name, p in zip(stage.names, stage.parameters, strict=True)}


def _numbers(stage: Stage) -> dict[str, int]:
    """The number under which an optimizer's own state dict knows each parameter."""
    assert stage.optimizer is not None
    names = _names(stage)
    members = [p for group in stage.optimizer.param_groups for p in group["params"]]
    return {names[id(p)]: i for i, p in enumerate(members)}


def write_model(state: dict[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write a plain state dict, on the CPU, whole or not at all."""
    with whole_file(path) as file:
        torch.save(on_cpu(state), file)


def on_cpu(value: Any) -> Any:
    """The value with every tensor in it, however deep in dicts, lists and tuples, on the CPU."""
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        result = copy.copy(value)
        for key, entry in value.items():
            result[key] = on_cpu(entry)
        return result
    return type(value)(map(on_cpu, value)) if type(value) in (list, tuple) else value


def _snapshot(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def _check_names(own: dict[str, torch.Size | None], given: dict[str, Any]) -> None:
    lost, strange = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    if lost or strange:
        parts = [f"lacks {lost[0]}"] if lost else []
        parts += [f"has {strange[0]}, which the model has not"] if strange else []
        raise ValueError(
            f"the state dict is another model's: it {' and '.join(parts)} ({len(lost) + len(strange)} names differ)"
        )
    for name, shape in own.items():
        if shape is not None and shape != given[name].shape:
            raise ValueError(
                f"the state dict is another model's: {name} has shape {tuple(given[name].shape)} there, "
                f"{tuple(shape)} here"
            )


def _check_ties(stages: Sequence[Stage], given: dict[str, Any]) -> None:
    """Names of one tensor have one value: each stage that holds it loads its own."""
    for stage in stages:
        for tie in stage.ties:
            for name in tie.names[stage.index]:
                if not torch.equal(given[name].to(given[tie.name].device), given[tie.name]):
                    raise ValueError(
                        f"{name} and {tie.name} are one tensor of this model, and two in the state dict; untie them in the model, "
                        "or make them equal in the state dict"
                    )
