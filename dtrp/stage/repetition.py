"""Whether a repeated forward gives the same output, on which a stage relies that keeps inputs and recomputes.

Weights, input, torch's random draws, buffers, modes and autocast are the same the second time (`dtrp.stage.forward`).
What a module remembers in plain attributes (a counter, a hidden state), draws from another generator, or does
differently where gradients are off, is not. So the first mini-batch is checked::

    F(m)    of the first micro-batch: has it changed an attribute or a weight, or drawn from another generator than
            torch's? Then it is tried again at once, before anything is learned: it must give the same output, and draw nothing
    B(m)    must give the same output as F(m), if nothing has changed in between: the weights are those of F(m)

What a trial does to buffers and attributes is undone. What only matters later is not seen. `recomputing`
tells a hook or a module whether the forward that calls it is such a repetition, or a trial.
"""

from __future__ import annotations

import pickle
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.overrides import TorchFunctionMode

from ..tensors.module_mode import members, modes_of, slow_attention
from ..tensors.pytree import map_tensors, tensors_of
from ..tensors.torch_private import foreach, in_backward, uncompiled, write_count
from ..typing import Tree
from .stash import StashEntry

if TYPE_CHECKING:
    from .forward import Moves, RepeatableForward

_CURE = (
    "keep this stage's graphs, which repeats nothing: Pipeline(keep='graph'), or keep=[...] with 'graph' at its place"
)


_repeats: ContextVar[bool] = ContextVar("repeats", default=False)
_num_repeating = (
    0  # in all threads: a backward on an accelerator runs in threads of autograd's own, which see no context
)


@uncompiled
def recomputing() -> bool:
    """Whether the forward that is running repeats one that has run before, for its backward.

    For what is to happen once a micro-batch, in a forward hook or in a module: counting, logging, printing. A stage
    that recomputes runs its forward twice, and so do activation checkpoints.

    Returns:
        True in the repetition, in a backward, and in trials whose result is dropped; False in the first forward of a
        micro-batch, in `Pipeline.infer` and outside of a pipeline.

    Example:
        >>> import torch, dtrp
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        >>> seen = []
        >>> def hook(module, x, out):
        ...     if not dtrp.recomputing():
        ...         seen.append(len(out))
        >>> _ = model[0].register_forward_hook(hook)
        >>> pipe = dtrp.Pipeline(model, lambda params: torch.optim.SGD(params, lr=0.1),
        ...                      torch.nn.functional.cross_entropy, num_stages=2, num_microbatches=1)
        >>> for _ in range(3):
        ...     loss = pipe.step(torch.randn(8, 4), torch.randint(2, (8,)))
        >>> pipe.flush()
        >>> seen
        [8, 8, 8]
    """
    return _repeats.get() or (_num_repeating > 0 and in_backward())


@contextmanager
def repeating() -> Iterator[None]:
    """The context in which `recomputing` is true."""
    global _num_repeating
    token = _repeats.set(True)
    _num_repeating += 1
    try:
        yield
    finally:
        _num_repeating -= 1
        _repeats.reset(token)


class Repetition:
    """The forwards of a stage that its backwards repeat.

    Args:
        repeatable: the forward.
        module: all that is trained at the stage.
        parameters: its trainable parameters.
    """

    def __init__(self, repeatable: RepeatableForward, module: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        self._repeatable, self._module, self._parameters = repeatable, module, parameters
        self._minibatch: int | None = None  # the first
        self._moves: set[Any] = set()  # the entries of its state that its first forward has changed

    def forward(self, held: StashEntry, weights: dict[str, Tensor]) -> Tree:
        """The output of a forward without a graph.

        Args:
            held: the micro-batch, which receives what its repetition is compared with.
            weights: what the module reads instead of the parameters.
        """
        is_first = self._minibatch is None
        if self._minibatch is None:
            self._minibatch = held.micro.minibatch
        compares = held.version == held.micro.minibatch == self._minibatch
        before = (self._state(), Generators(self._module)) if is_first and compares else None
        try:
            with nullcontext() if before is None or not self._repeatable.can_be_watched else before[1]:
                out = self._run(held, weights, "ahead")
        except Exception as error:
            if is_first and self._runs_with_gradients(held, weights):
                raise RuntimeError(
                    f"{str(error) or type(error).__name__} (this stage's forward runs with gradients, and not without, as the "
                    f"first of a stage that keeps its inputs does; {_CURE})"
                ) from error
            raise
        held.modes = modes_of(
            self._repeatable.roster_of_module
        )  # also of the submodules that the first forward has made
        if compares:
            # Copies: the next forward may write the output.
            held.first = [t.detach().clone() for t in tensors_of((out, held.added))], self._state()
        if before is not None:
            self._try(held, weights, *before)
        return out

    def _run(self, held: StashEntry, weights: dict[str, Tensor], moves: Moves) -> Tree:
        """The output, without a graph; attention takes the path that it takes with one."""
        if self._repeatable.may_be_fused:  # the path depends on what has a gradient: the graph is let go at once
            with torch.enable_grad():
                return map_tensors(Tensor.detach, self._repeatable.run(held, weights, moves)[0])
        with torch.no_grad(), slow_attention():
            return self._repeatable.run(held, weights, moves)[0]

    def expected(self, held: StashEntry) -> list[Tensor] | None:
        """The output that the next repetition must give; None where something else has changed since."""
        if held.first is None:
            return None
        (first, state), held.first = held.first, None
        return first if self._state().changes(state) <= self._moves else None

    def check(self, held: StashEntry, first: Sequence[Tensor], again: Tree, *, at_once: bool = False) -> None:
        """Refuse a repetition that gave ``again`` where the forward gave ``first``.

        Args:
            held: the micro-batch.
            first: the tensors of the first output, and the sum of what the forward has added to the loss.
            again: the same of the repetition; None where it has added nothing.
            at_once: whether both have run with the same kernels.
        """
        read = [*first, *self._parameters]
        tolerance = 1e-3
        if held.autocast.enabled or any(map(_is_half, read)):
            tolerance = 1e-2
        elif at_once:
            tolerance = 1e-5
        elif all(t.dtype == torch.float64 for t in read):
            tolerance = 1e-6
        seen = tensors_of(again)
        if len(first) == len(seen) and all(_close(a, b, tolerance) for a, b in zip(first, seen, strict=True)):
            return
        raise RuntimeError(
            "the stage's forward, repeated with the same weights, input and random draws, gives another output, or other terms of "
            "add_loss, and so the gradient would be another function's: it depends on what a repetition does not find as it was (a "
            "counter or a hidden state in an attribute, draws of its own), or does otherwise where gradients are off; keep a state "
            f"in a registered buffer, or {_CURE}"
        )

    def _try(self, held: StashEntry, weights: dict[str, Tensor], state: _State, generators: Generators) -> None:
        """If the first forward has changed something, repeat it at once; refuse another output, or another change."""
        assert held.first is not None
        first, after = held.first
        self._moves = after.changes(state)
        if not generators.put_back() and not self._moves:
            return
        attributes = {member: dict(vars(member)) for member in members(self._module)}
        again = _again(held)
        try:
            out = self._run(again, weights, "tried")
        finally:
            for member, values in attributes.items():
                now = vars(member)
                for name in now.keys() - values.keys():
                    del now[name]
                now.update(values)
        generators.check()
        self.check(held, first, (out, again.added), at_once=True)
        if after.marks["sizes"] != sizes_of(self._parameters):
            raise RuntimeError(
                "the stage's forward writes its parameters, and its repetition in the backward would write them again; let a "
                f"hook of the optimizer's step do it, or {_CURE}"
            )

    def _runs_with_gradients(self, held: StashEntry, weights: dict[str, Tensor]) -> bool:
        try:
            with torch.enable_grad():
                self._repeatable.run(_again(held), weights, "tried")
        except Exception:
            return False
        return True

    def _state(self) -> _State:
        return _State(self._module, self._parameters)


def _again(held: StashEntry) -> StashEntry:
    """A new entry for the same forward."""
    return StashEntry(held.micro, held.version, held.autocast, held.leaf, 0, held.target)


class _State:
    """What a module may remember: attributes, buffers, and the norms of its weights.

    Attributes:
        marks: for each entry a value that differs once the entry has been replaced, or visibly written.
    """

    def __init__(self, module: nn.Module, parameters: Sequence[Tensor]) -> None:
        self._kept: list[Any] = []  # while these are held, no new object has the identity of one of them
        self._seen: set[int] = set()  # the objects whose entries have been marked
        self.marks: dict[Any, Any] = {"sizes": sizes_of(parameters)}
        for member in members(module):
            self.marks |= {(id(member), name): self._mark(value) for name, value in vars(member).items()}

    def changes(self, before: _State) -> set[Any]:
        """The entries that differ from ``before``."""
        names = self.marks.keys() | before.marks.keys()
        return {name for name in names if self.marks.get(name) != before.marks.get(name)}

    def _mark(self, value: Any, depth: int = 6) -> Any:
        if isinstance(value, (bool, int, float, str)):
            return value
        self._kept.append(value)
        if isinstance(value, Tensor):
            return id(value), write_count(value)
        if depth and id(value) not in self._seen:
            self._seen.add(id(value))
            return id(value), *(self._mark(inner, depth - 1) for inner in _entries(value).values())
        return id(value)


def wants_gradients(error: Exception) -> bool:
    """Whether a forward may have failed because gradients were off."""
    return isinstance(error, AssertionError) or (isinstance(error, RuntimeError) and "grad" in str(error))


def sizes_of(tensors: Sequence[Tensor]) -> str:
    """The norms of the tensors in full, which differ once one has been written, by whatever way."""
    norms = foreach.norm([t.detach() for t in tensors]) if tensors else ()
    return repr([float(norm) for norm in norms])


class Generators(TorchFunctionMode):
    """The random generators of a module besides torch's default one: Python's, NumPy's, those in its attributes, and within
    this context those that functions of torch are given."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._known: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
            "Python's random": (random.getstate, random.setstate)
        }
        if (numpy := sys.modules.get("numpy.random")) is not None:
            self._known["NumPy's random"] = (numpy.get_state, numpy.set_state)
        self._found: set[int] = set()  # the objects that have been searched
        for name, member in module.named_modules():
            for attribute, value in vars(member).items():
                self._find(f"the generator {name}.{attribute}".replace(" .", " "), value)
        self._before = self._states()
        self._moved: dict[str, Any] = {}

    def _find(self, label: str, value: Any, depth: int = 6) -> None:
        """Add the generators in a value, which the errors call ``label``."""
        if id(value) in self._found or not depth:
            return
        self._found.add(id(value))
        if isinstance(value, torch.Generator):
            self._known[label] = (partial(_state, value), partial(_set_state, value))
        elif isinstance(value, random.Random):
            self._known[label] = (value.getstate, value.setstate)
        elif hasattr(bits := getattr(value, "bit_generator", getattr(value, "_bit_generator", None)), "state"):
            self._known[label] = (partial(getattr, bits, "state"), partial(setattr, bits, "state"))  # NumPy's
        else:
            form = "{}[{!r}]" if isinstance(value, (dict, list, tuple)) else "{}.{}"
            for key, inner in _entries(value).items():
                self._find(form.format(label, key), inner, depth - 1)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in (*args, *(kwargs or {}).values()):
            is_other = isinstance(value, torch.Generator) and value is not torch.default_generator
            if is_other and id(value) not in self._found:
                label = f"a generator that {getattr(func, '__name__', func)} is given"
                self._find(label, value)
                self._before[label] = _state(value)
        return func(*args, **(kwargs or {}))

    def _states(self) -> dict[str, Any]:
        return {name: get() for name, (get, _) in self._known.items()}

    def put_back(self) -> bool:
        """After a forward: put the generators that it moved back to where they were; whether there are any."""
        for name, state in self._states().items():
            if pickle.dumps(state) != pickle.dumps(self._before[name]):
                self._moved[name] = state
                self._known[name][1](self._before[name])
        return bool(self._moved)

    def check(self) -> None:
        """Refuse generators that a second forward has moved as far as the first."""
        for name, state in self._moved.items():
            get, put = self._known[name]
            if pickle.dumps(get()) == pickle.dumps(state):
                raise RuntimeError(
                    f"the stage's forward draws from {name}, and its repetition in the backward would draw on; let it draw from "
                    f"torch's default generator, which a repetition finds where it was, or {_CURE}"
                )
            put(state)


def _entries(value: Any) -> dict[Any, Any]:
    """The entries of a list or a mapping, or the attributes of an object."""
    if isinstance(value, (list, tuple, deque)):
        return dict(enumerate(value))
    if isinstance(value, dict):
        return value
    # Functions and classes are the program's, and modules of a stage are searched by themselves.
    held = None if isinstance(value, (type, ModuleType, nn.Module, Tensor)) else getattr(value, "__dict__", None)
    return held if isinstance(held, dict) else {}


def _state(generator: torch.Generator) -> list[int]:
    state: list[int] = generator.get_state().tolist()
    return state


def _set_state(generator: torch.Generator, state: list[int]) -> None:
    generator.set_state(torch.tensor(state, dtype=torch.uint8))


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether ``b`` equals ``a``; floating-point values within a part of the norm of ``a``."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = (t.detach() if t.layout is torch.strided else t.detach().to_dense() for t in (a, b))
    if not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    wide = torch.promote_types(a.dtype, torch.float32)
    a, b = a.to(wide), b.to(wide)
    same = (a == b) | (a.isnan() & b.isnan())
    difference = torch.where(same, 0, a - b)
    return bool(vector_norm(difference) <= tolerance * vector_norm(torch.where(a.isfinite(), a, 0)))


def _is_half(t: Tensor) -> bool:
    """Whether its numbers have about as many digits as half precision, or fewer."""
    return t.dtype.is_floating_point and torch.finfo(t.dtype).eps > 1e-4
