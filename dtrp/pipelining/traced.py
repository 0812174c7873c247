"""What the graphs of a stage tell that `torch.distributed.pipelining.pipeline` has traced.

Its operations: whether they are those of train mode alone (``eval`` is refused then), and which buffers they write.

Its parameters: one that several stages of the model read has a copy in each of them, under its name in the model, and
under the name by which the stage reads it, where that is another: the name of the other module that holds it, or one
with the number of the call, ``layer@1.weight``. Where a stage reads it by several names, it has several copies::

    emb.weight and head.weight are one tensor   stage 0 reads emb.weight, and has head.weight
                                                stage 1 reads head.weight
    the module `layer` is called four times     stage 0 reads layer.weight and layer@1.weight
                                                stage 1 reads layer@2.weight and layer@3.weight, and has layer.weight
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.optim import Optimizer

from ..splitting.export import plain
from ..splitting.points import draws
from ..stage.tied import Tie
from ..tensors.torch_private import is_operator, operator_schema, parameter_dict

Names = dict[fx.Node, str]  # of the parameters and buffers that nodes are


@dataclass(frozen=True)
class Traced:
    """A traced stage, as the other ranks are told of it.

    Args:
        one_mode: the first operation of train mode alone; None: there is none.
        trains: for each parameter, by its name in the model, whether it requires a gradient.
        buffers: the names of the buffers in the model.
        written: those of them that the stage writes.
    """

    one_mode: str | None
    trains: Mapping[str, bool]
    buffers: frozenset[str]
    written: frozenset[str]

    @classmethod
    def of(cls, module: nn.Module) -> Traced:
        """Of the module of a stage."""
        found = list(_operations(module, "", {}))
        written = {name for node, names in found for name in _written(node, names)}
        buffers = {name for name, _ in module.named_buffers(remove_duplicate=False)}
        return cls(
            next((mode for node, names in found if (mode := _train_mode_alone(node, names)) is not None), None),
            {name: p.requires_grad for name, p in module.named_parameters(remove_duplicate=False)},
            frozenset(map(plain, buffers)),
            frozenset(map(plain, written & buffers)),
        )


def check_written(stages: Sequence[Traced]) -> None:
    """Refuse a buffer that several stages have and one of them writes.

    Raises:
        ValueError: naming it.
    """
    for index, stage in enumerate(stages):
        for other, theirs in enumerate(stages):
            if both := sorted(stage.written & theirs.buffers) if other != index else []:
                raise ValueError(
                    f"the buffer {both[0]} is in stages {min(index, other)} and {max(index, other)}, which have a copy each, and "
                    f"stage {index} writes its own: they would move apart. Split the model so that one stage reads it, or give "
                    "each call a module of its own"
                )


def shared_parameters(stages: Sequence[Traced]) -> list[Tie]:
    """The parameters that several stages have, by their names in the model.

    Raises:
        ValueError: one that is trained in some of them, and frozen in others.
    """
    ties = []
    for name in dict.fromkeys(name for stage in stages for name in stage.trains):
        holders = [index for index, stage in enumerate(stages) if name in stage.trains]
        if len(holders) > 1:
            trained = {stages[index].trains[name] for index in holders}
            if len(trained) > 1:
                raise ValueError(
                    f"{name} requires a gradient in some of the stages {holders}, and in others not; let all agree"
                )
            ties.append(Tie(dict.fromkeys(holders, (name,)), trained.pop()))
    return ties


def unite(module: nn.Module, ties: Sequence[Tie], stage: int) -> tuple[list[Tie], dict[int, nn.Parameter]]:
    """Make one parameter of all copies that a stage has of one that other stages have too.

    Args:
        module: the module of the stage.
        ties: the parameters that several stages have.
        stage: the index of the stage.

    Returns:
        The ties, with the names by which ``named_parameters`` of this stage tells them; and for the ``id`` of each
        parameter that is gone, the one that has taken its place.

    Raises:
        ValueError: the stage does not show which of its parameters one is.
    """
    read = {name for node, names in _operations(module, "", {}) for name in names.values()}
    replaced: dict[int, nn.Parameter] = {}
    kept_ones: dict[str, nn.Parameter] = {}
    for tie in [tie for tie in ties if stage in tie.names]:
        everywhere = dict(module.named_parameters(remove_duplicate=False))
        name = tie.names[stage][0]
        same = _copies(name, everywhere, read)
        copies = {id(everywhere[other]): everywhere[other] for other in (*same, name)}
        kept = kept_ones[name] = everywhere[same[0]]
        for other, p in everywhere.items():
            if id(p) in copies and p is not kept:
                holder, _, attribute = other.rpartition(".")
                parameter_dict(module.get_submodule(holder))[attribute] = kept
                replaced[id(p)] = kept
    told = {id(p): name for name, p in module.named_parameters()}
    mine = {name: (told[id(p)], name) for name, p in kept_ones.items()}
    return [
        Tie({k: mine[n[0]] if k == stage else n for k, n in tie.names.items()}, tie.trained) for tie in ties
    ], replaced


def replace(optimizer: Any, replaced: Mapping[int, nn.Parameter]) -> None:
    """Give an optimizer that is there already the parameters that have taken others' places."""
    if not isinstance(optimizer, Optimizer) or not replaced:
        return
    seen: set[int] = set()
    for group in optimizer.param_groups:
        present = {id(p): p for p in (replaced.get(id(p), p) for p in group["params"])}
        group["params"] = [p for key, p in present.items() if key not in seen]
        seen |= present.keys()
    for p in [p for p in optimizer.state if id(p) in replaced]:
        del optimizer.state[p]


def _copies(name: str, parameters: Mapping[str, nn.Parameter], read: set[str]) -> list[str]:
    """The names by which a stage reads a parameter of the model."""
    p = parameters[name]
    varies = p.numel() > 1 and not torch.equal(p, p.flatten()[0].expand_as(p))  # as ones and zeros do not

    def is_copy(other: str) -> bool:
        q = parameters[other]
        same = q is p or plain(other) == plain(name)
        return same or (varies and q.shape == p.shape and q.dtype == p.dtype and torch.equal(q, p))

    found = [other for other in parameters if other in read and is_copy(other)]
    if not found:
        raise ValueError(
            f"{name} is a parameter of several stages, and of the parameters that this one reads none is it by name or value: two "
            "copies would be trained apart. Make the schedule before anything is trained, or give each stage its own "
            "parameter before pipeline(...) traces the model"
        )
    return found


# -- operations -----------------------------------------------------------------------------------------------


def _operations(module: nn.Module, prefix: str, given: Mapping[str, str]) -> Iterator[tuple[fx.Node, Names]]:
    """Every operation of a traced module, with the names of the parameters and buffers among what it is called with.

    Args:
        module: the stage's module, or a part of it.
        prefix: the name of the part, and a dot.
        given: for names of its inputs the parameters and buffers that they are.
    """
    graph = getattr(module, "graph", None)
    if not isinstance(graph, fx.Graph):
        return
    names: Names = {}
    for node in graph.nodes:
        if node.op == "placeholder" and node.name in given:
            names[node] = given[node.name]
        elif node.op == "get_attr":
            names[node] = prefix + node.target
        elif node.op == "call_module":
            yield from _inside(module, prefix, node.target, node.args, names)
        elif node.op == "call_function":
            yield node, {arg: names[arg] for arg in node.all_input_nodes if arg in names}
            # A region of autocast or no_grad is called with its graph, and what that takes.
            for place, arg in enumerate(node.args):
                if isinstance(arg, fx.Node) and arg.op == "get_attr":
                    yield from _inside(module, prefix, str(arg.target), node.args[place + 1 :], names)


def _inside(
    module: nn.Module, prefix: str, name: str, arguments: Sequence[Any], names: Names
) -> Iterator[tuple[fx.Node, Names]]:
    part = module
    for attribute in name.split("."):
        part = getattr(part, attribute)
    if isinstance(part, nn.Module) and isinstance(graph := getattr(part, "graph", None), fx.Graph):
        inputs = [node.name for node in graph.nodes if node.op == "placeholder"]
        given = {at: names[arg] for at, arg in zip(inputs, arguments, strict=False) if arg in names}
        yield from _operations(part, f"{prefix}{name}.", given)


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operation, by name."""
    described = operator_schema(node.target).arguments  # type: ignore[arg-type]
    defaults = {argument.name: argument.default_value for argument in described if argument.has_default_value()}
    return defaults | dict(zip([argument.name for argument in described], node.args, strict=False)) | node.kwargs


def _train_mode_alone(node: fx.Node, names: Names) -> str | None:
    """What an operation does that a model in eval mode mostly does not do, in words."""
    if not is_operator(node.target):
        return None
    given, what = _arguments(node), f"{node.target}"
    trains = [given[name] for name in ("train", "training", "use_input_stats") if name in given]
    rates = [given[name] for name in ("p", "dropout", "dropout_p") if name in given]
    if False in trains or (rates and not any(rates)):
        return None
    if "use_input_stats" in given and given.get("running_mean") is None:
        return None  # instance norm, which keeps no statistics, has those of the input in both modes
    if "running_mean" in given:
        return f"{what} takes statistics of the batch"
    if draws(node) or trains:
        return f"{what} draws random numbers"
    if written := _written(node, names):
        return f"{what} writes {written[0]}"
    return None


def _written(node: fx.Node, names: Names) -> list[str]:
    """The parameters and buffers that an operation writes."""
    if not is_operator(node.target):
        return []
    written = [a.name for a in operator_schema(node.target).arguments if a.alias_info and a.alias_info.is_write]
    given = _arguments(node)
    if given.get("training", given.get("use_input_stats")) is True:
        written += ["running_mean", "running_var"]  # which its schema does not say
    return [names[given[name]] for name in written if isinstance(given.get(name), fx.Node) and given[name] in names]
