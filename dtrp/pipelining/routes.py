"""The values that pass between the stages of torch's pipelines.

A stage by hand is called with what the stage before has returned, a tuple as several arguments. A traced one may take
values of any stage before it, which torch sends from rank to rank directly; here they travel through the stages in between::

    stage 0 makes a, b      boundary 0|1    (a, b)      stage 1 takes a, makes c, passes b on
                            boundary 1|2    (b, c)      stage 2 takes c and b
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

Source = tuple[int, int]  # a stage, and which of its outputs


@dataclass(frozen=True)
class Route:
    """Which of the values that arrive at a stage are its arguments, and which values it sends on.

    Args:
        takes: the place of each argument among the values that arrive.
        sends: for each value sent on, (True, number of the stage's output) or (False, place among the values that
            arrived).
    """

    takes: tuple[int, ...]
    sends: tuple[tuple[bool, int], ...]

    @classmethod
    def from_graph(cls, graph: fx.Graph, stage: int) -> Route:
        """The route of a stage in the graph that calls all stages."""
        nodes = [node for node in graph.nodes if node.op == "call_module"]
        numbers = {node: k for k, node in enumerate(nodes)}
        taken = [[s for s in (_source(arg, numbers) for arg in node.args) if s is not None] for node in nodes]

        def crossing(boundary: int) -> list[Source]:
            """The values that stages before the boundary make for stages behind it."""
            return sorted({s for sources in taken[boundary:] for s in sources if s[0] < boundary})

        arriving, leaving = crossing(stage), crossing(stage + 1)
        return cls(
            tuple(map(arriving.index, taken[stage])) if stage else (),
            tuple((True, s[1]) if s[0] == stage else (False, arriving.index(s)) for s in leaving),
        )


def _source(arg: Any, numbers: dict[fx.Node, int]) -> Source | None:
    """Where an argument of a stage comes from; None: the model's own input, which the caller gives to that stage."""
    output = 0
    if isinstance(arg, fx.Node) and arg.target is operator.getitem:
        made: Any = arg.args
        arg, output = made
    return (numbers[arg], output) if arg in numbers else None


class Call:
    """A stage's module, called as torch's schedules call it.

    Args:
        module: the module of the stage.
        route: the route of a traced stage; None for a stage made by hand.
        stage, num_stages: k and K.

    Attributes:
        keywords: the caller's keyword arguments for the current micro-batch.
    """

    def __init__(self, module: Callable[..., Any], route: Route | None, stage: int, num_stages: int) -> None:
        self.keywords: dict[str, Any] = {}
        self._module, self._route = module, route
        self._is_first, self._is_last = stage == 0, stage == num_stages - 1

    def __call__(self, values: tuple[Any, ...]) -> Any:
        """The values for the next stage; the last stage returns its output as it is."""
        route = self._route
        arguments = values if route is None or self._is_first else [values[place] for place in route.takes]
        out = self._module(*arguments, **self.keywords)
        if self._is_last:
            return out
        made = tuple(out) if type(out) in (tuple, list) else (out,)
        if route is None:
            return made
        return tuple((made if is_output else values)[place] for is_output, place in route.sends)
