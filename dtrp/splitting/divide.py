"""A traced model cut into parts, and the values that pass between them.

A value that a later part needs travels through all parts in between. A size that a tensor beside it has is read off the
tensor instead.

    part 0 -> [hidden, mask] -> part 1 -> [hidden, mask] -> part 2      part 1 need not know what the mask is for
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.passes.split_module import split_module

from ..tensors.torch_private import is_operator, writes_arguments
from ..typing import Tree
from .export import Traced, attribute, module_path, plain
from .points import draws
from .regions import in_regions


@dataclass(frozen=True)
class Source:
    """Where a value comes from.

    Args:
        kind: "in", a value that comes into the part; "made", one that the part makes; "weight"; or "constant".
        index: place among the values that come in, or among those that the part makes.
        name: name of the weight in the traced graph.
        constant: the constant.
    """

    kind: str
    index: int = 0
    name: str = ""
    constant: Any = None


@dataclass
class Part:
    """What one stage does in one mode.

    Args:
        graph: a function of values that come in and of weights; it holds no weights itself.
        sizes: (place, dimension) of tensors that come in: sizes that are read off them, and come in after them.
        arguments: sources of the graph's arguments.
        outputs: sources of the values that the part hands on.
        returns: in the last part, the tree that the model returns, with places in ``outputs`` as leaves.
        is_last: whether it is the last part.
    """

    graph: fx.GraphModule
    sizes: list[tuple[int, int]]
    arguments: list[Source]
    outputs: list[Source]
    returns: Tree = None
    is_last: bool = False


@dataclass(frozen=True)
class Use:
    """The use of a parameter, buffer or constant tensor of the traced graph in a stage.

    Args:
        name: name of the tensor in the traced graph.
        stage: stage that reads it.
        readers: names of the submodules that read it there.
    """

    name: str
    stage: int
    readers: frozenset[str]


def divide(
    traced: Traced, num_stages: int, stages: dict[fx.Node, int], senders: Mapping[str, int]
) -> tuple[list[Part], list[Use]]:
    """The parts of a model, and the uses of weights in them.

    Args:
        traced: the model's forward in one mode.
        num_stages: K.
        stages: stage of each operation; those that are added come in.
        senders: by name, the stage that holds each parameter whose value travels to other stages.
    """
    _copy_to_readers(traced.graph.graph, stages)
    _send_weights(traced.graph.graph, stages, senders)
    uses = _uses(traced.graph, stages)
    calls = _Calls(split_module(traced.graph, traced.graph, lambda node: stages[node]), traced.input_leaves)
    last = num_stages - 1
    # The last stage that needs each value; what the model returns is needed by the last.
    needed = {node: stage for stage in range(last + 1) for node in calls.arguments[stage]}
    needed |= {node: last for node in calls.outputs if isinstance(node, fx.Node)}
    travelling = sorted((node for node in needed if node in calls.made), key=lambda node: calls.made[node])

    parts = []
    # What comes in: the leaves of the example, then what the stage before hands on.
    incoming = {node: index for node, (stage, index) in calls.made.items() if stage < 0}
    sizes: list[tuple[int, int]] = []
    for stage in range(last):
        passing = [node for node in travelling if calls.made[node][0] <= stage < needed[node]]
        tensors = [node for node in passing if isinstance(calls.values[node], Tensor)]
        read_off = {node: found for node in passing if (found := _size_of(calls.values, node, tensors)) is not None}
        carried = [node for node in passing if node not in read_off]
        parts.append(calls.part(stage, incoming, sizes, carried))
        places = {node: place for place, node in enumerate(carried)}
        sizes = [(places[tensor], dim) for tensor, dim in read_off.values()]
        incoming = {**places, **{node: len(carried) + i for i, node in enumerate(read_off)}}
    parts.append(calls.part(last, incoming, sizes, calls.outputs))
    parts[-1].returns, parts[-1].is_last = traced.returns, True
    return parts, uses


class _Calls:
    """The graph that calls the parts, as `split_module` makes it.

    Args:
        whole: that graph.
        input_leaves: for each of its inputs, its place among the leaves of the example.

    Attributes:
        graphs: graph of each stage's part.
        arguments: nodes whose values each stage's part is called with.
        made: for each node, the stage that makes its value (-1: an input) and the place among the values that it makes.
        values: value of each node in the traced run, without data.
        outputs: nodes and constants that the model returns.
    """

    def __init__(self, whole: fx.GraphModule, input_leaves: Sequence[int]) -> None:
        self.graphs: dict[int, fx.GraphModule] = {}
        self.arguments: dict[int, list[fx.Node]] = {}
        self.made: dict[fx.Node, tuple[int, int]] = {}
        self.values: dict[fx.Node, Any] = {}
        leaves = iter(input_leaves)
        for node in whole.graph.nodes:
            value: Any = node
            if node.op == "placeholder":
                self.made[node] = (-1, next(leaves))
            elif node.op == "call_module":
                stage = int(str(node.target).removeprefix("submod_"))
                self.graphs[stage], self.arguments[stage] = getattr(whole, str(node.target)), list(node.args)
                value = _output(self.graphs[stage])
                if not isinstance(value, fx.Node):
                    continue
                self.made[node] = (stage, 0)
            elif node.target is operator.getitem:
                call, index = node.args
                stage = int(str(call.target).removeprefix("submod_"))
                self.made[node], value = (stage, index), _output(self.graphs[stage])[index]
            self.values[node] = value.meta.get("val")
        outputs = _output(whole)
        self.outputs = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]

    def part(
        self, stage: int, incoming: Mapping[fx.Node, int], sizes: list[tuple[int, int]], outputs: Sequence[Any]
    ) -> Part:
        """The part of a stage, given the place of each value that comes in."""

        def source(node: Any) -> Source:
            if not isinstance(node, fx.Node):
                return Source("constant", constant=node)
            if node.op == "get_attr":
                return Source("weight", name=str(node.target))
            if node in incoming:
                return Source("in", incoming[node])
            assert self.made[node][0] == stage
            return Source("made", self.made[node][1])

        return Part(
            _cleaned(self.graphs[stage]), sizes, list(map(source, self.arguments[stage])), list(map(source, outputs))
        )


def _uses(graph: fx.GraphModule, stages: Mapping[fx.Node, int]) -> list[Use]:
    uses = []
    for node in graph.graph.nodes:
        if node.op == "get_attr" and isinstance(attribute(graph, str(node.target)), Tensor):
            readers: dict[int, set[str]] = {}
            for user in node.users:
                if user in stages:
                    readers.setdefault(stages[user], set()).add(plain((module_path(user) or ("",))[-1]))
            uses += [Use(str(node.target), stage, frozenset(readers[stage])) for stage in sorted(readers)]
    return uses


def _copy_to_readers(graph: fx.Graph, stages: dict[fx.Node, int]) -> None:
    """Make what follows from sizes alone (positions, causal masks) in each stage that reads it: it need not travel."""
    light: dict[fx.Node, None] = {}
    for node in stages:
        if isinstance(node.meta.get("val"), (int, torch.SymInt)) or _is_light(node, light):
            light[node] = None
    for node in reversed(light):
        if not isinstance(node.meta.get("val"), Tensor):
            continue  # sizes are read off, or travel
        for stage in sorted({stages[user] for user in node.users if user in stages} - {stages[node]}):
            with graph.inserting_after(node):
                copied = graph.node_copy(node)
            stages[copied] = stage
            for user in list(node.users):
                if stages.get(user) == stage and user is not copied:
                    user.replace_input_with(node, copied)
        if not node.users:
            graph.erase_node(node)
            del stages[node]


def _send_weights(graph: fx.Graph, stages: dict[fx.Node, int], senders: Mapping[str, int]) -> None:
    """Let stages that do not hold a parameter read a value that the stage which holds it hands on."""
    for weight in graph.find_nodes(op="get_attr"):
        holder = senders.get(str(weight.target))
        readers = [user for user in weight.users if user in stages and stages[user] != holder]
        if holder is None or not readers:
            continue
        with graph.inserting_after(weight):
            value = graph.call_function(torch.ops.aten.alias.default, (weight,))
        value.meta = {"val": weight.meta["val"]}
        stages[value] = holder
        for reader in readers:
            reader.replace_input_with(weight, value)


def _is_light(node: fx.Node, light: Mapping[fx.Node, None]) -> bool:
    """Whether an operation makes a tensor of sizes and light tensors alone, without draws or writes in place."""
    return (
        is_operator(node.target)
        and isinstance(node.meta.get("val"), Tensor)
        and not any(writes_arguments(other.target) for other in (node, *node.users))
        and not draws(node)
        and all(source in light for source in node.all_input_nodes)
    )


def _size_of(values: Mapping[fx.Node, Any], node: fx.Node, tensors: Sequence[fx.Node]) -> tuple[fx.Node, int] | None:
    """A tensor and its dimension that has the size ``node`` for any number of samples."""
    wanted = values[node]
    for tensor in tensors if isinstance(wanted, torch.SymInt) else ():
        for dim, size in enumerate(values[tensor].shape):
            if isinstance(size, torch.SymInt) and size.node.expr == wanted.node.expr:
                return tensor, dim
    return None


def _output(graph: fx.GraphModule) -> Any:
    return next(node for node in reversed(graph.graph.nodes) if node.op == "output").args[0]


def _cleaned(graph: fx.GraphModule) -> fx.GraphModule:
    """The graph with its regions, and without records of the traced run, which hold tensors without data."""
    graph = in_regions(graph)
    for module in graph.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                node.meta = {}
            module.meta.clear()
    graph.recompile()
    return graph
