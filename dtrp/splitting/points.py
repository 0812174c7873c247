"""Where stages begin: at the submodules that the caller names, or at those that divide the work best."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from ..tensors.torch_private import is_operator, module_dict, operator_schema
from ..validation import nearest, unknown
from .chain_partition import partition_chain
from .export import attribute, module_path, plain
from .weights import Weights, repeats_of, weights_of

_MEMORY = 16  # cost of an element written, in floating-point operations
_TOLERANCE = 1.5  # how much slower the slowest stage may be for a cut at whole blocks
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_UNEVEN = 2.5  # how many even shares of the work of a stage are warned of,
_MUCH = 0.9  # or this share


def work_nodes(graph: fx.GraphModule) -> list[fx.Node]:
    """The operations, in the order of the forward."""
    return [node for node in graph.graph.nodes if node.op not in ("placeholder", "get_attr", "output")]


def draws(node: fx.Node) -> bool:
    """Whether an operation draws random numbers."""
    return is_operator(node.target) and torch.Tag.nondeterministic_seeded in node.target.tags


def depend_on_trained(graph: fx.GraphModule) -> set[fx.Node]:
    """The operations whose result depends on a parameter."""
    found: set[fx.Node] = set()
    for node in work_nodes(graph):
        read = [attribute(graph, str(weight.target)) for weight in weights_of(node)]
        if any(isinstance(t, nn.Parameter) for t in read) or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def first_places(nodes: Sequence[fx.Node]) -> dict[str, int]:
    """The place among ``nodes`` at which each submodule begins."""
    places: dict[str, int] = {}
    for place, node in enumerate(nodes):
        for name in module_path(node):
            places.setdefault(plain(name), place)
    return places


def assign(graph: fx.GraphModule, points: Sequence[str], weights: Weights) -> dict[fx.Node, int]:
    """The stage of each operation.

    A stage begins with the first operation of its point. Three kinds of operations go elsewhere:

    - A submodule with weights that is called again has its operations where they were in the first call, or, where they
      need the result of a later stage, in that stage. So the two ways through a Siamese network are cut alike. Random
      numbers that it draws from sizes alone are drawn where they are used.
    - An operation that reads a weight of an earlier stage goes to that stage, if it needs nothing else that is trained,
      draws no random numbers, and its own stage cannot hold the weight too. So T5's decoder has its embedding beside
      the encoder's, whose tensor it is, and makes its tokens of the labels there.
    - An entry of what an operation returns is taken in that operation's stage.

    Args:
        graph: a traced model.
        points: submodules, in the order of the forward.
        weights: how stages can share the model's tensors.
    """
    nodes, trained, repeats = work_nodes(graph), depend_on_trained(graph), repeats_of(graph)
    begins = [first_places(nodes)[point] for point in points]
    stages: dict[fx.Node, int] = {}
    owners: dict[str, int] = {}  # stages of parameters and buffers
    for place, node in enumerate(nodes):
        needed = [arg for arg in node.all_input_nodes if arg in stages]
        inputs = [stages[arg] for arg in needed]
        read = [str(arg.target) for arg in weights_of(node)]
        read = [name for name in read if weights.sharing(name) != "held by all"]
        owned = [owners[name] for name in read if name in owners]
        stage = sum(place >= begin for begin in begins)
        if node in repeats or node.target is operator.getitem:
            stage = max([*inputs, *owned, 0])
        elif owned and len(owned) == len(read) and max(owned) < stage:
            is_bound = draws(node) or not trained.isdisjoint(needed)
            moved = None if is_bound else _movable_inputs(graph, node, max(owned), stages)
            if moved is not None:
                stage = max(owned)
                stages.update(dict.fromkeys(moved, stage))
                inputs = []
        stages[node] = max([stage, *inputs])
        for name in read:
            owners.setdefault(name, stages[node])
    _draw_where_used(nodes, repeats, stages)
    return stages


def _draw_where_used(nodes: Sequence[fx.Node], repeats: Collection[fx.Node], stages: dict[fx.Node, int]) -> None:
    """Move to the first stage that uses them what repeated calls make of sizes alone, which may be random numbers."""
    from_sizes: dict[fx.Node, None] = {}
    for node in nodes:
        inputs = [arg for arg in node.all_input_nodes if isinstance(arg.meta.get("val"), Tensor)]
        if node in repeats and isinstance(node.meta.get("val"), Tensor) and all(arg in from_sizes for arg in inputs):
            from_sizes[node] = None
    for node in reversed(from_sizes):
        used = [stages[user] for user in node.users if user in stages]
        stages[node] = max(stages[node], min(used, default=0))


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
    """Refuse points that are no submodules of the model; one that has several names is known by each."""
    known = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for point in points:
        if point not in known or not point:
            raise ValueError(unknown_point(point, known))


def check_points(model: nn.Module, points: Iterable[str], *graphs: fx.GraphModule) -> list[str]:
    """The points, each by its first name in the model, if they are submodules that run in this order.

    Raises:
        ValueError: an unknown name (with the nearest right one), one that runs nothing, or out of order.
    """
    points = list(points)
    check_known(model, points)
    first_names = {module: name for name, module in model.named_modules()}
    called = {point: first_names[model.get_submodule(point)] for point in points}
    for nodes in map(work_nodes, graphs):
        places = first_places(nodes)
        for point in points:
            if called[point] not in places:
                raise ValueError(
                    f"no stage can begin at {point!r}: none of its operations is in the trace; name the submodule after it"
                )
        tensors = (place for place, node in enumerate(nodes) if isinstance(node.meta.get("val"), Tensor))
        check_order(points, {point: places[name] for point, name in called.items()}, next(tensors, 0))
    return list(called.values())


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


def choose_points(
    model: nn.Module, num_stages: int, weights: Weights, train: fx.GraphModule, evaluation: fx.GraphModule
) -> list[str]:
    """Choose where ``num_stages`` - 1 stages begin so that the slowest stage is as fast as it can be.

    The work of a stage is that of its operations, in floating-point operations (and 16 for each element written). A
    stage begins at an entry of a `ModuleList` or `Sequential` where that costs the slowest stage at most half more;
    among cuts that are equally good within a tenth, the one where the fewest elements pass. What one stage alone can
    read (`Weights`) is used on one side of every cut.

    Raises:
        ValueError: there are too few such places.
    """
    nodes = work_nodes(train)
    homes = _homes(train)
    work = [0.0] * (len(nodes) + 1)
    for node, home in zip(nodes, homes, strict=True):
        work[home] += cost(node)
    before = list(itertools.accumulate(work, initial=0.0))
    for spans in (homes, list(range(len(nodes)))):
        positions = _positions(model, train, spans, evaluation, weights)
        if len(positions) < num_stages - 1:
            continue
        best = [_best([p for p in positions if p.rank <= rank], num_stages, before) for rank in (0, 1, 2)]
        chosen = next(names for slowest, names in best if slowest <= _TOLERANCE * best[2][0])
        if not _are_used_twice(train, chosen, weights):
            return chosen
    raise ValueError(
        f"num_stages={num_stages} but this model can begin a stage at {len(positions)} places only, without a parameter on "
        f"both sides of a cut ({', '.join(p.name for p in positions) or 'none'}); pass num_stages<={len(positions) + 1}"
    )


def uneven_work(stages: Mapping[fx.Node, int], num_stages: int) -> str:
    """A warning of one stage that does nearly all of the work, which could be divided; or "".

    Args:
        stages: stage of each operation.
        num_stages: K.
    """
    work, heaviest = [0.0] * num_stages, 0.0
    for node, stage in stages.items():
        operation = cost(node)
        work[stage] += operation
        heaviest = max(heaviest, operation)
    shares = [part / max(sum(work), 1e-12) for part in work]
    largest = max(range(num_stages), key=shares.__getitem__)
    is_one_operation = 2 * heaviest > work[largest]
    if num_stages == 1 or shares[largest] < min(_MUCH, _UNEVEN / num_stages) or is_one_operation:
        return ""
    return (
        f"stage {largest} does {100 * shares[largest]:.0f} % of the work; an even share is {100 / num_stages:.0f} % "
        f"({', '.join(f'{100 * share:.0f} %' for share in shares)}, by a count of operations). Between the calls of one module, "
        "and the uses of a tensor that the forward writes, no stage can begin. Pass points=, fewer stages, or a list of modules"
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
    elif name in ("linear", "addmm", *_RECURRENT) or name.startswith("conv"):
        is_recurrent = name in _RECURRENT
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


def _homes(graph: fx.GraphModule) -> list[int]:
    """The place of each operation; in a later call of a submodule the place where the first call begins."""
    nodes, repeats = work_nodes(graph), repeats_of(graph)
    places = first_places(nodes)
    return [places[repeats[node]] if node in repeats else place for place, node in enumerate(nodes)]


def _positions(
    model: nn.Module, graph: fx.GraphModule, homes: Sequence[int], evaluation: fx.GraphModule, weights: Weights
) -> list[_Position]:
    """The places where a stage may begin, in order."""
    nodes, repeats = work_nodes(graph), repeats_of(graph)
    place_of = {node: place for place, node in enumerate(nodes)}
    closed: set[int] = set()  # what one stage alone can read is used on both sides
    changes = [0] * (len(nodes) + 2)  # of the number of elements that pass
    for place, node in enumerate(nodes):
        value = node.meta.get("val")
        last = max((place_of.get(user, len(nodes)) for user in node.users), default=place)
        if isinstance(value, Tensor) and last > place:
            changes[place + 1] += _numel(value)
            changes[last + 1] -= _numel(value)
    for weight in {weight for node in nodes for weight in weights_of(node)}:
        used = [homes[place_of[user]] for user in weight.users if user in place_of]
        sharing = weights.sharing(str(weight.target))
        if sharing == "in one stage":
            closed.update(range(min(used) + 1, max(used) + 1))
        elif sharing == "sent":
            changes[min(used) + 1] += _numel(weight.meta["val"])
            changes[max(used) + 1] -= _numel(weight.meta["val"])
    crossing = list(itertools.accumulate(changes))
    # The first stage has a parameter, if the model has any.
    least = next((place for place, node in enumerate(nodes) if weights_of(node)), 0) + 1
    blocks, other = _blocks(model), first_places(work_nodes(evaluation))
    candidates = [
        _Position(place, name, 0 if name in blocks else 1 if "." not in name else 2, crossing[place])
        for name, place in first_places(nodes).items()
        if place >= least
        and place not in closed
        and other.get(name)
        and nodes[place] not in repeats
        and name not in weights.called_again
    ]
    found: dict[int, _Position] = {}
    for position in sorted(candidates, key=lambda p: (p.place, p.rank, p.name.count("."))):
        found.setdefault(position.place, position)
    return list(found.values())


def _blocks(model: nn.Module) -> set[str]:
    """The entries of the outermost lists of modules."""
    first_names = {module: name for name, module in model.named_modules()}
    blocks: set[str] = set()
    for name, module in model.named_modules():
        inside = any(name == block or name.startswith(f"{block}.") for block in blocks)
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1 and not inside:
            blocks.update(first_names[entry] for entry in module_dict(module).values() if entry is not None)
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


def _are_used_twice(graph: fx.GraphModule, points: Sequence[str], weights: Weights) -> bool:
    """Whether what one stage alone can read would be read in two."""
    stages = assign(graph, points, weights)
    alone = [
        node for node in graph.graph.find_nodes(op="get_attr") if weights.sharing(str(node.target)) == "in one stage"
    ]
    return any(len({stages[user] for user in weight.users if user in stages}) > 1 for weight in alone)


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
