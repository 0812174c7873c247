"""Whether the stages of a traced model do what the model does.

A trace fixes what the forward decides by Python values, and misses what happens outside of torch. So both run on the
example, and what they return, add to the loss and leave in buffers is compared.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..stage.losses import collecting
from ..tensors.autocast import AutocastState
from ..tensors.module_mode import in_mode, slow_attention
from ..tensors.rng import seeded
from ..tensors.torch_private import TO_COPY, TorchDispatchMode, pytree
from ..typing import Tree
from .example import Example
from .export import Traced, without_cache
from .side_effects import as_it_was, noting_stores, on_copies

_PRECISION = 1e-5  # of the norm
_HALF_PRECISION = 1e-2  # rounding to bfloat16 is 4e-3
_ACCELERATOR_PRECISION = 1e-3  # which may choose another kernel, or TF32, in the second run


class Verifier:
    """Compares a model with its stages on the example.

    Args:
        model: the model. Its parameters, buffers, attributes and modes and the global generators are left as they are.
        stages: stages of the model.
        example: what to call them with.
        traced: traces in train and in eval mode.
        written: names of the model's tensors that the forward writes.

    Attributes:
        device_type: type of the device of the first tensor; the CPU for the meta device.
        stored: attributes that the forward stores at each call, by the runs so far; by the trace where it does not run.
    """

    def __init__(
        self,
        model: nn.Module,
        stages: Sequence[nn.Module],
        example: Example,
        traced: Sequence[Traced],
        written: Collection[str],
    ) -> None:
        self._model, self._stages, self._traced = model, stages, traced
        other = traced[0].sizes.another(example)
        self._examples = [example] if other is None else [example, other]
        self.stored: dict[str, None] = {}
        tensors = [*model.parameters(), *model.buffers(), *(t for t in example.leaves if isinstance(t, Tensor))]
        devices = {t.device for t in tensors}
        self._device = tensors[0].device
        self.device_type = "cpu" if self._device.type == "meta" else self._device.type
        self._can_run = len(devices) == 1 and self._device.type != "meta"
        graphs = [trace.graph for trace in traced]
        self._moved = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in written}
        self._moved |= set(map(id, model.buffers()))
        has_half = any(_is_half(node.meta.get("val")) for graph in graphs for node in graph.graph.nodes)
        precision = _PRECISION if self.device_type == "cpu" else _ACCELERATOR_PRECISION
        self._precision = _HALF_PRECISION if has_half else precision

    def check(self) -> None:
        """Raise ValueError where they differ, in eval mode or, if nothing is drawn there, in train mode."""
        for example, training in itertools.product(self._examples, (False, True)):
            difference = self._difference(example, self._precision, training=training)
            if difference:
                shapes = [tuple(leaf.shape) for leaf in example.leaves if isinstance(leaf, Tensor)]
                changed = f" in shapes {', '.join(map(str, shapes))}" if example is not self._examples[0] else ""
                where = f"on the example{changed}, in {'train' if training else 'eval'} mode"
                raise ValueError(
                    f"the stages do not do what the model does: {where}, {difference}. A trace fixes what the forward decides by "
                    "Python's values (a counter, a random number of Python or NumPy, an attribute that it sets); divide the model "
                    "by hand: pass a list of modules, one a stage"
                )

    def agree_exactly(self) -> bool:
        """Whether they are known to do the same to the bit, with the same casts, in the present autocast settings."""
        found = {self._difference(self._examples[0], None, training=training) for training in (False, True)}
        return "" in found and found <= {"", None}

    def _difference(self, example: Example, precision: float | None, *, training: bool) -> str | None:
        """The first difference above a share ``precision`` of a tensor's norm, in words; empty if there is none.

        Args:
            example: what to call them with.
            precision: share of the norm; None: the results are to be the same to the bit, and the casts the same.
            training: whether to run in train mode, or in eval mode.

        Returns:
            None where nothing can be said: the model draws random numbers, or does not run on the example (on the meta
                device,
            on several, or on its values).
        """
        run = partial(self._run, example=example, training=training, counting=precision is None)
        want, stored = self._run_model(run, example) if self._can_run else (None, None)
        self.stored |= dict.fromkeys(self._traced[0 if training else 1].stored if stored is None else stored)
        if want is None or want.draws:
            return None
        try:
            got = run(self._stages, nn.Sequential(*self._stages))
        except Exception as error:
            return f"they fail: {type(error).__name__}: {error}"
        if got.casts != want.casts:
            return "they cast other tensors"
        moved, share = {name: got.buffers[name] for name in want.buffers}, precision or 0.0
        found = _difference(got.result, want.result, "output", share)
        found = found or _difference(got.terms, want.terms, "terms of add_loss", share)
        return found or _difference(moved, want.buffers, "buffers", share)

    def _run_model(
        self, run: Callable[[Sequence[nn.Module], Callable[[Tree], Tree]], _Run], example: Example
    ) -> tuple[_Run, dict[str, bool]] | tuple[None, None]:
        """What the model does, and the attributes that it stores at each call; None where it does not run."""

        def call_model(value: Tree) -> Tree:
            args, kwargs = dataclasses.replace(example, value=value).call()
            return self._model(*args, **kwargs)

        try:
            with as_it_was(self._model):
                for _ in range(2):  # again with what the first run has left in attributes, a cache for example
                    stored: dict[str, bool] = {}
                    with noting_stores(self._model, stored):
                        done = run([self._model], call_model)
                    if not stored:
                        break
        except Exception:
            return None, None
        return done, stored

    def _run(
        self,
        modules: Sequence[nn.Module],
        call: Callable[[Tree], Tree],
        *,
        example: Example,
        training: bool,
        counting: bool,
    ) -> _Run:
        """Run ``call``, which runs ``modules``, on the example."""
        casts = _CastCounter()
        tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
        copies = {id(t): t.detach().clone() for t in tensors if id(t) in self._moved}
        contexts: list[AbstractContextManager[Any]] = [slow_attention(), without_cache(self._model)]
        contexts += [AutocastState.now(self.device_type).region(), seeded(0, self._device), torch.no_grad()]
        for module in modules:
            contexts += [in_mode(module, training=training), on_copies(module, copies)]
        with ExitStack() as stack:
            for context in [*contexts, *([casts] if counting else [])]:
                stack.enter_context(context)
            terms = stack.enter_context(collecting())
            before = self._generators()
            result = call(pytree.tree_map_only(Tensor, torch.clone, example.value))
            draws = any(not torch.equal(a, b) for a, b in zip(before, self._generators(), strict=True))
            buffers = {name: t for module in modules for name, t in module.named_buffers(remove_duplicate=False)}
        return _Run(result, sorted(terms, key=float), buffers, casts.counts, draws)

    def _generators(self) -> list[Tensor]:
        """The states of the global generators."""
        states = [torch.get_rng_state()]
        if self.device_type != "cpu":
            states.append(torch.get_device_module(self._device).get_rng_state(self._device))
        return states


class _Run(NamedTuple):
    """What a run returned and added to the loss, the buffers after it, its casts, and whether it drew numbers."""

    result: Any
    terms: list[Tensor]  # by size, since stages may add them in another order
    buffers: dict[str, Tensor]
    casts: Counter[tuple[torch.dtype, torch.dtype]]
    draws: bool


class _CastCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts casts, by (dtype before, dtype after)."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[tuple[torch.dtype, torch.dtype]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is TO_COPY:
            self.counts[args[0].dtype, result.dtype] += 1
        return result


def _is_half(value: Any) -> bool:
    return any(isinstance(t, Tensor) and t.is_floating_point() and t.itemsize < 4 for t in pytree.tree_leaves(value))


def _difference(got: Tree, want: Tree, what: str, precision: float) -> str:
    """The first difference of two trees that is more than a share ``precision`` of a tensor's norm, in words."""
    wanted, tree = pytree.tree_flatten_with_path(want)
    found, other = pytree.tree_flatten(got)
    if other != tree:
        return f"{what} is {other}, and the model's {tree}"
    for (path, a), b in zip(wanted, found, strict=True):
        where = f"{what}{pytree.keystr(path)}"
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            if type(a) is not type(b) or (isinstance(a, (bool, int, float, str)) and a != b):
                return f"{where} is {b!r}, and the model's {a!r}"
        elif (a.shape, a.dtype) != (b.shape, b.dtype):
            return (
                f"{where} is {b.dtype} of shape {tuple(b.shape)}, and the model's {a.dtype} of shape {tuple(a.shape)}"
            )
        elif not (share := _apart(a, b)) <= precision:
            return f"{where} differs by {share:.2g} of its norm"
    return ""


@torch.no_grad()
def _apart(a: Tensor, b: Tensor) -> float:
    """The norm of the difference over the norm of ``a``; equal nans and infinities are no difference."""
    if a.layout is not torch.strided:
        a, b = a.to_dense(), b.to_dense()
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    if not a.is_floating_point():
        return 0.0 if torch.equal(a.long(), b.long()) else math.inf
    a, b = a.double(), b.double()
    same = (a == b) | (a.isnan() & b.isnan())
    apart = float(torch.where(same, 0.0, a - b).norm())
    size = float(torch.where(a.isfinite(), a, 0.0).norm())
    return apart / size if size else math.inf if apart else 0.0
