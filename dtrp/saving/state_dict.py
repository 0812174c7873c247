"""State dicts that do not depend on how the model was cut.

Names are the unsplit model's. The optimizer's part has the form that
`torch.distributed.checkpoint.state_dict` uses: ``{"state": {name: {...}}, "param_groups": [{"params":
[names], ...options}]}``, groups with equal options merged over the stages.

A loss that is trained is no part of the model: its weights and optimizer state are in a section ``loss``, under
``loss.`` Neither are auxiliary networks: their weights and optimizer state are in a section ``aux``, under
``aux.<layer>.``, the layer that the network follows. So they are found again wherever a stage ends at that layer,
whatever K is.
"""

from __future__ import annotations

import copy
import itertools
import os
import warnings
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ..atomic_file import whole_file
from ..optim.factories import group_options
from ..stage.losses import Section
from ..stage.stage import Stage
from ..tensors.module_buffers import buffers_of, names_of, put, slot_of
from ..tensors.pytree import on_cpu
from ..tensors.torch_private import non_persistent_buffers
from ..typing import StateDict

SECTIONS = get_args(Section)
T = TypeVar("T")
Shapes = dict[str, torch.Size | None]  # by name in a state dict; None: no tensor


def model_part(stage: Stage) -> dict[str, Tensor]:
    """A snapshot of a stage's part of the model's state dict, under the unsplit model's names."""
    stage.check_gradients()
    return {name: _snapshot(value) for name, value in stage.module.state_dict().items()}


def merge_model(parts: Sequence[dict[str, T]]) -> dict[str, T]:
    """The whole model's state dict (or its shapes), from all stages' parts."""
    return {name: value for part in parts for name, value in part.items()}


def state_part(stage: Stage) -> StateDict:
    """A snapshot of a stage's part of `Pipeline.state_dict`."""
    beside = {name: _snapshot(value) for name, value in _tensors_beside(stage).items()}
    both: list[StateDict] = [
        {"model": tensors, "state": {}, "param_groups": []} for tensors in (model_part(stage), beside)
    ]
    if stage.optimizer is not None:
        names = _names(stage)
        for p, entry in stage.optimizer.state.items():
            name = names[id(p)]
            both[_is_beside(stage, name)]["state"][name] = {key: _snapshot(value) for key, value in entry.items()}
        for group in stage.optimizer.param_groups:
            options = {key: _snapshot(value) for key, value in group_options(group).items()}
            members = [names[id(p)] for p in group["params"]]
            for is_beside, section in enumerate(both):
                chosen = [name for name in members if _is_beside(stage, name) == is_beside]
                if chosen:
                    section["param_groups"].append({"params": chosen, **options})
    scheduler = None if stage.lr_scheduler is None else copy.deepcopy(stage.lr_scheduler.state_dict())
    extra = {stage.section[0]: both[1]} if stage.section is not None else {}
    return {**both[0], **dict.fromkeys(SECTIONS), **extra, "scheduler": scheduler, "buffers": _changed_buffers(stage)}


def merge_state(parts: Sequence[StateDict]) -> StateDict:
    """All stages' parts as ``{"model", "optimizer", "scheduler"}``, and ``aux``, ``loss``, ``buffers`` if a stage has them."""
    beside = {name: [part[name] for part in parts if part.get(name) is not None] for name in SECTIONS}
    buffers = [name for part in parts for name in part["buffers"]]
    return {
        **_merge_section(parts),
        "scheduler": next((part["scheduler"] for part in parts if part["scheduler"] is not None), None),
        **{name: _merge_section(found) for name, found in beside.items() if found},
        **({"buffers": buffers} if buffers else {}),
    }


def _merge_section(parts: Sequence[StateDict]) -> StateDict:
    groups: list[StateDict] = []
    for group in itertools.chain.from_iterable(part["param_groups"] for part in parts):
        same = next((g for g in groups if group_options(g) == group_options(group)), None)
        if same is None:
            groups.append(dict(group))
        else:
            same["params"] = same["params"] + group["params"]
    state = merge_model([part["state"] for part in parts])
    model = merge_model([part["model"] for part in parts])
    return {"model": model, "optimizer": {"state": state, "param_groups": groups}}


def sections(state: StateDict) -> list[StateDict]:
    """The sections of a merged state: the model's, and those beside it that there are, in the order of `SECTIONS`."""
    return [state, *(state[name] for name in SECTIONS if state.get(name) is not None)]


def _is_beside(stage: Stage, name: str) -> bool:
    """Whether a tensor of the stage is trained beside the model: its auxiliary network's, or its loss's."""
    return stage.section is not None and name.startswith(f"{stage.section[0]}.")


def _tensors_beside(stage: Stage) -> StateDict:
    """The entries in a state dict of what is trained at the stage beside the model."""
    state = {} if stage.section is None else stage.whole.state_dict()
    return {name: value for name, value in state.items() if _is_beside(stage, name)}


def is_saved_whole(stage: Stage, group: StateDict, saved_groups: Sequence[StateDict]) -> bool:
    """Whether a saved group has the parameters of a stage's group and no others, as one of the same stage has."""
    members = saved_names(stage, group)
    return any(
        len(saved["params"]) == len(group["params"]) and members.issuperset(saved["params"]) for saved in saved_groups
    )


def saved_names(stage: Stage, group: StateDict) -> set[str]:
    """The names under which the parameters of a stage's group may have been saved, those of other stages included."""
    ids, parameters = set(map(id, group["params"])), dict(zip(stage.names, stage.parameters, strict=True))
    return {saved for saved, name in stage.called.items() if id(parameters[name]) in ids}


def _changed_buffers(stage: Stage) -> list[str]:
    """The buffers in the model's state dict that have come, gone or changed shape since the pipeline was made."""
    changed = stage.repeatable.changed()
    return sorted(name for name, persistent in changed.items() if persistent and not _is_beside(stage, name))


def shapes_of(stage: Stage) -> Shapes:
    """The shape of every entry of the stage's state dict when the pipeline was made."""
    state = stage.module.state_dict()
    shapes = {name: value.shape if isinstance(value, Tensor) else None for name, value in state.items()}
    for name in _changed_buffers(stage):
        shapes.pop(name, None)
        kind = stage.repeatable.made.get(name)
        if kind is not None:
            shapes[name] = kind[0]
    return shapes


def check_state(stages: Sequence[Stage], state: StateDict, shapes: Shapes, *, scheduler: bool) -> Callable[[], None]:
    """Check what `Pipeline.state_dict` returned, at this or another number of stages.

    An auxiliary network, or a loss, that is not in it, since another method wrote it or no stage ended there, stays as
    it is.

    Args:
        stages: stages to load it into.
        state: return value of `Pipeline.state_dict`.
        shapes: shapes of the whole model's entries, as of `shapes_of`.
        scheduler: whether the stages have learning-rate schedulers.

    Returns:
        A function that loads it. Nothing has been written before.

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
    beside = {stage.index: _saved_beside(stage, state) for stage in stages}
    optimizers = [section["optimizer"] for section in sections(state)]
    plans = [
        (stage.optimizer, _optimizer_state(stage, optimizers, has_beside=beside[stage.index] is not None))
        for stage in stages
        if stage.optimizer is not None
    ]

    def load() -> None:
        for stage in stages:
            _fit_buffers(stage, state)
            stage.module.load_state_dict({name: state["model"][name] for name in stage.module.state_dict()})
            if stage.section is None:
                continue
            if (saved := beside[stage.index]) is not None:
                stage.section[1].load_state_dict(saved)
            else:
                what = "auxiliary network" if stage.section[0] == "aux" else "loss"
                warnings.warn(
                    f"the state has no {what} like that of stage {stage.index}, which stays as it is", stacklevel=3
                )
        for optimizer, plan in plans:
            optimizer.load_state_dict(plan)
        for stage in stages:
            if stage.lr_scheduler is not None:
                stage.lr_scheduler.load_state_dict(copy.deepcopy(state["scheduler"]))
                assert stage.optimizer is not None
                if stage.rates_of_place:
                    _recompute_rates(stage.lr_scheduler, stage.optimizer.param_groups)
                _take_learning_rates(stage.lr_scheduler, stage.optimizer.param_groups)
            stage.forget_predictions()

    return load


def _optimizer_state(stage: Stage, optimizers: Sequence[StateDict], *, has_beside: bool) -> StateDict:
    """The state dict to load into the optimizer of a stage.

    Args:
        stage: stage with an optimizer.
        optimizers: the optimizer's part of each section of the state.
        has_beside: whether the state has what the stage trains beside the model; else the optimizer's state of that
            stays.
    """
    assert stage.optimizer is not None
    names = _names(stage)
    saved_groups = [group for optimizer in optimizers for group in optimizer["param_groups"]]
    saved_states = [entry for optimizer in optimizers for entry in optimizer["state"].items()]
    options = _by_stage_name(
        stage, [(name, group_options(group)) for group in saved_groups for name in group["params"]]
    )
    saved = _by_stage_name(stage, saved_states)
    current = {names[id(p)]: entry for p, entry in stage.optimizer.state.items()}
    groups: list[StateDict] = []
    entries, number = {}, 0
    for place, group in enumerate(stage.optimizer.param_groups):
        members = [names[id(p)] for p in group["params"]]
        numbers = range(number, number := number + len(members))
        is_whole = is_saved_whole(stage, group, saved_groups)
        own = None if is_whole or place >= len(stage.options_of_place) else stage.options_of_place[place]
        groups.append({**_options_for(stage, group, members, options, own), "params": list(numbers)})
        for i, name in zip(numbers, members, strict=True):
            source = current if _is_beside(stage, name) and not has_beside else saved
            if name in source:
                entries[i] = copy.deepcopy(source[name])
    return {"state": entries, "param_groups": groups}


def _options_for(
    stage: Stage, group: StateDict, names: list[str], options: dict[str, StateDict], own: StateDict | None
) -> StateDict:
    """The saved options of a parameter group; its present ones if only an unsaved auxiliary network is in it.

    Where the factories of optimizer and scheduler have asked for the place in the pipeline, and the state is of other
    stages: the options that the optimizer was made with (``own``), and the learning rate of a schedule's update.
    """
    members = [name for name in names if name in options or not _is_beside(stage, name)]
    if not members:
        return group_options(group)
    for name in members:
        if name not in options:
            raise ValueError(f"the state dict has no optimizer options for {name}; it trained other parameters")
    saved = options[members[0]]
    differ = {option for name in members for option in saved if options[name].get(option) != saved[option]}
    if own is None and differ - ({"lr"} if stage.rates_of_place else set()):
        raise ValueError(
            f"{members[0]} and another parameter of its group have different options in the state dict; make the "
            "optimizer with the same parameter groups"
        )
    if own is None and differ and not isinstance(stage.lr_scheduler, LambdaLR):
        raise ValueError(
            f"{members[0]} and another parameter of its group have different learning rates in the state dict, by their stage or "
            "its delay; load it at the number of stages that it was saved at, or make the schedule with LambdaLR"
        )
    if own is not None and saved.keys() >= own.keys():
        rate = saved["lr"] / saved["initial_lr"] if saved.get("initial_lr") else 1
        return saved | own | {"lr": own["lr"] * rate} | ({"initial_lr": own["lr"]} if "initial_lr" in saved else {})
    if saved.keys() != group_options(group).keys():
        raise ValueError(
            f"the state dict's optimizer has the options {', '.join(sorted(saved))}, this one "
            f"{', '.join(sorted(group_options(group)))}; it was saved with another optimizer"
        )
    return saved


def _fit_buffers(stage: Stage, state: StateDict) -> None:
    """Give the stage buffers of such shapes and dtypes that the state can be loaded into them."""
    module, model, changed = stage.module, state["model"], state.get("buffers", ())
    current, present = buffers_of(module), module.state_dict().keys()
    names = names_of(module, current)
    values, made = dict(current), dict[int, Tensor]()
    for slot, name in names.items():
        saved, buffer = model.get(name), current[slot]
        if slot[1] in non_persistent_buffers(slot[0]):
            continue
        if isinstance(saved, Tensor):
            if buffer is None:
                values[slot] = torch.empty_like(saved, device=stage.device)
            elif buffer.shape != saved.shape or (name in changed and buffer.dtype != saved.dtype):
                values[slot] = made.setdefault(id(buffer), torch.empty_like(saved, device=stage.device))
        elif name in present and name in stage.repeatable.made:
            values[slot] = None
        elif name in present:
            del values[slot]
    for name in set(changed) & model.keys() - set(names.values()):
        with suppress(AttributeError):  # another stage's
            values[slot_of(module, name)] = torch.empty_like(model[name], device=stage.device)
    put(current, values)


def options_of(optimizer: Optimizer | None) -> list[StateDict]:
    """The options of an optimizer, group by group; a learning rate as it was before any scheduler."""
    groups = optimizer.param_groups if optimizer is not None else []
    return [{**group_options(group), "lr": group.get("initial_lr", group["lr"])} for group in groups]


def set_options(optimizer: Optimizer | None, scheduler: Any, options: list[StateDict]) -> None:
    """Set the options of an optimizer to what `options_of` has returned; its schedule goes on from where it is."""
    groups = optimizer.param_groups if optimizer is not None else []
    for group, new in zip(groups, options, strict=True):
        lr, before = new["lr"], group.get("initial_lr", group["lr"])
        group.update({name: value for name, value in new.items() if name not in ("lr", "initial_lr")})
        if lr != before:
            group["lr"] = group["lr"] * (lr / before) if before else lr
            group["initial_lr"] = lr
    if scheduler is not None:
        _take_learning_rates(scheduler, groups)


def _saved_beside(stage: Stage, state: StateDict) -> StateDict | None:
    """The state dict of what the stage trains beside the model; None where the state has not all of it."""
    if stage.section is None:
        return None
    section, current = stage.section[0], _tensors_beside(stage)
    saved = state[section]["model"] if state.get(section) is not None else {}
    for name, value in current.items():
        if name not in saved or (isinstance(value, Tensor) and value.shape != getattr(saved[name], "shape", None)):
            return None
    return {name.removeprefix(f"{section}."): saved[name] for name in current}


def _take_learning_rates(scheduler: Any, groups: list[StateDict]) -> None:
    """Set a scheduler's lists by parameter group to this stage's: of the saved scheduler only the step counts."""
    if hasattr(scheduler, "base_lrs"):
        scheduler.base_lrs = [group.get("initial_lr", group["lr"]) for group in groups]
    if hasattr(scheduler, "_last_lr"):
        scheduler._last_lr = [group["lr"] for group in groups]
    for inner in getattr(scheduler, "_schedulers", ()):
        _take_learning_rates(inner, groups)


def _recompute_rates(scheduler: Any, groups: list[StateDict]) -> None:
    """Give the groups the learning rates that the schedule of this stage has now; those of another may have been saved."""
    if isinstance(scheduler, LambdaLR):
        for group, factor in zip(groups, scheduler.lr_lambdas, strict=True):
            rate = group["initial_lr"] * factor(scheduler.last_epoch)
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


def _by_stage_name(stage: Stage, entries: Sequence[tuple[str, T]]) -> dict[str, T]:
    """Entries by parameter name, under the names by which the stage knows the parameters that have several."""
    saved_names: dict[str, str] = {}
    result = {}
    for saved_name, entry in entries:
        name = stage.called.get(saved_name, saved_name)
        known = saved_names.setdefault(name, saved_name)
        if known != saved_name:
            raise ValueError(
                f"{known} and {saved_name} are one parameter of this model, and the state dict trained two; untie them in the model"
            )
        result[name] = entry
    return result


def _names(stage: Stage) -> dict[int, str]:
    """The names of a stage's parameters, by the parameter's id; an optimizer may hold frozen ones too."""
    names = {id(p): name for name, p in stage.module.named_parameters()}
    return names | {id(p): name for name, p in zip(stage.names, stage.parameters, strict=True)}


def write_model(state: dict[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write a plain state dict, on the CPU, completely or not at all."""
    with whole_file(path) as file:
        torch.save(on_cpu(state), file)


def _snapshot(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def _check_names(shapes: Shapes, saved: StateDict, changed: Collection[str]) -> None:
    shapes = {name: shape for name, shape in shapes.items() if name not in changed}
    saved = {name: value for name, value in saved.items() if name not in changed}
    lost, strange = sorted(shapes.keys() - saved.keys()), sorted(saved.keys() - shapes.keys())
    if lost or strange:
        parts = [f"lacks {lost[0]}"] if lost else []
        parts += [f"has {strange[0]}, which the model has not"] if strange else []
        raise ValueError(
            f"the state dict is another model's: it {' and '.join(parts)} ({len(lost) + len(strange)} names differ)"
        )
    for name, shape in shapes.items():
        if shape is not None and shape != saved[name].shape:
            raise ValueError(
                f"the state dict is another model's: {name} has shape {tuple(saved[name].shape)} there, "
                f"{tuple(shape)} here"
            )


def _check_ties(stages: Sequence[Stage], saved: StateDict) -> None:
    """Refuse different values for names of one tensor: each stage that holds it loads its value by another name."""
    for stage in stages:
        for tie in stage.ties:
            for name in tie.names[stage.index]:
                if not torch.equal(saved[name].to(saved[tie.name].device), saved[tie.name]):
                    raise ValueError(
                        f"{name} and {tie.name} are one tensor of this model, and two in the state dict; untie them in the model, "
                        "or make them equal in the state dict"
                    )
