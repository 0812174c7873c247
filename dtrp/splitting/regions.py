"""Regions of a forward: where `torch.no_grad`, `torch.autocast` and the like hold.

torch.export would make one operation of each region. Here it leaves marks where regions begin and end, and every operation
is told its region: a stage may then begin inside one, and each stage runs its operations in their regions again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._export.passes import replace_autocast_with_hop_pass, replace_set_grad_with_hop_pass
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx.passes.split_module import split_module

Autocast = tuple[str, torch.dtype, bool]  # type of device, dtype, whether it is enabled


@dataclass(frozen=True)
class Region:
    """Where an operation ran.

    Args:
        has_grad: whether autograd records there.
        autocasts: of the regions of `torch.autocast` around it, outermost first.
    """

    has_grad: bool = True
    autocasts: tuple[Autocast, ...] = ()


_PLAIN = Region()


@contextmanager
def replaced(owner: Any, **members: Any) -> Iterator[None]:
    """Within it ``owner`` has these members for its own."""
    before = {name: owner.__dict__[name] for name in members}
    try:
        for name, member in members.items():
            setattr(owner, name, member)
        yield
    finally:
        for name, member in before.items():
            setattr(owner, name, member)


@contextmanager
def marked() -> Iterator[None]:
    """Within it torch.export leaves the marks of regions where they are.

    Inference mode, of which it keeps nothing, is the mode without gradients.
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
        for module in (replace_autocast_with_hop_pass, replace_set_grad_with_hop_pass):
            stack.enter_context(replaced(module, **{module.__name__.rpartition(".")[2]: unchanged}))
        yield


def tell_regions(graph: fx.Graph) -> None:
    """Each operation is told its region, in its ``meta``, and the marks go."""
    has_grad = True
    autocasts: dict[fx.Node, Autocast] = {}  # by the marks where they begin
    marks = []
    for node in graph.nodes:
        if node.target is torch._C._set_grad_enabled:
            has_grad = bool(node.args[0])
        elif node.target is _enter_autocast:
            autocasts[node] = node.args[:3]
        elif node.target is _exit_autocast:
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
    groups = [
        (region, list(members))
        for region, members in itertools.groupby(nodes, lambda node: node.meta.get("region", _PLAIN))
    ]
    if all(region == _PLAIN for region, _ in groups):
        return graph
    places = {node: place for place, (_, members) in enumerate(groups) for node in members}
    whole = split_module(graph, graph, places.__getitem__, keep_original_order=True)
    for node in list(whole.graph.nodes):
        if node.op != "call_module":
            continue
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
    """What a part makes of its arguments in its region."""
    if autocasts:
        device_type, dtype, enabled = autocasts[0]
        with torch.autocast(device_type, dtype, enabled):
            return run_within(has_grad, autocasts[1:], part, *arguments)
    if has_grad:
        return part(*arguments)
    with torch.no_grad():
        return part(*arguments)
