"""A traced model cut into parts, and what passes between them.

A value that a later part needs travels through all parts in between. A size that a tensor beside it has is read off the
tensor instead.

    part 0 -> [hidden, mask] -> part 1 -> [hidden, mask] -> part 2      part 1 need not know what the mask is for
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.passes.split_module import split_module

from .export import Traced, attribute, module_path
from .points import assign, plain
from .regions import in_regions


@dataclass(frozen=True)
class Source:
    """Where a value comes from: what has come in, what the part makes, a weight, or a constant.

    Args:
        kind: which of them.
        index: of what has come in, or of what the part makes.
        name: of the weight, in the traced graph.
        constant: the constant.
    """

    kind: str  # "in", "made", "weight", "constant"
    index: int = 0
    name: str = ""
    constant: Any = None


@dataclass
class Part:
    """What one stage does in one mode.

    Args:
        graph: a function of what came in and of weights; it holds none itself.
        sizes: (place, dimension) of what came in: sizes that are read off, and come in after it.
        arguments: of the graph.
        outputs: what the part hands on.
        returns: the tree of the outputs' places that the model returns, in the last part.
        is_last: whether it is that.
    """

    graph: fx.GraphModule
    sizes: list[tuple[int, int]]
    arguments: list[Source]
    outputs: list[Source]
    returns: Any = None
    is_last: bool = False


@dataclass(frozen=True)
class Use:
    """A parameter, buffer or constant tensor of the traced graph, in a stage, by the submodules that read it."""

    name: str
    stage: int
    readers: frozenset[str]


def divide(traced: Traced, points: Sequence[str]) -> tuple[list[Part], list[Use]]:
    """The parts, and who uses which weights."""
    stages = assign(traced.graph, points)
    _make_where_used(traced.graph.graph, stages)
    num_stages = len(points) + 1
    uses = [
        Use(str(node.target), stage, frozenset(
            plain(module_path(user)[-1]) if module_path(user) else "" for user in node.users if stages.get(user) == stage
        ))
        for node in traced.graph.graph.nodes
        if node.op == "get_attr" and isinstance(attribute(traced.graph, str(node.target)), Tensor)
        for stage in sorted({stages[user] for user in node.users if user in stages})
    ]  # fmt: skip
    whole = split_module(traced.graph, traced.graph, lambda node: stages[node])

    # Each value by its node in the graph that calls the parts.
    made: dict[fx.Node, tuple[int, int]] = {}  # (stage, which of its outputs); stage -1: an input
    values: dict[fx.Node, Any] = {}
    arguments: dict[int, list[fx.Node]] = {k: [] for k in range(num_stages)}
    graphs: dict[int, fx.GraphModule] = {}
    outputs: list[Any] = []
    inputs = 0
    for node in whole.graph.nodes:
        if node.op == "placeholder":
            made[node] = (-1, traced.input_leaves[inputs])
            values[node] = node.meta.get("val")
            inputs += 1
        elif node.op == "call_module":
            stage = int(str(node.target).removeprefix("submod_"))
            graphs[stage] = getattr(whole, str(node.target))
            arguments[stage] = list(node.args)
            result = _output(graphs[stage])
            if isinstance(result, fx.Node):
                made[node], values[node] = (stage, 0), result.meta.get("val")
        elif node.op == "call_function" and node.target is operator.getitem:
            call, index = node.args
            stage = int(str(call.target).removeprefix("submod_"))
            made[node], values[node] = (stage, index), _output(graphs[stage])[index].meta.get("val")
        elif node.op == "output":
            outputs = list(node.args[0]) if isinstance(node.args[0], (tuple, list)) else [node.args[0]]

    # The last stage that needs each value; what the model returns is needed by the last.
    needed: dict[fx.Node, int] = {}
    for stage in range(num_stages):
        for node in arguments[stage]:
            needed[node] = stage
    for node in outputs:
        if isinstance(node, fx.Node):
            needed[node] = num_stages - 1
    travelling = sorted((node for node in needed if node in made), key=lambda node: made[node])

    parts = []
    # What comes in: the leaves of the example, then what the stage before hands on.
    incoming: dict[fx.Node, int] = {node: index for node, (stage, index) in made.items() if stage < 0}
    sizes: list[tuple[int, int]] = []
    for stage in range(num_stages):
        graph = graphs.get(stage)
        assert graph is not None, "every stage begins with an operation of its own"

        def source(node: Any, stage: int = stage, incoming: dict[fx.Node, int] = incoming) -> Source:
            if not isinstance(node, fx.Node):
                return Source("constant", constant=node)
            if node.op == "get_attr":
                return Source("weight", name=str(node.target))
            if node in incoming:
                return Source("in", incoming[node])
            assert made[node][0] == stage
            return Source("made", made[node][1])

        given = [source(node) for node in arguments[stage]]
        if stage == num_stages - 1:
            parts.append(Part(_cleaned(graph), sizes, given, [source(node) for node in outputs], traced.returns, True))
            break
        passing = [node for node in travelling if made[node][0] <= stage < needed[node]]
        tensors = [node for node in passing if isinstance(values[node], Tensor)]
        read = {node: found for node in passing if (found := _read_off(values[node], tensors, values)) is not None}
        carried = [node for node in passing if node not in read]
        parts.append(Part(_cleaned(graph), sizes, given, [source(node) for node in carried]))
        places = {node: place for place, node in enumerate(carried)}
        sizes = [(places[tensor], dim) for tensor, dim in read.values()]
        incoming = {**places, **{node: len(carried) + i for i, node in enumerate(read)}}
    return parts, uses


def _make_where_used(graph: fx.Graph, stages: dict[fx.Node, int]) -> None:
    """What follows from sizes alone (positions, causal masks) is made in each stage that reads it, and does not travel."""
    light: list[fx.Node] = []
    for node in list(stages):
        if isinstance(node.meta.get("val"), (int, torch.SymInt)) or _is_light(node, light):
            light.append(node)
    heavy = {
        node for node in light if not isinstance(node.meta.get("val"), Tensor)
    }  # sizes: they are read off, or travel
    for node in reversed(light):
        if node in heavy:
            continue
        elsewhere = sorted({stages[user] for user in node.users if user in stages} - {stages[node]})
        for stage in elsewhere:
            with graph.inserting_after(node):
                copied = graph.node_copy(node)
            stages[copied] = stage
            for user in list(node.users):
                if stages.get(user) == stage and user is not copied:
                    user.replace_input_with(node, copied)
        if not node.users:
            graph.erase_node(node)
            del stages[node]


def _is_light(node: fx.Node, light: Sequence[fx.Node]) -> bool:
    """Whether an operation reads nothing but sizes and what follows from them, draws nothing, and nobody writes it."""
    if not isinstance(node.target, torch._ops.OpOverload) or not isinstance(node.meta.get("val"), Tensor):
        return False
    written = any(
        isinstance(user.target, torch._ops.OpOverload) and user.target._schema.is_mutable for user in node.users
    )
    return (
        not written
        and not node.target._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in node.target.tags
        and all(source in light for source in node.all_input_nodes)
    )


def _read_off(value: Any, tensors: Sequence[fx.Node], values: dict[fx.Node, Any]) -> tuple[fx.Node, int] | None:
    """A tensor and its dimension that is this size for any number of samples."""
    if not isinstance(value, torch.SymInt):
        return None
    for node in tensors:
        for dim, size in enumerate(values[node].shape):
            if isinstance(size, torch.SymInt) and size.node.expr == value.node.expr:
                return node, dim
    return None


def _output(graph: fx.GraphModule) -> Any:
    return next(node for node in reversed(graph.graph.nodes) if node.op == "output").args[0]


def _cleaned(graph: fx.GraphModule) -> fx.GraphModule:
    """In its regions, and without what was known of the traced run, which holds tensors without data."""
    graph = in_regions(graph)
    for module in graph.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                node.meta = {}
            module.meta.clear()
    graph.recompile()
    return graph
