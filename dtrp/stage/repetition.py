"""Whether a forward, repeated, gives again what it gave: what a stage relies on that keeps inputs and recomputes.

Weights, input, random draws of torch, buffers, modes and autocast are the same the second time (`dtrp.stage.forward`). What a
module remembers in plain attributes (a counter, a hidden state), draws from a generator of its own, or does otherwise where
gradients are off, is not. So the first mini-batch is looked at::

    F(m)    of the first micro-batch: has it changed an attribute or a weight, or drawn from another generator than torch's?
            Then it is tried again at once, before anything is learned: the same output, and no draws
    B(m)    the same output as F(m), where nobody has changed anything in between: the weights are those of F(m)

What a trial does to buffers and attributes is undone. What first matters later than that is not seen.
"""

from __future__ import annotations

import pickle
import random
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.overrides import TorchFunctionMode

from ..tensors.module_mode import members, modes_of
from ..tensors.pytree import map_tensors, tensors_of
from .stash import Held

if TYPE_CHECKING:
    from .forward import Moves, Repeatable

_CURE = (
    "keep this stage's graphs, which repeats nothing: Pipeline(keep='graph'), or keep=[...] with 'graph' at its place"
)


class _SlowPaths:
    """Within it torch's modules of attention take the path that they take with gradients.

    The switch is the process's: the first thread that comes in turns it, and the last one out turns it back.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._before = threading.Lock(), 0, True

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = torch.backends.mha.get_fastpath_enabled()
                torch.backends.mha.set_fastpath_enabled(False)
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                torch.backends.mha.set_fastpath_enabled(self._before)


slow_paths = _SlowPaths()


class Repetition:
    """The forwards of a stage that its backwards repeat.

    Args:
        repeatable: the forward.
        module: all that is trained at the stage.
        parameters: its trainable ones.
    """

    def __init__(self, repeatable: Repeatable, module: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        self._repeatable, self._module, self._parameters = repeatable, module, parameters
        self._minibatch: int | None = None  # the first
        self._moves: set[Any] = set()  # what of its state its first forward has changed

    def forward(self, held: Held, weights: dict[str, Tensor]) -> Any:
        """The output of a forward without a graph.

        Args:
            held: the micro-batch, which is told what it is compared with.
            weights: what it reads instead of the parameters.
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
        held.modes = modes_of(self._repeatable.module)  # of those too that the first forward has made
        if compares:
            held.first = _copies(out), self._state()
        if before is not None:
            self._try(held, weights, *before)
        return out

    def _run(self, held: Held, weights: dict[str, Tensor], buffers: Moves) -> Any:
        """The output, without a graph; by the path that attention takes where there is one."""
        if self._repeatable.may_be_fused:  # which depends on what has a gradient: the graph is let go at once
            with torch.enable_grad():
                return map_tensors(Tensor.detach, self._repeatable.run(held, weights, buffers)[0])
        with torch.no_grad(), slow_paths:
            return self._repeatable.run(held, weights, buffers)[0]

    def expected(self, held: Held) -> list[Tensor] | None:
        """The output of the repetition that is next; None where it is not known: somebody else has changed something since."""
        if held.first is None:
            return None
        (first, state), held.first = held.first, None
        return first if self._state().changes(state) <= self._moves else None

    def check(self, held: Held, first: Sequence[Tensor], again: Any, *, at_once: bool = False) -> None:
        """Refuse another output: ``again`` where it was ``first``; it is by the same kernels where it comes ``at_once``."""
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
            "the stage's forward, repeated with the same weights, input and random draws, gives another output, and so the "
            "gradient would be another function's: it depends on what a repetition does not find as it was (a counter or a hidden "
            "state in an attribute, draws of its own), or does otherwise where gradients are off; keep a state in a registered "
            f"buffer, or {_CURE}"
        )

    def _try(self, held: Held, weights: dict[str, Tensor], state: _State, generators: Generators) -> None:
        """After the first forward: if it has changed something, refuse what another does not give or changes again."""
        assert held.first is not None
        first, after = held.first
        self._moves = after.changes(state)
        if not generators.put_back() and not self._moves:
            return
        again = Held(held.micro, held.version, held.autocast, held.leaf, 0, held.target)
        attributes = {member: dict(vars(member)) for member in members(self._module)}
        try:
            out = self._run(again, weights, "tried")
        finally:
            for member, values in attributes.items():
                now = vars(member)
                for name in now.keys() - values.keys():
                    del now[name]
                now.update(values)
        generators.check()
        self.check(held, first, out, at_once=True)
        if after.marks["sizes"] != sizes_of(self._parameters):
            raise RuntimeError(
                "the stage's forward writes its parameters, and its repetition in the backward would write them again; let a "
                f"hook of the optimizer's step do it, or {_CURE}"
            )

    def _runs_with_gradients(self, held: Held, weights: dict[str, Tensor]) -> bool:
        again = Held(held.micro, held.version, held.autocast, held.leaf, 0, held.target)
        try:
            with torch.enable_grad():
                self._repeatable.run(again, weights, "tried")
        except Exception:
            return False
        return True

    def _state(self) -> _State:
        return _State(self._module, self._parameters)


class _State:
    """What a module may remember: attributes, buffers, and the sizes of its weights.

    Attributes:
        marks: what tells each from what it is later.
    """

    def __init__(self, module: nn.Module, parameters: Sequence[Tensor]) -> None:
        self._kept: list[Any] = []  # as long as this is, nothing new has the identity of something here
        self._seen: set[int] = set()  # what has been looked into
        self.marks: dict[Any, Any] = {"sizes": sizes_of(parameters)}
        for member in members(module):
            self.marks |= {(id(member), name): self._mark(value) for name, value in vars(member).items()}

    def changes(self, before: _State) -> set[Any]:
        """What is otherwise than it was."""
        names = self.marks.keys() | before.marks.keys()
        return {name for name in names if self.marks.get(name) != before.marks.get(name)}

    def _mark(self, value: Any, depth: int = 6) -> Any:
        """What tells a value from what it is after it has been replaced, or written where that can be seen."""
        if isinstance(value, (bool, int, float, str)):
            return value
        self._kept.append(value)
        if isinstance(value, Tensor):
            return id(value), value._version
        if depth and id(value) not in self._seen:
            self._seen.add(id(value))
            return id(value), *(self._mark(each, depth - 1) for each in _inside(value).values())
        return id(value)


def wants_gradients(error: Exception) -> bool:
    """Whether a forward may have failed because gradients were off."""
    return isinstance(error, AssertionError) or (isinstance(error, RuntimeError) and "grad" in str(error))


def sizes_of(tensors: Sequence[Tensor]) -> str:
    """What tells whether somebody has written one of them, by whatever way: their norms, in full."""
    norms = torch._foreach_norm([t.detach() for t in tensors]) if tensors else ()
    return repr([float(norm) for norm in norms])


class Generators(TorchFunctionMode):
    """Those that a module draws from and that are not torch's own: Python's, NumPy's, those in its attributes, and within it
    those that functions of torch are given."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._known: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
            "Python's random": (random.getstate, random.setstate)
        }
        if (numpy := sys.modules.get("numpy.random")) is not None:
            self._known["NumPy's random"] = (numpy.get_state, numpy.set_state)
        self._found: set[int] = set()  # what has been looked at
        for name, member in module.named_modules():
            for attribute, value in vars(member).items():
                self._find(f"the generator {name}.{attribute}".replace(" .", " "), value)
        self._before = self._states()
        self._moved: dict[str, Any] = {}

    def _find(self, place: str, value: Any, depth: int = 6) -> None:
        if id(value) in self._found or not depth:
            return
        self._found.add(id(value))
        if isinstance(value, torch.Generator):
            self._known[place] = (partial(_state, value), partial(_set_state, value))
        elif isinstance(value, random.Random):
            self._known[place] = (value.getstate, value.setstate)
        elif hasattr(bits := getattr(value, "bit_generator", getattr(value, "_bit_generator", None)), "state"):
            self._known[place] = (partial(getattr, bits, "state"), partial(setattr, bits, "state"))  # NumPy's
        else:
            for key, inner in _inside(value).items():
                self._find(
                    f"{place}[{key!r}]" if isinstance(value, (dict, list, tuple)) else f"{place}.{key}",
                    inner,
                    depth - 1,
                )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in (*args, *(kwargs or {}).values()):
            if (
                isinstance(value, torch.Generator)
                and value is not torch.default_generator
                and id(value) not in self._found
            ):
                place = f"a generator that {getattr(func, '__name__', func)} is given"
                self._find(place, value)
                self._before[place] = _state(value)
        return func(*args, **(kwargs or {}))

    def _states(self) -> dict[str, Any]:
        return {name: get() for name, (get, _) in self._known.items()}

    def put_back(self) -> bool:
        """After a forward: let those that have moved be where they were before it; whether any has."""
        for name, state in self._states().items():
            if pickle.dumps(state) != pickle.dumps(self._before[name]):
                self._moved[name] = state
                self._known[name][1](self._before[name])
        return bool(self._moved)

    def check(self) -> None:
        """After another: refuse those that it has moved just as far. (Another thread's draws would have to be as many.)"""
        for name, state in self._moved.items():
            get, put = self._known[name]
            if pickle.dumps(get()) == pickle.dumps(state):
                raise RuntimeError(
                    f"the stage's forward draws from {name}, and its repetition in the backward would draw on; let it draw from "
                    f"torch's default generator, which a repetition finds where it was, or {_CURE}"
                )
            put(state)


def _inside(value: Any) -> dict[Any, Any]:
    """What a list, a mapping or an object holds."""
    if isinstance(value, (list, tuple, deque)):
        return dict(enumerate(value))
    if isinstance(value, dict):
        return value
    # Functions and classes are the program's, and modules of a stage are looked into by themselves.
    held = None if isinstance(value, (type, ModuleType, nn.Module, Tensor)) else getattr(value, "__dict__", None)
    return held if isinstance(held, dict) else {}


def _state(generator: torch.Generator) -> list[int]:
    state: list[int] = generator.get_state().tolist()
    return state


def _set_state(generator: torch.Generator, state: list[int]) -> None:
    generator.set_state(torch.tensor(state, dtype=torch.uint8))


def _copies(out: Any) -> list[Tensor]:
    """The tensors of an output, which the next forward may write."""
    return [t.detach().clone() for t in tensors_of(out)]


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether ``b`` is ``a``, within a part of its norm where its numbers are no whole ones."""
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
    """Whether its numbers have about the digits of half precision, or fewer."""
    return t.dtype.is_floating_point and torch.finfo(t.dtype).eps > 1e-4
