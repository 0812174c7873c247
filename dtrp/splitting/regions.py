"""Regions of a forward in which `torch.no_grad`, `torch.autocast` and the like hold.

torch.export would make one operation of each region. The passes that do so are left out here, so that marks remain
where regions begin and end, and every operation records its region: a stage may then begin inside of a region, and each
stage runs its operations in their regions again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.passes.split_module import split_module

from ..tensors.torch_private import SET_GRAD_ENABLED, enter_autocast, exit_autocast, region_passes

Autocast = tuple[str, torch.dtype, bool]  # type of device, dtype, whether it is enabled


@dataclass(frozen=True)
class Region:
    """The region of an operation.

    Args:
        has_grad: whether autograd records there.
        autocasts: the enclosing `torch.autocast` contexts, outermost first.
    """

    has_grad: bool = True
    autocasts: tuple[Autocast, ...] = ()


_PLAIN = Region()


@contextmanager
def replaced(owner: Any, **members: Any) -> Iterator[None]:
    """Context in which ``owner`` has these members in place of its own ones."""
    before = {name: vars(owner).get(name, getattr(owner, name)) for name in members}
    try:
        for name, member in members.items():
            setattr(owner, name, member)
        yield
    finally:
        for name, member in before.items():
            setattr(owner, name, member)


@contextmanager
def marked() -> Iterator[None]:
    """Context in which torch.export leaves the marks of regions in the graph.

    It leaves none of inference mode, which is therefore traced as the mode without gradients.
    """

    def enter(mode: Any) -> None:
        mode._had_grad = torch.is_grad_enabled()
        torch.set_grad_enabled(not mode.mode)

    def leave(mode: Any, *error: object) -> None:
        torch.set_grad_enabled(mode._had_grad)

    def unchanged(graph: fx.GraphModule, signature: Any) -> tuple[fx.GraphModule, Any]:
        return graph, signature

    with ExitStack() as stack:
        stack.enter_context(replaced(torch.inference_mode, __enter__=enter, __exit__=leave))
        for module in region_passes():
            stack.enter_context(replaced(module, **{module.__name__.rpartition(".")[2]: unchanged}))
        yield


def record_regions(graph: fx.Graph) -> None:
    """Record the region of each operation in its ``meta``, and remove the marks."""
    has_grad = True
    autocasts: dict[fx.Node, Autocast] = {}  # by the marks where they begin
    marks = []
    for node in graph.nodes:
        if node.target is SET_GRAD_ENABLED:
            has_grad = bool(node.args[0])
        elif node.target is enter_autocast:
            autocasts[node] = node.args[:3]
        elif node.target is exit_autocast:
            del autocasts[node.args[0]]
        else:
            node.meta["region"] = Region(has_grad, tuple(autocasts.values()))
            continue
        marks.append(node)
    for node in reversed(marks):
        graph.erase_node(node)


def in_regions(graph: fx.GraphModule) -> fx.GraphModule:
    """The graph with the operations of each region in a graph of their own, which `run_within` runs."""
    nodes = [node for node in graph.graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    runs = itertools.groupby(nodes, lambda node: node.meta.get("region", _PLAIN))
    groups = [(region, list(operations)) for region, operations in runs]
    if all(region == _PLAIN for region, _ in groups):
        return graph
    places = {node: place for place, (_, operations) in enumerate(groups) for node in operations}
    whole = split_module(graph, graph, places.__getitem__, keep_original_order=True)
    for node in whole.graph.find_nodes(op="call_module"):
        region, _ = groups[int(str(node.target).removeprefix("submod_"))]
        if region != _PLAIN:
            with whole.graph.inserting_before(node):
                inner = whole.graph.get_attr(node.target)
                arguments = (region.has_grad, region.autocasts, inner, *node.args)
                node.replace_all_uses_with(whole.graph.call_function(run_within, arguments))
            whole.graph.erase_node(node)
    whole.recompile()
    return whole


def run_within(has_grad: bool, autocasts: tuple[Autocast, ...], part: fx.GraphModule, *arguments: Any) -> Any:
    """Run a part in its region."""
    if autocasts:  # not an ExitStack, which torch.compile may not know
        with torch.autocast(*autocasts[0]):
            return run_within(has_grad, autocasts[1:], part, *arguments)
    with torch.no_grad() if not has_grad else nullcontext():
        return part(*arguments)
