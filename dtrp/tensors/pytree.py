"""Trees of tensors and plain constants, which a stage is given and returns; a tensor is a tree too.

A tree is made of tuples, lists and dicts; its leaves are tensors, None, booleans, numbers and text. A tree is taken
apart into its tensors, in order, and a form, which is plain data and so can travel in a message::

    {"h": x, "masks": (m, None), "step": 3}

    tensors    [x, m]
    form       ["dict", [["h", ["tensor"]], ["masks", ["tuple", [["tensor"], ["constant", None]]]], ["step",
    ["constant", 3]]]]
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..typing import Tree

Form = list[Any]
_TENSOR: Form = ["tensor"]
_CONSTANTS = (type(None), bool, int, float, str)
# Tensors that no stage can be given, and what makes others of them.
_CURES = {
    "nested": "torch.nested.to_padded_tensor()",
    "quantized": ".dequantize()",
    "mkldnn": ".to_dense()",
}


def flatten(value: Tree, what: str = "its output") -> tuple[list[Tensor], Form]:
    """The tensors of a tree, in order, and its form.

    Args:
        value: a tree.
        what: the name of the value in errors.

    Raises:
        TypeError: there is something else in it, with its place.
    """
    tensors: list[Tensor] = []
    return tensors, _form(value, what, tensors)


def _form(value: Tree, what: str, tensors: list[Tensor]) -> Form:
    if isinstance(value, Tensor):
        tensors.append(checked(value, what))
        return _TENSOR
    if type(value) in _CONSTANTS:
        return ["constant", value]
    if type(value) in (tuple, list, torch.Size):
        name = "list" if type(value) is list else "tuple"
        return [name, [_form(entry, f"{what}[{i}]", tensors) for i, entry in enumerate(value)]]
    if isinstance(value, Mapping):
        if all(type(key) in (str, int) for key in value):
            return ["dict", [[key, _form(entry, f"{what}[{key!r}]", tensors)] for key, entry in value.items()]]
        raise TypeError(f"{what} is a dict whose keys are not all text or whole numbers; name its entries")
    kind = f"a {type(value).__name__}"
    if isinstance(value, tuple):
        raise TypeError(f"{what} is {kind}; pass a plain tuple, tuple(value), or a dict")
    raise TypeError(f"{what} is {kind}; between stages go tensors, None, numbers and text, in tuples, lists and dicts")


def checked(t: Tensor, what: str) -> Tensor:
    """Check that a tensor can be cut, kept and passed on: it has strides, or is a sparse COO one.

    Raises:
        TypeError: it has another layout.
    """
    if t.layout in (torch.strided, torch.sparse_coo) and not (t.is_nested or t.is_quantized):
        return t
    kind = next((kind for kind in _CURES if getattr(t, f"is_{kind}")), str(t.layout).removeprefix("torch."))
    raise TypeError(
        f"{what} is a {kind} tensor; pass what {_CURES.get(kind, '.to_sparse_coo()')} makes of it: stages take tensors with "
        "strides, and sparse COO ones"
    )


def unflatten(form: Form, tensors: Iterator[Tensor]) -> Tree:
    """The tree of a form, with these tensors."""
    kind = form[0]
    if kind == "tensor":
        return next(tensors)
    if kind == "constant":
        return form[1]
    if kind == "dict":
        return {key: unflatten(entry, tensors) for key, entry in form[1]}
    entries = [unflatten(entry, tensors) for entry in form[1]]
    return entries if kind == "list" else tuple(entries)


def tensors_of(value: Tree) -> list[Tensor]:
    """The tensors of a tree, in order."""
    return [value] if isinstance(value, Tensor) else flatten(value)[0]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in a value, which may hold anything, however deep in tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(entry)


def map_tensors(function: Callable[[Tensor], Any], value: Tree) -> Tree:
    """The tree with ``function`` of every tensor in its place."""
    if isinstance(value, Tensor):
        return function(value)
    tensors, form = flatten(value)
    return unflatten(form, iter([function(t) for t in tensors]))


def num_samples(value: Tree) -> int:
    """Samples along dimension 0; in a tree, the length of its tensors that is not 1, if there is one."""
    if isinstance(value, Tensor):
        return len(value)
    lengths = {len(t) for t in tensors_of(value) if t.dim()}
    return next(iter(lengths - {1}), len(lengths))


def split(value: Tree, parts: int, num_empty: int = 0) -> Sequence[Tree]:
    """A mini-batch cut into micro-batches, as `torch.tensor_split` cuts each of its tensors.

    Constants, tensors without a dimension and, in a tree, tensors of length 1 beside longer ones go to every part
    whole.

    Args:
        value: the mini-batch.
        parts: the number of micro-batches.
        num_empty: the number of micro-batches without samples that come after them.
    """
    if isinstance(value, Tensor):
        return _cut(value, parts, num_empty)
    tensors, form = flatten(value)
    samples, total = num_samples(value), parts + num_empty
    cut = [_cut(t, parts, num_empty) if t.dim() and len(t) == samples else (t,) * total for t in tensors]
    return [unflatten(form, iter([parts_of_t[part] for parts_of_t in cut])) for part in range(total)]


def _cut(t: Tensor, parts: int, num_empty: int) -> Sequence[Tensor]:
    """`torch.tensor_split`, also for sparse tensors, whose parts are no views; then ``num_empty`` empty ones."""
    if t.layout is torch.strided:
        return (*torch.tensor_split(t, parts), *(t.narrow(0, len(t), 0) for _ in range(num_empty)))
    lengths = [len(rows) for rows in torch.arange(len(t)).tensor_split(parts)] + [0] * num_empty
    starts = itertools.accumulate(lengths, initial=0)
    return [torch.narrow_copy(t, 0, start, length) for start, length in zip(starts, lengths, strict=False)]


def check_samples(label: str, value: Tree, num_microbatches: int = 1) -> Tree:
    """Check a mini-batch: every tensor has as many samples along dimension 0, at least one, or is one for all.

    Raises:
        TypeError, ValueError: the value is no mini-batch, or it is cut into micro-batches and has a list of something
            else with an entry a sample.
    """
    tensors, form = flatten(value, label) if isinstance(value, (Tensor, tuple, list, Mapping)) else ([], _TENSOR)
    if not tensors:
        raise TypeError(
            f"{label} is a {type(value).__name__}; step takes tensors with samples along dimension 0, or tuples, lists and "
            "dicts of them"
        )
    lengths = [len(t) for t in tensors if t.dim()]
    if not lengths:
        raise ValueError(f"{label} has no dimension; its first one counts the samples")
    if len({1, *lengths}) > 2:
        raise ValueError(
            f"the tensors of {label} have {', '.join(map(str, lengths))} samples along dimension 0; each has those of one "
            "mini-batch, or is one for all of them (samples behind one another, with their offsets, cannot "
            "be cut: pad them, a row a sample)"
        )
    if not num_samples(value):
        raise ValueError("an empty mini-batch; pass at least one sample (each replica needs at least one)")
    if num_microbatches > 1 and tensors and not isinstance(value, Tensor):
        for place in _uncut_lists(form, label, num_samples(value)):
            raise TypeError(
                f"{place} has {num_samples(value)} entries that are no tensors, as many as there are samples, and would go whole "
                f"to each of {num_microbatches} micro-batches; make a tensor of it, leave it out, or pass num_microbatches=1 "
                "(numbers that are for all samples go into a tuple)"
            )
    # No graph can save an inference tensor.
    return map_tensors(lambda t: t.clone() if t.is_inference() else t, value)


def targets_fit(inputs: int, targets: int, num_microbatches: int) -> bool:
    """Whether a mini-batch of so many samples may have so many targets: as many, or, where it stays whole, several a
    sample (the tokens of all samples one behind another)."""
    return targets == inputs or (num_microbatches == 1 and targets % inputs == 0)


def _uncut_lists(form: Form, place: str, samples: int) -> Iterator[str]:
    """Where a tree has a list of text or numbers, or a tuple of text, with as many entries as there are samples."""
    kind, entries = form[0], form[1] if len(form) > 1 else []
    if kind == "dict":
        for key, entry in entries:
            yield from _uncut_lists(entry, f"{place}[{key!r}]", samples)
    elif kind in ("list", "tuple"):
        constants = [entry[1] for entry in entries if entry[0] == "constant" and entry[1] is not None]
        if 1 < samples == len(constants) == len(entries) and (kind == "list" or all(type(c) is str for c in constants)):
            yield place
        for i, entry in enumerate(entries):
            yield from _uncut_lists(entry, f"{place}[{i}]", samples)


def on_cpu(value: Any) -> Any:
    """The value with every tensor in it, however deep in dicts, lists and tuples, on the CPU."""
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        result = copy.copy(value)
        for key, entry in value.items():
            result[key] = on_cpu(entry)
        return result
    return type(value)(map(on_cpu, value)) if type(value) in (list, tuple) else value
