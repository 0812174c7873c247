"""The tensors of a traced model: its parameters, its buffers, and constants; and how several stages can read one.

- Every stage that reads it holds it: a buffer or constant that nothing writes, a frozen parameter.
- The first stage that reads it holds it, and its value travels: a parameter that has one name. Its gradient comes back
  with the value's.
- Stages hold it together: a parameter that has several names (`dtrp.stage.tied`).
- One stage alone can read it: what the forward writes, and the weights of a module that is called again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from torch import Tensor, fx, nn

from ..tensors.torch_private import is_operator, operator_schema
from .export import Traced, attribute, module_path, plain

Sharing = Literal["held by all", "sent", "tied", "in one stage"]


class Weights:
    """How stages can share the tensors of a traced model.

    Args:
        model: the model.
        traced: its forward in train and in eval mode.

    Attributes:
        written: names of the tensors that the forward writes.
        called_again: modules without weights that are called several times.
    """

    def __init__(self, model: nn.Module, traced: Sequence[Traced]) -> None:
        graphs = [trace.graph for trace in traced]
        self.called_again = frozenset(name for trace in traced for name in trace.called_again)
        tensors = named_tensors(model)
        counts = Counter(map(id, tensors.values()))
        self._num_names = {name: counts[id(tensor)] for name, tensor in tensors.items()}
        self.written = frozenset(name for graph in graphs for name in _written(graph))
        self._trained: set[str] = set()
        self._read_again: set[str] = set()  # by a later call of a module
        for graph in graphs:
            repeats = repeats_of(graph)
            for node in graph.graph.find_nodes(op="get_attr"):
                name, tensor = str(node.target), attribute(graph, str(node.target))
                if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
                    self._trained.add(name)
                if any(user in repeats for user in node.users):
                    self._read_again.add(name)

    def sharing(self, name: str) -> Sharing:
        """How stages can share the tensor that the graphs call ``name``."""
        if self._num_names.get(name, 1) > 1:
            return "tied"
        if name in self.written:
            return "in one stage"
        if name not in self._trained:
            return "held by all"
        return "in one stage" if name in self._read_again else "sent"

    def written_apart(self, model: nn.Module, divisions: Iterable[Mapping[fx.Node, int]]) -> str:
        """What to say of a buffer that the forward writes and that several stages read; "" where there is none.

        Args:
            model: the model.
            divisions: the stage of each operation, of the graphs in train and in eval mode.
        """
        buffers = dict(model.named_buffers(remove_duplicate=False))
        for name, stages in self._readers(divisions).items():
            if name in self.written and name in buffers and len(stages) > 1:
                return (
                    f"the forward writes the buffer {name}, and stages {' and '.join(map(str, sorted(stages)))} read it, so that "
                    "they would not do what the model does; pass points that leave all of its readers in one stage"
                )
        return ""

    def senders(self, divisions: Iterable[Mapping[fx.Node, int]]) -> dict[str, int]:
        """By name, the stage that holds each parameter whose value travels to others.

        Args:
            divisions: the stage of each operation, of the graphs in train and in eval mode.
        """
        readers = self._readers(divisions)
        return {
            name: min(stages) for name, stages in readers.items() if len(stages) > 1 and self.sharing(name) == "sent"
        }

    def _readers(self, divisions: Iterable[Mapping[fx.Node, int]]) -> dict[str, set[int]]:
        """The stages that read each tensor, by name."""
        readers: dict[str, set[int]] = {}
        for stages in divisions:
            for node, stage in stages.items():
                for weight in weights_of(node):
                    readers.setdefault(str(weight.target), set()).add(stage)
        return readers


def weights_of(node: fx.Node) -> list[fx.Node]:
    """The parameters, buffers and constants that an operation reads."""
    return [arg for arg in node.all_input_nodes if arg.op == "get_attr"]


def repeats_of(graph: fx.GraphModule) -> dict[fx.Node, str]:
    """The operations that ran in a later call of a module that has weights, each with the innermost such module."""
    calls = {node: [name for name in module_path(node) if "@" in name] for node in graph.graph.nodes}
    return {node: plain(names[-1]) for node, names in calls.items() if names}


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a model by name; a tensor that has several names comes under each."""
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def _written(graph: fx.GraphModule) -> list[str]:
    """Parameters and buffers that the forward writes, or a view of them (`nn.Embedding(max_norm=...)`).

    The statistics of batch and instance norm among them, of which the operator's schema says nothing.
    """
    found = []
    for node in graph.graph.nodes:
        arguments = operator_schema(node.target).arguments if is_operator(node.target) else ()
        for argument, described in zip(node.args, arguments, strict=False):
            is_write = described.alias_info is not None and described.alias_info.is_write
            if not is_write and described.name not in ("running_mean", "running_var"):
                continue
            while isinstance(argument, fx.Node) and _may_return_its_argument(argument):
                argument = argument.args[0]
            if isinstance(argument, fx.Node) and argument.op == "get_attr":
                found.append(str(argument.target))
    return found


def _may_return_its_argument(node: fx.Node) -> bool:
    """Whether the result of an operation may be its first argument, or a view of it."""
    if not is_operator(node.target) or not node.args:
        return False
    schema = operator_schema(node.target)
    return schema.arguments[0].alias_info is not None and any(out.alias_info is not None for out in schema.returns)
