"""Where stages begin: at the submodules that the caller names, or at those that divide the work best."""

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

from ..tensors.torch_private import is_operator, module_dict, operator_schema
from ..validation import nearest, unknown
from .chain_partition import partition_chain
from .export import attribute, module_path

_MEMORY = 16  # cost of an element written, in floating-point operations
_TOLERANCE = 1.5  # how much slower the slowest stage may be for a cut at whole blocks


def work_nodes(graph: fx.GraphModule) -> list[fx.Node]:
    """The operations, in the order of the forward."""
    return [node for node in graph.graph.nodes if node.op not in ("placeholder", "get_attr", "output")]


def plain(name: str) -> str:
    """The name of a submodule without the number of the call, which torch.export adds to later ones."""
    return ".".join(part.split("@")[0] for part in name.split("."))


def is_repeat(node: fx.Node) -> bool:
    """Whether it ran in a second call of some submodule, or a later one."""
    return any("@" in key for key in node.meta.get("nn_module_stack") or {})


def draws(node: fx.Node) -> bool:
    """Whether an operation draws random numbers."""
    return is_operator(node.target) and torch.Tag.nondeterministic_seeded in node.target.tags


def weights_of(node: fx.Node) -> list[fx.Node]:
    """The parameters, buffers and constants that an operation reads."""
    return [arg for arg in node.all_input_nodes if arg.op == "get_attr"]


def first_places(nodes: Sequence[fx.Node]) -> dict[str, int]:
    """The place among ``nodes`` at which each submodule begins."""
    places: dict[str, int] = {}
    for place, node in enumerate(nodes):
        for name in module_path(node):
            places.setdefault(plain(name), place)
    return places


def assign(graph: fx.GraphModule, points: Sequence[str]) -> dict[fx.Node, int]:
    """The stage of each operation.

    A stage begins with the first operation of its point. Three kinds of operations go elsewhere:

    - A submodule that is called again has its operations where they were in the first call, or, where they need the
      result of a later stage, in that stage. So the two ways through a Siamese network are cut alike.
    - An operation that reads a weight of an earlier stage goes to that stage, if everything else that it needs can be
      done there too. So T5's decoder has its embedding beside the encoder's, whose tensor it is, and makes its tokens
      of the labels there.
    - An entry of what an operation returns is taken in that operation's stage.

    Args:
        graph: a traced model.
        points: submodules, in the order of the forward.
    """
    nodes = work_nodes(graph)
    begins = [first_places(nodes)[point] for point in points]
    stages: dict[fx.Node, int] = {}
    owners: dict[Any, int] = {}  # stages of parameters and buffers
    for place, node in enumerate(nodes):
        inputs = [stages[arg] for arg in node.all_input_nodes if arg in stages]
        weights = [arg.target for arg in weights_of(node)]
        owned = [owners[weight] for weight in weights if weight in owners]
        stage = sum(place >= begin for begin in begins)
        if is_repeat(node) or node.target is operator.getitem:
            stage = max([*inputs, *owned, 0])
        elif owned and len(owned) == len(weights) and max(owned) < stage:
            moved = _movable_inputs(graph, node, max(owned), stages)
            if moved is not None:
                stage = max(owned)
                stages.update(dict.fromkeys(moved, stage))
                inputs = []
        stages[node] = max([stage, *inputs])
        for weight in weights:
            owners.setdefault(weight, stages[node])
    return stages


def _movable_inputs(
    graph: fx.GraphModule, node: fx.Node, stage: int, stages: Mapping[fx.Node, int]
) -> list[fx.Node] | None:
    """The operations of later stages that have to move to ``stage`` with ``node``, which needs their results.

    Args:
        graph: a traced model.
        node: operation to move.
        stage: stage to which it moves.
        stages: stages of the operations before it.

    Returns:
        These operations, with all that read or write the same; None where one of them has to stay: it reads what is
        trained, or draws random numbers.
    """
    found: dict[fx.Node, None] = {}
    waiting = list(node.all_input_nodes)
    while waiting:
        needed = waiting.pop()
        if needed in found or stages.get(needed, 0) <= stage:
            continue
        trains = any(isinstance(attribute(graph, str(w.target)), nn.Parameter) for w in weights_of(needed))
        if draws(needed) or trains or any(len(w.users) > 1 for w in weights_of(needed)):
            return None
        found[needed] = None
        waiting += [*needed.all_input_nodes, *(user for user in needed.users if user in stages)]
    return list(found)


def check_known(model: nn.Module, points: Iterable[str]) -> None:
    """Refuse points that are no submodules of the model."""
    known = [name for name, _ in model.named_modules()]
    for point in points:
        if point not in known or not point:
            raise ValueError(unknown_point(point, known))


def check_points(model: nn.Module, points: Iterable[str], *graphs: fx.GraphModule) -> list[str]:
    """The points as they were given, if they are submodules that run in this order.

    Raises:
        ValueError: an unknown name (with the nearest right one), one that runs nothing, or out of order.
    """
    points = list(points)
    check_known(model, points)
    for nodes in map(work_nodes, graphs):
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
    """A place where a stage may begin.

    Args:
        place: place among the operations.
        name: submodule that begins there.
        rank: 0 for an entry of a list of blocks, 1 for a direct child of the model, 2 for any other submodule.
        crossing: number of elements of the tensors that a later operation reads across this place.
    """

    place: int
    name: str
    rank: int
    crossing: int


def choose_points(model: nn.Module, num_stages: int, train: fx.GraphModule, evaluation: fx.GraphModule) -> list[str]:
    """Choose where ``num_stages`` - 1 stages begin so that the slowest stage is as fast as it can be.

    The work of a stage is that of its operations, in floating-point operations (and 16 for each element written). A
    stage begins at an entry of a `ModuleList` or `Sequential` where that costs the slowest stage at most half more;
    among cuts that are equally good within a tenth, the one where the fewest elements pass. No parameter and no buffer
    is used on both sides of a cut, but those that are tied by the model under several names.

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
        chosen = next(names for slowest, names in best if slowest <= _TOLERANCE * best[2][0])
        if not _are_used_twice(model, train, chosen):
            return chosen
    raise ValueError(
        f"num_stages={num_stages} but this model can begin a stage at {len(positions)} places only, without a parameter on "
        f"both sides of a cut ({', '.join(p.name for p in positions) or 'none'}); pass num_stages<={len(positions) + 1}"
    )


def cost(node: fx.Node) -> float:
    """A rough cost of an operation in floating-point operations: shares of the whole matter, not the time."""
    value = node.meta.get("val")
    outputs = [t for t in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(t, Tensor)]
    written = sum(map(_numel, outputs))
    name = operator_schema(node.target).name.split("::")[-1] if outputs and is_operator(node.target) else "embedding"
    shapes = [arg.meta["val"].shape for arg in node.all_input_nodes if isinstance(arg.meta.get("val"), Tensor)]
    flops = 0.0
    if name in ("matmul", "mm", "bmm"):
        flops = 2.0 * written * _size(shapes[0][-1])
    elif name == "scaled_dot_product_attention":
        flops = 4.0 * written * _size(shapes[1][-2])
    elif name != "embedding":
        is_recurrent = name in ("lstm", "gru", "rnn_tanh", "rnn_relu")
        rows = written / max(1, _size(outputs[0].shape[-1])) if is_recurrent else None
        for weight in (arg.meta.get("val") for arg in weights_of(node)):
            if isinstance(weight, Tensor) and weight.dim() > 1:
                flops += 2.0 * _numel(weight) * (rows if rows is not None else _numel(outputs[0]) / weight.shape[0])
    return flops + _MEMORY * written


def _size(n: int | torch.SymInt) -> int:
    """The size in the example, of one that may differ; 1 where the data decide."""
    return n if isinstance(n, int) else int(n.node.hint or 1)


def _numel(t: Tensor) -> int:
    return math.prod(map(_size, t.shape))


def _homes(nodes: Sequence[fx.Node]) -> list[int]:
    """The place of each operation; in a later call of a submodule the place where the first call begins."""
    places = first_places(nodes)
    return [places[plain(module_path(node)[-1])] if is_repeat(node) else place for place, node in enumerate(nodes)]


def _positions(
    model: nn.Module, nodes: Sequence[fx.Node], homes: Sequence[int], evaluation: fx.GraphModule
) -> list[_Position]:
    """The places where a stage may begin, in order."""
    num_names = _num_names(model)
    place_of = {node: place for place, node in enumerate(nodes)}
    closed: set[int] = set()  # a weight is used on both sides
    for weight in {weight for node in nodes for weight in weights_of(node)}:
        if num_names.get(str(weight.target), 1) == 1:
            used = [homes[place_of[user]] for user in weight.users if user in place_of]
            closed.update(range(min(used) + 1, max(used) + 1))
    changes = [0] * (len(nodes) + 2)  # of the number of elements that pass
    for place, node in enumerate(nodes):
        value = node.meta.get("val")
        last = max((place_of.get(user, len(nodes)) for user in node.users), default=place)
        if isinstance(value, Tensor) and last > place:
            changes[place + 1] += _numel(value)
            changes[last + 1] -= _numel(value)
    crossing = list(itertools.accumulate(changes))
    # The first stage has a parameter, if the model has any.
    least = next((place for place, node in enumerate(nodes) if weights_of(node)), 0) + 1
    blocks, other = _blocks(model), first_places(work_nodes(evaluation))
    candidates = [
        _Position(place, name, 0 if name in blocks else 1 if "." not in name else 2, crossing[place])
        for name, place in first_places(nodes).items()
        if place >= least and place not in closed and other.get(name) and not is_repeat(nodes[place])
    ]
    found: dict[int, _Position] = {}
    for position in sorted(candidates, key=lambda p: (p.place, p.rank, p.name.count("."))):
        found.setdefault(position.place, position)
    return list(found.values())


def _blocks(model: nn.Module) -> set[str]:
    """The entries of the outermost lists of modules."""
    blocks: set[str] = set()
    for name, module in model.named_modules():
        inside = any(name == block or name.startswith(f"{block}.") for block in blocks)
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1 and not inside:
            blocks.update(f"{name}.{entry}" if name else entry for entry in module_dict(module))
    return blocks


def _best(positions: Sequence[_Position], num_stages: int, before: Sequence[float]) -> tuple[float, list[str]]:
    """The cuts whose slowest stage is fastest; of those equally good within a tenth the ones where least passes."""
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


def _are_used_twice(model: nn.Module, graph: fx.GraphModule, points: Sequence[str]) -> bool:
    """Whether a parameter or buffer that has one name would be in two stages."""
    num_names, stages = _num_names(model), assign(graph, points)
    weights = [node for node in graph.graph.nodes if node.op == "get_attr" and num_names.get(str(node.target)) == 1]
    return any(len({stages[user] for user in weight.users if user in stages}) > 1 for weight in weights)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a model by name; a tensor that has several names comes under each."""
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def _num_names(model: nn.Module) -> dict[str, int]:
    """The number of names of each parameter and buffer, by each of its names."""
    tensors = named_tensors(model)
    counts = Counter(map(id, tensors.values()))
    return {name: counts[id(tensor)] for name, tensor in tensors.items()}


def unknown_point(point: str, known: Iterable[str]) -> str:
    """The message for an unknown submodule; of a large model's names it lists those as deep as the nearest."""
    known = [name for name in known if name]
    depth = (nearest(point, known) or point).count(".")
    level = [name for name in known if name.count(".") == depth] or known
    text = unknown("submodule in points:", point, level)
    return text if len(text) < 1000 else text.split("known:")[0] + f"known at this depth: {', '.join(level[:20])}, ..."


def check_order(points: Sequence[str], places: Mapping[str, int], first: int) -> None:
    """Refuse points that are not in the order of the forward, or leave nothing for the first stage.

    Args:
        points: names of submodules.
        places: place where each submodule begins.
        first: place where the model begins.
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
