"""Where stages begin: at the submodules named, or at those that share the work best."""

from __future__ import annotations

import itertools
import math
import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..validation import nearest, unknown
from .chain_partition import partition_chain
from .export import attribute, module_path

_MEMORY = 16  # what an element written costs, in floating-point operations
_TOLERANCE = 1.5  # how much slower the slowest stage may be for a cut at whole blocks


def work_nodes(graph: fx.GraphModule) -> list[fx.Node]:
    """The operations, in the order of the forward."""
    return [node for node in graph.graph.nodes if node.op not in ("placeholder", "get_attr", "output")]


def plain(name: str) -> str:
    """The name of a submodule, of whichever call of it."""
    return ".".join(part.split("@")[0] for part in name.split("."))


def is_repeat(node: fx.Node) -> bool:
    """Whether it ran in a second call of some submodule, or a later one."""
    return any("@" in key for key in node.meta.get("nn_module_stack") or {})


def first_places(nodes: Sequence[fx.Node]) -> dict[str, int]:
    """The place among ``nodes`` at which each submodule begins."""
    places: dict[str, int] = {}
    for place, node in enumerate(nodes):
        for name in module_path(node):
            places.setdefault(plain(name), place)
    return places


def assign(graph: fx.GraphModule, points: Sequence[str]) -> dict[fx.Node, int]:
    """The stage of each operation.

    A stage begins with the first operation of its point. A submodule that is called again has its operations where they
    were the first time, or, where they need what comes later, there: so the two ways through a Siamese network
    are cut alike. In the same way what reads a weight of an earlier stage is done there, if it needs nothing later but what can be
    done there too: so T5's decoder has its embedding beside the encoder's, whose tensor it is, and makes its tokens of the labels
    there. An entry of what an operation returns is taken where it ran.

    Args:
        graph: a traced model.
        points: submodules, in the order of the forward.
    """
    nodes = work_nodes(graph)
    begins = [first_places(nodes)[point] for point in points]
    stages: dict[fx.Node, int] = {}
    owners: dict[Any, int] = {}  # of parameters and buffers
    for place, node in enumerate(nodes):
        inputs = [stages[arg] for arg in node.all_input_nodes if arg in stages]
        weights = [arg.target for arg in node.all_input_nodes if arg.op == "get_attr"]
        owned = [owners[weight] for weight in weights if weight in owners]
        stage = sum(place >= begin for begin in begins)
        if is_repeat(node) or node.target is operator.getitem:
            stage = max([*inputs, *owned, 0])
        elif owned and len(owned) == len(weights) and max(owned) < stage:
            before = _needed_behind(graph, node, max(owned), stages)
            if before is not None:
                stage = max(owned)
                stages.update(dict.fromkeys(before, stage))
                inputs = []
        stages[node] = max([stage, *inputs])
        for weight in weights:
            owners.setdefault(weight, stages[node])
    return stages


def _needed_behind(
    graph: fx.GraphModule, node: fx.Node, stage: int, stages: Mapping[fx.Node, int]
) -> list[fx.Node] | None:
    """What an operation needs that is done behind a stage, with all that touches it before the operation.

    Args:
        graph: a traced model.
        node: the operation.
        stage: where it is to be done.
        stages: those of the operations before it.

    Returns:
        None where that reads what is trained, or draws, and has to stay where it is.
    """
    found: dict[fx.Node, None] = {}
    waiting = list(node.all_input_nodes)
    while waiting:
        each = waiting.pop()
        if each in found or stages.get(each, 0) <= stage:
            continue
        held = [arg for arg in each.all_input_nodes if arg.op == "get_attr"]
        draws = isinstance(each.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in each.target.tags
        if draws or any(len(h.users) > 1 or isinstance(attribute(graph, str(h.target)), nn.Parameter) for h in held):
            return None
        found[each] = None
        waiting += [*each.all_input_nodes, *(user for user in each.users if user in stages)]
    return list(found)


def check_points(model: nn.Module, points: Iterable[str], *graphs: fx.GraphModule) -> list[str]:
    """The points as they were given, if they are submodules that run in this order.

    Raises:
        ValueError: an unknown name (with the nearest right one), one that runs nothing, or out of order.
    """
    points = list(points)
    known = [name for name, _ in model.named_modules()]
    for point in points:
        if point not in known or not point:
            raise ValueError(unknown_point(point, known))
    for graph in graphs:
        nodes = work_nodes(graph)
        places = first_places(nodes)
        for point in points:
            if point not in places:
                raise ValueError(
                    f"no stage can begin at {point!r}: none of its operations is in the trace; name the submodule after it"
                )
        tensors = (place for place, node in enumerate(nodes) if isinstance(node.meta.get("val"), Tensor))
        check_order(points, places, next(tensors, 0))
    return points


@dataclass(frozen=True)
class _Position:
    """A place where a stage may begin."""

    place: int
    name: str
    rank: int  # 0: an entry of a list of blocks; 1: a part of the model itself; 2: any submodule
    crossing: int  # elements of what passes there


def choose_points(model: nn.Module, num_stages: int, train: fx.GraphModule, evaluation: fx.GraphModule) -> list[str]:
    """Where to begin ``num_stages`` - 1 stages so that the slowest is as fast as it can be.

    A stage's work is what its operations take, in floating-point operations (and 16 for each element written). A stage
    begins at an entry of a `ModuleList` or `Sequential` where that costs the slowest stage at most half more; among
    cuts as good to a tenth, the one where the fewest elements pass. No parameter and no buffer is used on both sides of a
    cut, but those that are tied by the model under several names.

    Raises:
        ValueError: there are too few such places.
    """
    nodes = work_nodes(train)
    homes = _homes(nodes)
    work = [0.0] * (len(nodes) + 1)
    for node, home in zip(nodes, homes, strict=True):
        work[home] += cost(node)
    before = list(itertools.accumulate(work, initial=0.0))
    for spans in (homes, list(range(len(nodes)))):
        positions = _positions(model, nodes, spans, evaluation)
        if len(positions) < num_stages - 1:
            continue
        best = [_best([p for p in positions if p.rank <= rank], num_stages, before) for rank in (0, 1, 2)]
        slowest = best[2][0]
        chosen = next(names for worst, names in best if worst <= _TOLERANCE * slowest)
        if not _used_twice(model, train, chosen):
            return chosen
    raise ValueError(
        f"num_stages={num_stages} but this model can begin a stage at {len(positions)} places only, without a parameter on "
        f"both sides of a cut ({', '.join(p.name for p in positions) or 'none'}); pass num_stages<={len(positions) + 1}"
    )


def cost(node: fx.Node) -> float:
    """What an operation takes, in floating-point operations, roughly: the share of a stage's time matters, not the time."""
    value = node.meta.get("val")
    outputs = [t for t in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(t, Tensor)]
    written = sum(map(_numel, outputs))
    if not outputs or node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return float(_MEMORY * written)
    name = str(node.target._schema.name).split("::")[-1]
    shapes = [arg.meta["val"].shape for arg in node.all_input_nodes if isinstance(arg.meta.get("val"), Tensor)]
    flops = 0.0
    if name in ("matmul", "mm", "bmm"):
        flops = 2.0 * written * _size(shapes[0][-1])
    elif name == "scaled_dot_product_attention":
        flops = 4.0 * written * _size(shapes[1][-2])
    elif name != "embedding":
        weights = [arg.meta["val"] for arg in node.all_input_nodes if arg.op == "get_attr" and "val" in arg.meta]
        rows = (
            written / max(1, _size(outputs[0].shape[-1])) if name in ("lstm", "gru", "rnn_tanh", "rnn_relu") else None
        )
        for weight in weights:
            if isinstance(weight, Tensor) and weight.dim() > 1:
                flops += 2.0 * _numel(weight) * (rows if rows is not None else _numel(outputs[0]) / weight.shape[0])
    return flops + _MEMORY * written


def _size(n: int | torch.SymInt) -> int:
    """The size in the example, of one that may differ; 1 where the data decide."""
    return n if isinstance(n, int) else int(n.node.hint or 1)


def _numel(t: Tensor) -> int:
    return math.prod(_size(n) for n in t.shape)


def _homes(nodes: Sequence[fx.Node]) -> list[int]:
    """Where each operation belongs: its place, or, in a later call of a submodule, that of the first call."""
    places = first_places(nodes)
    return [places[plain(module_path(node)[-1])] if is_repeat(node) else place for place, node in enumerate(nodes)]


def _positions(
    model: nn.Module, nodes: Sequence[fx.Node], homes: Sequence[int], evaluation: fx.GraphModule
) -> list[_Position]:
    num_names = _num_names(model)
    place_of = {node: place for place, node in enumerate(nodes)}
    closed = [False] * (len(nodes) + 1)
    crossing = [0] * (len(nodes) + 2)
    for source in nodes:
        for arg in source.all_input_nodes:
            if arg.op != "get_attr":
                continue
            if num_names.get(str(arg.target), 1) > 1:
                continue
            used = [homes[place_of[user]] for user in arg.users if user in place_of]
            for place in range(min(used) + 1, max(used) + 1):
                closed[place] = True
    for place, node in enumerate(nodes):
        value = node.meta.get("val")
        last = max((place_of.get(user, len(nodes)) for user in node.users), default=place)
        if isinstance(value, Tensor) and last > place:
            crossing[place + 1] += _numel(value)
            crossing[last + 1] -= _numel(value)
    crossing = list(itertools.accumulate(crossing))
    # The first stage has a parameter, if the model has any.
    reads = [place for place, node in enumerate(nodes) if any(arg.op == "get_attr" for arg in node.all_input_nodes)]
    least = reads[0] + 1 if reads else 1
    blocks = _blocks(model)
    other = first_places(work_nodes(evaluation))
    found: dict[int, _Position] = {}
    for name, place in first_places(nodes).items():
        if place < least or closed[place] or not other.get(name) or is_repeat(nodes[place]):
            continue
        rank = 0 if name in blocks else 1 if "." not in name else 2
        position = _Position(place, name, rank, crossing[place])
        known = found.get(place)
        if known is None or (rank, name.count(".")) < (known.rank, known.name.count(".")):
            found[place] = position
    return [found[place] for place in sorted(found)]


def _blocks(model: nn.Module) -> set[str]:
    """The entries of the outermost lists of modules."""
    blocks: set[str] = set()
    for name, module in model.named_modules():
        inside = any(name == block or name.startswith(f"{block}.") for block in blocks)
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1 and not inside:
            blocks.update(f"{name}.{entry}" if name else entry for entry in module._modules)
    return blocks


def _best(positions: Sequence[_Position], num_stages: int, before: Sequence[float]) -> tuple[float, list[str]]:
    """The cuts whose slowest stage is fastest, and of those as good to a tenth the one where least passes, evenly."""
    bounds = [0, *(p.place for p in positions), len(before) - 1]

    def work(first: int, end: int, stage: int) -> float:
        return before[bounds[end]] - before[bounds[first]]

    fastest, _ = partition_chain(len(positions) + 1, num_stages, work)
    slowest, cuts = partition_chain(
        len(positions) + 1,
        num_stages,
        work,
        allowed=lambda *part: work(*part) <= 1.1 * fastest,
        crossing=[0, *(p.crossing for p in positions)],
    )
    return slowest, [positions[cut - 1].name for cut in cuts]


def _used_twice(model: nn.Module, graph: fx.GraphModule, points: Sequence[str]) -> bool:
    """Whether a parameter or buffer that has one name would be in two stages."""
    num_names = _num_names(model)
    stages = assign(graph, points)
    for node in graph.graph.nodes:
        own = node.op == "get_attr" and num_names.get(str(node.target)) == 1
        if own and len({stages[user] for user in node.users if user in stages}) > 1:
            return True
    return False


def _num_names(model: nn.Module) -> dict[str, int]:
    """By each name of a parameter or buffer, how many names it has."""
    tensors = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    counts = Counter(id(tensor) for tensor in tensors.values())
    return {name: counts[id(tensor)] for name, tensor in tensors.items()}


def unknown_point(point: str, known: Iterable[str]) -> str:
    """The message for a submodule in ``points``: of a large model's names, those as deep as the nearest tell most."""
    known = [name for name in known if name]
    depth = (nearest(point, known) or point).count(".")
    level = [name for name in known if name.count(".") == depth] or known
    text = unknown("submodule in points:", point, level)
    return text if len(text) < 1000 else text.split("known:")[0] + f"known at this depth: {', '.join(level[:20])}, ..."


def check_order(points: Sequence[str], places: Mapping[str, int], first: int) -> None:
    """Refuse points that are not in the order of the forward, or leave nothing for the first stage.

    Args:
        points: submodules.
        places: where each begins.
        first: where the model does.
    """
    if points and places[points[0]] <= first:
        raise ValueError(
            f"points={list(points)}: {points[0]!r} is where the model itself begins, and stage 0 would be empty; leave it out"
        )
    for a, b in itertools.pairwise(points):
        if places[a] >= places[b]:
            same = places[a] == places[b]
            raise ValueError(
                f"points={list(points)}: {b!r} begins {'with' if same else 'before'} {a!r}; "
                + ("name one of the two" if same else "put them in the order of the forward")
            )
