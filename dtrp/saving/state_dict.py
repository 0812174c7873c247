"""State dicts that do not know how the model was cut.

Names are the unsplit model's. The optimizer's part has the form that
`torch.distributed.checkpoint.state_dict` uses: ``{"state": {name: {...}}, "param_groups": [{"params":
[names], ...options}]}``, groups with equal options merged over the stages.

Auxiliary networks are no part of the model: what is theirs, weights and optimizer state, is in a section of its own, ``aux``, under
``aux.<layer>.``, the layer that one follows. So it is found again wherever a stage ends at that layer, whatever K is.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..atomic_file import whole_file
from ..stage.buffers import buffers_of, names_of, put, slot_of
from ..stage.stage import Stage
from ..tensors.pytree import on_cpu

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
    aux = {name: _snapshot(value) for name, value in _aux_tensors(stage).items()}
    own, others = ({"model": tensors, "state": {}, "param_groups": []} for tensors in (model_part(stage), aux))  # type: tuple[dict[str, Any], dict[str, Any]]
    if stage.optimizer is not None:
        names = _names(stage)
        for p, entry in stage.optimizer.state.items():
            section = others if _is_aux(stage, names[id(p)]) else own
            section["state"][names[id(p)]] = {key: _snapshot(value) for key, value in entry.items()}
        for group in stage.optimizer.param_groups:
            options = {key: _snapshot(value) for key, value in group.items() if key != "params"}
            members = [names[id(p)] for p in group["params"]]
            for section in (own, others):
                of_it = [name for name in members if _is_aux(stage, name) == (section is others)]
                if of_it:
                    section["param_groups"].append({"params": of_it, **options})
    part = {**own, "scheduler": None, "aux": others if aux else None, "buffers": _changed_buffers(stage)}
    if stage.lr_scheduler is not None:
        part["scheduler"] = copy.deepcopy(stage.lr_scheduler.state_dict())
    return part


def merge_state(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """``{"model", "optimizer", "scheduler"}`` from all stages' parts; their number does not show.

    And ``aux`` and ``buffers`` if any has them.
    """
    aux = [part["aux"] for part in parts if part["aux"] is not None]
    buffers = [name for part in parts for name in part["buffers"]]
    return {
        **_merge_section(parts),
        "scheduler": next((part["scheduler"] for part in parts if part["scheduler"] is not None), None),
        **({"aux": _merge_section(aux)} if aux else {}),
        **({"buffers": buffers} if buffers else {}),
    }


def _merge_section(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
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
    }


def sections(state: dict[str, Any]) -> list[dict[str, Any]]:
    """Of a state that `merge_state` has made: the model's, and the auxiliary networks' if there are any."""
    return [state, state["aux"]] if state.get("aux") is not None else [state]


def _is_aux(stage: Stage, name: str) -> bool:
    return stage.aux is not None and name.startswith("aux.")


def _aux_tensors(stage: Stage) -> dict[str, Any]:
    """What belongs to the stage's auxiliary network, as its own state dict has it."""
    if stage.aux is None:
        return {}
    return {name: value for name, value in stage.whole.state_dict().items() if _is_aux(stage, name)}


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _changed_buffers(stage: Stage) -> list[str]:
    """The buffers in the model's state dict that are not of the shape, or not there, as when the pipeline was made."""
    changed = stage.repeatable.changed()
    return sorted(name for name, persistent in changed.items() if persistent and not _is_aux(stage, name))


def shapes_of(stage: Stage) -> dict[str, torch.Size | None]:
    """The shape of every tensor of the stage's state dict, as when the pipeline was made; None for what is no tensor."""
    state = stage.module.state_dict()
    shapes = {name: value.shape if isinstance(value, Tensor) else None for name, value in state.items()}
    for name in _changed_buffers(stage):
        shapes.pop(name, None)
        kind = stage.repeatable.made.get(name)
        if kind is not None:
            shapes[name] = kind[0]
    return shapes


def check_state(
    stages: Sequence[Stage], state: dict[str, Any], shapes: dict[str, torch.Size | None], *, scheduler: bool
) -> Callable[[], None]:
    """Check what `Pipeline.state_dict` returned, at this or another number of stages.

    An auxiliary network that is not in it, since another method wrote it or no stage ended there, is to stay as it is.

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
    _check_names(shapes, state["model"], state.get("buffers", ()))
    _check_ties(stages, state["model"])
    if (state["scheduler"] is None) == scheduler:
        raise ValueError(
            "the state dict and this pipeline differ in having a learning-rate scheduler; make both with one"
        )
    known = {stage.index: _known_aux(stage, state) for stage in stages}
    parts = [section["optimizer"] for section in sections(state)]
    saved_groups = [group for part in parts for group in part["param_groups"]]
    saved_states = [entry for part in parts for entry in part["state"].items()]
    plans = []
    for stage in stages:
        if stage.optimizer is None:
            continue
        names = _names(stage)
        index = _numbers(stage)
        given = [(name, _options(group)) for group in saved_groups for name in group["params"]]
        options: dict[str, dict[str, Any]] = _by_own_name(stage, given)
        states = _by_own_name(stage, saved_states)
        groups = []
        for group in stage.optimizer.param_groups:
            every = [names[id(p)] for p in group["params"]]
            members = [name for name in every if name in options or not _is_aux(stage, name)]
            if not members:
                groups.append({**_options(group), "params": [index[name] for name in every]})
                continue
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
            groups.append({**options[members[0]], "params": [index[name] for name in every]})
        here = {names[id(p)]: entry for p, entry in stage.optimizer.state.items()}
        entries = {}
        for name in index:
            source = here if _is_aux(stage, name) and known[stage.index] is None else states
            if name in source:
                entries[index[name]] = copy.deepcopy(source[name])
        plans.append((stage.optimizer, {"state": entries, "param_groups": groups}))

    def load() -> None:
        for stage in stages:
            _fit_buffers(stage, state)
            stage.module.load_state_dict({name: state["model"][name] for name in stage.module.state_dict()})
            aux = known[stage.index]
            if aux is not None and stage.aux is not None:
                stage.aux.load_state_dict(aux)
            elif stage.aux is not None:
                warnings.warn(
                    f"the state has no auxiliary network like that of stage {stage.index}, which stays as it is",
                    stacklevel=3,
                )
        for optimizer, plan in plans:
            optimizer.load_state_dict(plan)
        for stage in stages:
            if stage.lr_scheduler is not None:
                stage.lr_scheduler.load_state_dict(copy.deepcopy(state["scheduler"]))
                assert stage.optimizer is not None
                _reseat(stage.lr_scheduler, stage.optimizer.param_groups)
            stage.forget_predictions()

    return load


def _fit_buffers(stage: Stage, state: dict[str, Any]) -> None:
    """Let the stage have buffers, of the shapes and dtypes, that the state can be loaded into."""
    module, model, changed = stage.module, state["model"], state.get("buffers", ())
    own, present = buffers_of(module), module.state_dict().keys()
    names = names_of(module, own)
    values, made = dict(own), dict[int, Tensor]()
    for slot, name in names.items():
        given, buffer = model.get(name), own[slot]
        if slot[1] in slot[0]._non_persistent_buffers_set:
            continue
        if isinstance(given, Tensor):
            if buffer is None:
                values[slot] = torch.empty_like(given, device=stage.device)
            elif buffer.shape != given.shape or (name in changed and buffer.dtype != given.dtype):
                values[slot] = made.setdefault(id(buffer), torch.empty_like(given, device=stage.device))
        elif name in present and name in stage.repeatable.made:
            values[slot] = None
        elif name in present:
            del values[slot]
    for name in set(changed) & model.keys() - set(names.values()):
        with suppress(AttributeError):  # another stage's
            values[slot_of(module, name)] = torch.empty_like(model[name], device=stage.device)
    put(own, values)


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


def _known_aux(stage: Stage, state: dict[str, Any]) -> dict[str, Any] | None:
    """What the state has for the stage's auxiliary network, under the network's own names; None where it has not all of it."""
    own = _aux_tensors(stage)
    given = state["aux"]["model"] if state.get("aux") is not None else {}
    shapes = {name: value.shape for name, value in own.items() if isinstance(value, Tensor)}
    if not own.keys() <= given.keys() or any(
        shape != getattr(given[name], "shape", None) for name, shape in shapes.items()
    ):
        return None
    return {name.split(".", 2)[2]: given[name] for name in own}


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


def _snapshot(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def _check_names(own: dict[str, torch.Size | None], given: dict[str, Any], changed: Collection[str]) -> None:
    own = {name: shape for name, shape in own.items() if name not in changed}
    given = {name: value for name, value in given.items() if name not in changed}
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
