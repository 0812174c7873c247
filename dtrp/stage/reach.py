"""Which tensors belong to which stage: a stage that reads another stage's is refused at the first mini-batch.

Between stages go the output of a stage, and its gradient. A loss or a module that reads something else of another
stage, its parameters or a tensor that its forward has left in an attribute, would train nothing there, and would read
an old value, or on ranks an initial one. So every tensor made from the parameters or the input of a stage is known as
that stage's (by its storage, which is not held), and what comes to depend on another stage's is noted::

    stage 0    self.aux = gate(x).var()      belongs to stage 0
    stage 1    loss = ce(out, y) + moe.aux   reads "0.aux of stage 0", and so it is refused
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from ..tensors.layout import parts_of
from ..tensors.pytree import tensors_in
from ..tensors.torch_private import buffer_dict, parameter_dict, without_functorch_wrappers
from ..typing import LossFn, Tree

_WAY_OUT = "no gradient goes there; return it with that stage's output, through the stages in between"


class Reach:
    """Knows which tensors belong to which stage.

    Args:
        stages: the modules of all stages that are known on this rank, with their auxiliary networks, by index.
        hosted: the stage that this process hosts; None: all of them.
    """

    def __init__(self, stages: Mapping[int, nn.Module], hosted: int | None = None) -> None:
        self._stages = stages
        self._first: int | None = None  # the mini-batch that is watched
        # By storage: the stage that has made it; or, as text, the tensor of another stage from which it was made.
        self._origins: Any = WeakIdKeyDictionary()
        self._names = {
            id(p): f"{name} of stage {k}" for k, module in stages.items() for name, p in module.named_parameters()
        }
        holders: dict[int, tuple[Any, set[int]]] = {}
        for k, module in stages.items():
            # A constant is right wherever it is read, but for one that another rank may have another value of.
            tensors: list[Tensor] = [p for p in module.parameters() if p.requires_grad]
            if hosted not in (None, k):
                tensors = _tensors_of(module)
            for storage in storages_of(tensors):
                holders.setdefault(id(storage), (storage, set()))[1].add(k)
        # What this rank's stage holds too, frozen, has the right value there.
        held = [] if hosted is None else [*storages_of(_tensors_of(stages[hosted]))]
        shared = set(map(id, held))
        for key, (storage, owners) in holders.items():
            if len(owners) == 1 and (key not in shared or hosted in owners):
                self._origins[storage] = owners.pop()

    def covers(self, minibatch: int) -> bool:
        """Whether this mini-batch is watched: the first."""
        if self._first is None:
            self._first = minibatch
        return minibatch == self._first

    def watching(self, stage: int, entered: Iterable[Tensor], target: Iterable[Tensor]) -> AbstractContextManager[Any]:
        """The context in which what ``stage`` computes is noted as that stage's, or as made from another stage's.

        Args:
            stage: k.
            entered: the tensors of its input, which are the stage's from now on.
            target: the caller's tensors, which are no stage's.
        """
        for storage in storages_of(entered):
            self._origins[storage] = stage
        for storage in storages_of(target):
            self._origins.pop(storage, None)
        return _Watch(self, stage) if self._stages.keys() - {stage} else nullcontext()

    def copied(self, buffers: Mapping[Any, Tensor | None], made: Mapping[Any, Tensor | None]) -> None:
        """Give ``buffers`` the origins of the buffers that a stage has ``made`` in their places."""
        for slot, buffer in buffers.items():
            if (origin := next(map(self._origin, tensors_in(made.get(slot))), None)) is not None:
                self._origins.update((storage, origin) for storage in storages_of(tensors_in(buffer)))

    def follow(self, stage: int, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        """Note from which tensors ``function``, called at ``stage``, has made its result."""
        made = [*tensors_in(result)]
        name = getattr(function, "__name__", "")
        if (not made and result is not None) or name.endswith("_like") or name.startswith("new_"):
            return
        read = args[:1] if name in ("to", "type_as") else args[1:] if name == "copy_" else args
        label: int | str | None = None
        for t in tensors_in((*read, *(value for key, value in kwargs.items() if key != "out"))):
            origin = self._origin(t)
            if origin is not None and origin != stage:
                label = origin if isinstance(origin, str) else self._describe(t, origin)
                break
            label = label if origin is None else origin
        if label is None:
            return
        in_place = (name.endswith("_") and not name.endswith("__")) or name.startswith(("__i", "__setitem__"))
        if in_place and not made:
            made = [*tensors_in(args[:1])]
        views = [] if in_place or "out" in kwargs else [*storages_of(tensors_in(args))]
        for storage in storages_of(made):
            if not any(storage is view for view in views):
                self._origins[storage] = label

    def check(self, stage: int, made: tuple[Tree, ...], inside: Callable[[], Iterable[Tensor]]) -> None:
        """Refuse a stage whose output depends on another's tensors, or would train a parameter that no stage has.

        Args:
            stage: k.
            made: the outputs of its module and of its auxiliary network, and the terms that they add to the loss.
            inside: the leaves to which the stage differentiates.

        Raises:
            ValueError: naming what is read.
        """
        for t in tensors_in(made):
            if isinstance(read := self._origin(t), str):
                raise ValueError(f"stage {stage} reads {read}, and {_WAY_OUT}, or cut so that both lie in one stage")
        self.check_leaves(stage, made, inside)

    def check_leaves(self, stage: int, made: Tree, inside: Callable[[], Iterable[Tensor]]) -> None:
        """Refuse a stage that would train a parameter of another one, or of none; with the arguments of `check`."""
        for leaf in strange_leaves(tensors_in(made), set(), inside):
            if (name := self._names.get(id(leaf))) is not None:
                raise ValueError(f"stage {stage} reads {name}, and {_WAY_OUT}, or cut so that both lie in one stage")
            if isinstance(leaf, nn.Parameter):  # another leaf is made by the module, and nobody trains it
                raise ValueError(
                    f"stage {stage} reads {self._holder(stage, leaf)}, which would be trained and no stage has: no optimizer "
                    "updates it; register it as a parameter or submodule of the module that reads it, or freeze it "
                    "(requires_grad_(False))"
                )

    def check_loss(
        self, stage: int, judged: Tree, loss: Tensor, inside: Callable[[], Iterable[Tensor]], loss_fn: LossFn | None
    ) -> None:
        """Refuse a loss that depends on another stage's tensors, or would train a parameter that no stage has.

        Leaves are looked for in every mini-batch, since a loss may begin to depend on one at any time.

        Args:
            stage: k.
            judged: the output that ``loss_fn`` was called with.
            loss: the loss.
            inside: the leaves to which the stage differentiates.
            loss_fn: the function, to name what is in it.

        Raises:
            ValueError: naming what is read.
        """
        strange = strange_leaves([loss], {_node(t) for t in tensors_in(judged) if t.requires_grad}, inside)
        if strange:  # without what the module reads already
            reached = set(map(id, strange_leaves(tensors_in(judged), set(), inside)))
            strange = [leaf for leaf in strange if id(leaf) not in reached]
        read = self._origin(loss)
        if not isinstance(read, str):
            read = next((self._names[id(leaf)] for leaf in strange if id(leaf) in self._names), None)
        if read is not None:
            raise ValueError(
                f"loss_fn reads {read} and is called at stage {stage}: {_WAY_OUT}; a penalty on weights is the optimizer's "
                "(weight_decay=)"
            )
        for leaf in strange:
            name = _name_in(loss_fn, leaf) or f"a tensor of shape {tuple(leaf.shape)} that requires a gradient"
            raise ValueError(
                f"loss_fn would train {name}, which no stage has and no optimizer updates; freeze it "
                "(requires_grad_(False)), pass an nn.Module that has registered it as loss_fn, or put it into the last stage"
            )

    def _holder(self, stage: int, leaf: Tensor) -> str:
        """The name of a parameter that a module of the stage holds without having registered it."""
        for prefix, module in self._stages[stage].named_modules():
            for name, value in vars(module).items():
                for held in value if isinstance(value, (tuple, list)) else [value]:
                    found = name if held is leaf else isinstance(held, nn.Module) and _name_in(held, leaf)
                    if found:
                        return f"{found} in {prefix}.{name}" if prefix else f"{found} in {name}"
        return f"a parameter of shape {tuple(leaf.shape)}"

    def _origin(self, t: Tensor) -> int | str | None:
        origins = (self._origins.get(storage) for storage in storages_of([t]))
        return next((origin for origin in origins if origin is not None), None)

    def _describe(self, t: Tensor, stage: int) -> str:
        """The name that a stage has for its tensor."""
        places = [*storages_of([t])]
        for prefix, module in self._stages[stage].named_modules():
            for name, value in {**parameter_dict(module), **buffer_dict(module), **vars(module)}.items():
                if any(storage is place for storage in storages_of(tensors_in(value)) for place in places):
                    return f"{prefix}.{name} of stage {stage}" if prefix else f"{name} of stage {stage}"
        return f"a tensor of shape {tuple(t.shape)} that stage {stage} has computed"


class _Watch(TorchFunctionMode):
    def __init__(self, reach: Reach, stage: int) -> None:
        super().__init__()
        self._reach, self._stage = reach, stage

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not torch.compiler.is_compiling():
            self._reach.follow(self._stage, func, args, kwargs or {}, result)
        return result


def refuse_gradient(label: str, value: Tree, way_out: str) -> None:
    """Refuse a mini-batch that requires a gradient: none leaves the pipeline.

    Raises:
        ValueError: it does.
    """
    if any(t.requires_grad for t in tensors_in(value)):
        raise ValueError(
            f"{label} requires a gradient, and the pipeline gives none back; pass {label}.detach(), or {way_out}"
        )


def _tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def storages_of(tensors: Iterable[Tensor]) -> Iterator[torch.UntypedStorage]:
    """The storages of the tensors that have one; inside `torch.vmap` the storage of the whole."""
    for t in tensors:
        with suppress(RuntimeError, NotImplementedError):
            yield from [part.untyped_storage() for part in parts_of(without_functorch_wrappers(t))]


def strange_leaves(tensors: Iterable[Tensor], seen: set[Any], inside: Callable[[], Iterable[Tensor]]) -> list[Tensor]:
    """The leaves that autograd would give a gradient and that are not ``inside``, through nodes not ``seen`` yet."""
    found: list[Tensor] = []
    left: list[Any] = [_node(t) for t in tensors if t.requires_grad]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if isinstance(leaf := getattr(node, "variable", None), Tensor):
                found.append(leaf)
            left.extend(before for before, _ in node.next_functions)
    known = set(map(id, inside())) if found else ()
    return [leaf for leaf in found if id(leaf) not in known]


def _node(t: Tensor) -> Any:
    """The node to which a tensor's gradient goes; None for a view that was made without autograd."""
    if t.grad_fn is not None:
        return t.grad_fn
    with torch.enable_grad():
        viewed = t.view_as(t).grad_fn
    return None if viewed is None else viewed.next_functions[0][0]


def _name_in(holder: Any, leaf: Tensor, depth: int = 3) -> str | None:
    """The name of a tensor in a loss function, or in a module, that holds it, if it can be found."""
    parts: Mapping[Any, Any] = getattr(holder, "__dict__", {})
    if isinstance(holder, nn.Module):
        return next((f"{name} of {type(holder).__name__}" for name, p in holder.named_parameters() if p is leaf), None)
    if isinstance(holder, partial):
        parts = {**holder.keywords, **dict(enumerate((holder.func, *holder.args)))}
    elif inspect.ismethod(holder):
        parts = {"self": holder.__self__}
    elif inspect.isfunction(holder):
        variables = inspect.getclosurevars(holder)
        parts = {**variables.globals, **variables.nonlocals}
    for name, part in parts.items():
        found = str(name) if part is leaf else _name_in(part, leaf, depth - 1) if depth else None
        if found is not None:
            return found
    return None
