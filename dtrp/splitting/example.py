"""What a model is called with: the example of `dtrp.split`, and which sizes of its tensors vary."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..tensors.pytree import flatten, unflatten
from ..tensors.torch_private import pytree
from ..typing import Tree
from ..validation import unknown


@dataclass(frozen=True)
class Example:
    """What the model is called with.

    Args:
        value: a tuple of positional arguments, a dict of keyword arguments, or the only argument.
        leaves: tensors and constants in it, in order.
        paths: name of each leaf in errors.
        samples: number of samples in it; tensors of one sample beside them are for all, as in `Pipeline.step`.
    """

    value: Tree
    leaves: tuple[Any, ...]
    paths: tuple[str, ...]
    samples: int

    @property
    def spec(self) -> pytree.TreeSpec:
        """The tree without its leaves. (No field, since torch warns when one is copied.)"""
        return pytree.tree_structure(self.value)

    @classmethod
    def from_value(cls, value: Tree) -> Example:
        """The example, checked.

        Raises:
            TypeError: it holds something else than tensors and constants, or no tensor with samples.
            ValueError: its tensors have several numbers of samples, or less than two.
        """
        tensors, form = flatten(value, "example")
        value = unflatten(form, iter(tensors))  # of plain tuples, lists and dicts, as `Pipeline.step` makes it
        with_paths, _ = pytree.tree_flatten_with_path(value)
        paths = tuple("example" + pytree.keystr(path) for path, _ in with_paths)
        leaves = tuple(leaf for _, leaf in with_paths)
        sizes = {path: len(t) for path, t in zip(paths, leaves, strict=True) if isinstance(t, Tensor) and t.dim()}
        if not sizes:
            raise TypeError(
                f"example is a {type(value).__name__} without a tensor of samples; pass what the model is called with: a "
                "tensor, a tuple of arguments, or a dict of keyword arguments"
            )
        first_path, samples = max(sizes.items(), key=lambda item: item[1] > 1)
        for path, size in sizes.items():
            if size not in (1, samples):
                raise ValueError(
                    f"{first_path} has {samples} samples and {path} has {size}; along dimension 0 every tensor has as many, "
                    "or one for all of them"
                )
        if samples < 2:
            raise ValueError(
                f"example has {samples} sample; torch.export takes a size of 0 or 1 for a constant: pass at least 2 samples"
            )
        return cls(value, leaves, paths, samples)

    def without_data(self) -> Example:
        """The example with tensors on the meta device, which have shapes and dtypes alone."""
        value = pytree.tree_map_only(Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta"), self.value)
        return Example(value, tuple(pytree.tree_leaves(value)), self.paths, self.samples)

    def has_samples(self, leaf: Any) -> bool:
        """Whether a leaf is a tensor with the samples of the mini-batch, and not one for all of them."""
        return isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == self.samples

    def call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments."""
        if isinstance(self.value, dict):
            return (), dict(self.value)
        return (tuple(self.value) if isinstance(self.value, (tuple, list)) else (self.value,)), {}


def varying(example: Example, dynamic_shapes: Any, model: nn.Module) -> tuple[dict[int, Any], ...]:
    """The dimensions of each leaf of the example that vary: the samples, and those that the caller names.

    Args:
        example: what the model is called with.
        dynamic_shapes: as `torch.export.export` takes it, for what varies beside the samples; see `dtrp.split`.
        model: the model, whose forward names positional arguments.

    Returns:
        For each leaf, {dimension: what torch.export is told of it}. Dimension 0 of all tensors with samples is one Dim
        without bounds.

    Raises:
        TypeError, ValueError: it does not fit the example, with what to change.
    """
    shapes = _positional(example, dynamic_shapes, model)
    found = dict(_walk(example.value, shapes, "dynamic_shapes", "example"))
    assert tuple(found) == example.paths
    named = [dims for leaf, dims in zip(example.leaves, found.values(), strict=True) if example.has_samples(leaf)]
    names = list(dict.fromkeys(dims[0].__name__ for dims in named if 0 in dims and is_named(dims[0])))
    if len(names) > 1:
        raise ValueError(
            f"dynamic_shapes names dimension 0, the samples, {names[0]!r} and {names[1]!r}; it is as long in all tensors, "
            "and varies by itself: leave it out, or give it one name"
        )
    taken = {dim.__name__ for dims in found.values() for dim in dims.values() if is_named(dim)}
    name = names[0] if names else next(n for n in ("batch", "samples", "_samples") if n not in taken)
    samples = torch.export.Dim(name)
    for path, leaf, dims in zip(found, example.leaves, found.values(), strict=True):
        if example.has_samples(leaf):
            dims[0] = samples
        for dim, size in dims.items():
            if is_named(size) and size.__name__ == name:
                dims[dim] = samples
            elif size != torch.export.Dim.AUTO and leaf.shape[dim] < 2:
                raise ValueError(
                    f"{path} has size {leaf.shape[dim]} along dimension {dim}, which dynamic_shapes lets vary; torch.export takes "
                    "a size of 0 or 1 for a constant: pass an example with at least 2 there"
                )
    return tuple(found.values())


def _positional(example: Example, shapes: Any, model: nn.Module) -> Any:
    """``dynamic_shapes`` nested like the example's value: by place, where the example is positional arguments."""
    args, kwargs = example.call()
    if hasattr(shapes, "dynamic_shapes"):  # a ShapesCollection, or AdditionalInputs
        shapes = shapes.dynamic_shapes(model, args, kwargs)
    if kwargs or shapes is None:
        return shapes
    if isinstance(shapes, Mapping) and all(isinstance(name, str) for name in shapes):
        shapes = _in_order(shapes, len(args), model)
    if isinstance(example.value, Tensor):
        if not isinstance(shapes, (tuple, list)) or not all(isinstance(s, (Mapping, tuple, list)) for s in shapes):
            return shapes
        return shapes[0] if len(shapes) == 1 else shapes
    return shapes


def _in_order(shapes: Mapping[str, Any], num_arguments: int, model: nn.Module) -> tuple[Any, ...]:
    """What ``shapes`` says of each positional argument of the model's forward, by their names."""
    in_order: list[Any] = []
    names = []
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if len(in_order) >= num_arguments or parameter.kind not in (
            parameter.POSITIONAL_ONLY,
            parameter.POSITIONAL_OR_KEYWORD,
            parameter.VAR_POSITIONAL,
        ):
            break
        names.append(name)
        if parameter.kind is parameter.VAR_POSITIONAL:
            rest = num_arguments - len(in_order)
            in_order += list(shapes.get(name) or [None] * rest)
        else:
            in_order.append(shapes.get(name))
    strange = next((name for name in shapes if name not in names), None)
    if strange is not None:
        raise ValueError(unknown("argument in dynamic_shapes:", strange, names))
    return tuple(in_order)


def _walk(value: Tree, shapes: Any, where: str, path: str) -> Iterator[tuple[str, dict[int, Any]]]:
    """The path of each leaf of the example, and its dimensions that vary."""
    if isinstance(value, Tensor):
        yield path, _dims(value, shapes, where)
    elif isinstance(value, dict):
        if shapes is not None and not isinstance(shapes, Mapping):
            raise TypeError(f"{where} is a {type(shapes).__name__}, and {path} a dict; pass a dict with the same names")
        strange = next((name for name in shapes or () if name not in value), None)
        if strange is not None:
            raise ValueError(unknown(f"name in {where}:", strange, map(str, value)))
        for name, entry in value.items():
            yield from _walk(entry, shapes and shapes.get(name), f"{where}[{name!r}]", f"{path}[{name!r}]")
    elif isinstance(value, (tuple, list)):
        if shapes is not None and not (isinstance(shapes, (tuple, list)) and len(shapes) == len(value)):
            entries = f" of {len(shapes)}" if hasattr(shapes, "__len__") else ""
            raise TypeError(
                f"{where} is a {type(shapes).__name__}{entries}, and {path} a {type(value).__name__} of {len(value)}; pass as "
                "many entries, None for those that do not vary"
            )
        for place, entry in enumerate(value):
            yield from _walk(entry, shapes and shapes[place], f"{where}[{place}]", f"{path}[{place}]")
    else:
        if shapes is not None:
            raise TypeError(f"{where} is {shapes!r}, and {path} is no tensor, but {value!r}; pass None there")
        yield path, {}


def _dims(t: Tensor, shapes: Any, where: str) -> dict[int, Any]:
    """The dimensions of a tensor that vary, by number or, for all of them, in order."""
    if isinstance(shapes, (tuple, list)):
        if len(shapes) != t.dim():
            raise TypeError(f"{where} has {len(shapes)} entries, and the tensor {t.dim()} dimensions; pass as many")
        shapes = dict(enumerate(shapes))
    if shapes is not None and not isinstance(shapes, Mapping):
        raise TypeError(f"{where} is {shapes!r}; pass {{dimension: torch.export.Dim(name)}} for a tensor, or None")
    dims: dict[int, Any] = {}
    for dim, size in (shapes or {}).items():
        if type(dim) is not int or not -t.dim() <= dim < t.dim():
            raise ValueError(f"{where} names dimension {dim!r} of a tensor of {t.dim()}")
        if type(size) is int and size != t.shape[dim]:
            raise ValueError(f"{where}[{dim}] is {size}, and the example has {t.shape[dim]} there; leave it out")
        if size is None or type(size) is int or size == torch.export.Dim.STATIC:
            continue
        if not isinstance(size, str) and not is_named(size) and type(size) is not type(torch.export.Dim.AUTO):
            raise TypeError(f"{where}[{dim}] is {size!r}; pass a torch.export.Dim, the name of one, Dim.AUTO or None")
        dims[dim % t.dim()] = torch.export.Dim(size) if isinstance(size, str) else size
    return dims


def is_named(size: Any) -> bool:
    """Whether it is a Dim with a name, and not Dim.AUTO or Dim.DYNAMIC."""
    return hasattr(size, "__name__") and hasattr(size, "max")


class Sizes:
    """The sizes that tensors of an input may have, by the trace of a model.

    Args:
        shapes: for each leaf of the input the size of each dimension, a number or an expression in symbols; None for a
            constant.
        samples: symbol for the number of samples, which any number may take the place of.
        ranges: the least and the greatest value of each symbol.
        conditions: expressions that hold in the trace, and decided the way through the model.
        names: names of symbols.
        example: what the model was traced with.
        asked: for each leaf the dimensions that were to vary.
    """

    def __init__(
        self,
        shapes: list[tuple[Any, ...] | None],
        samples: str,
        ranges: Mapping[str, tuple[float, float]],
        conditions: list[Any],
        names: Mapping[str, str],
        example: Example,
        asked: Sequence[Collection[int]],
    ) -> None:
        self._shapes, self._samples, self._ranges = shapes, samples, dict(ranges)
        self._conditions, self._names = conditions, dict(names)
        self._paths = [path.replace("example", "x", 1) for path in example.paths]
        self._traced = [tuple(leaf.shape) if isinstance(leaf, Tensor) else () for leaf in example.leaves]
        self._asked = [frozenset(dims) for dims in asked]
        self._fitting: set[tuple[bool, tuple[Any, ...]]] = set()  # shapes that were found to fit

    def check(self, leaves: list[Any], *, whole: bool) -> None:
        """Refuse tensors of other sizes.

        Args:
            leaves: the input's leaves, with as many dimensions as the example's.
            whole: whether it is a mini-batch that will be cut before the model runs on it.

        Raises:
            ValueError: a size that is not the example's, lies out of bounds, or does not fit another, with what to
                change.
        """
        key = (whole, tuple(tuple(leaf.shape) if isinstance(leaf, Tensor) else None for leaf in leaves))
        if key in self._fitting:
            return
        values = self._values(leaves)
        for symbol, (value, where) in values.items():
            least, most = self._ranges.get(symbol, (0, math.inf))
            least = max(least, 2)
            if symbol == self._samples:  # a mini-batch may be cut, and torch's minimum is a matter of the trace
                least, most = 0, math.inf if whole else most
            if not least <= value <= most:
                bounds = f"at least {least}" + (f" and at most {most}" if most != math.inf else "")
                traced = f"{where}, and the model was traced for"
                if symbol == self._samples:
                    raise ValueError(f"{traced} at most {most} samples at once; pass fewer, or more micro-batches")
                raise ValueError(
                    f"{traced} {self._names.get(symbol, 'a size')} of {bounds}; pad or cut it, or split with other dynamic_shapes"
                )
        for condition in self._conditions:
            known = all(symbol.name in values for symbol in condition.free_symbols)
            if not known or (whole and any(symbol.name == self._samples for symbol in condition.free_symbols)):
                continue
            if not _evaluated(condition, values):
                raise ValueError(
                    f"{'; '.join(where for _, where in values.values())}: the model was traced where "
                    f"{self._in_words(condition)}, and takes another way for these; pad or cut them, or split with such an example"
                )
        if len(self._fitting) >= 1000:
            self._fitting.clear()
        self._fitting.add(key)

    def _values(self, leaves: list[Any]) -> dict[str, tuple[int, str]]:
        """The value of each symbol in an input, and where it is from, in words; raises where sizes disagree."""
        values: dict[str, tuple[int, str]] = {}
        derived = []
        for index, (path, leaf, shape) in enumerate(zip(self._paths, leaves, self._shapes, strict=True)):
            for dim, want in enumerate(shape or ()):
                size, where = leaf.shape[dim], f"{path} has size {leaf.shape[dim]} along dimension {dim}"
                if isinstance(want, int):
                    if size != want:
                        raise ValueError(self._misfit(index, dim, leaf))
                elif not want.is_Symbol:
                    derived.append((want, size, where))
                elif want.name == self._samples and dim == 0:  # one entry is for all samples
                    values[want.name] = max(values.get(want.name, (0, "")), (size, where))
                elif (other := values.setdefault(want.name, (size, where)))[0] != size:
                    raise ValueError(f"{other[1]}, and {where}: both are {self._in_words(want)}; pad or cut them alike")
        for want, size, where in derived:
            unknown = [symbol for symbol in want.free_symbols if symbol.name not in values]
            if len(unknown) == 1:  # factor * symbol + rest
                rest = want.xreplace({unknown[0]: 0 * unknown[0]})
                value, left = divmod(size - int(rest), int(want.coeff(unknown[0])))
                values[unknown[0].name] = (value, where)
            else:
                left = bool(unknown) or int(_evaluated(want, values)) != size
            if left:
                raise ValueError(f"{where}, which is {self._in_words(want)} in the trace; pad or cut it")
        return values

    def _misfit(self, index: int, dim: int, leaf: Tensor) -> str:
        """The message for a tensor with another size along a dimension that does not vary."""
        shape, traced = self._shapes[index], self._traced[index]
        assert shape is not None
        varying = [
            "the number of samples" if d == 0 and str(s) == self._samples else f"dimension {d} ({self._in_words(s)})"
            for d, s in enumerate(shape)
            if not isinstance(s, int)
        ]
        text = f"{self._paths[index]} has shape {tuple(leaf.shape)}, and the model was traced with {traced}; "
        if dim in self._asked[index]:
            return text + (
                f"its forward works with {traced[dim]} along dimension {dim} alone, which dynamic_shapes lets vary where it can: "
                f"pad it to {traced[dim]}, or take the size from the input, as x.shape[{dim}], in the forward"
            )
        only = f"only {' and '.join(varying)} may differ" if varying else "no size of it may differ"
        return text + f"{only}: pad it, or split with another example, or with dynamic_shapes"

    def _in_words(self, expression: Any) -> str:
        """An expression with names for its symbols."""
        known = self._names.get(str(expression))
        return known or re.sub(r"\w+", lambda found: self._names.get(found[0], found[0]), str(expression))

    def another(self, example: Example) -> Example | None:
        """The example with other sizes, cut or made longer with its last entries; None where no size but the samples'
        varies.
        """
        values = {name: value for name, (value, _) in self._values(list(example.leaves)).items()}
        others = [name for name in values if name != self._samples]
        for step in (-1, 1, -2, 2, -3, 3, -4, 4) if others else ():
            changed = {name: (value + step * (name in others), "") for name, value in values.items()}
            sizes = [[_evaluated(size, changed) for size in shape or ()] for shape in self._shapes]
            if any(size < 1 for shape in sizes for size in shape):
                continue
            leaves = [_resized(leaf, shape) for leaf, shape in zip(example.leaves, sizes, strict=True)]
            try:
                self.check(leaves, whole=False)
            except ValueError:
                continue
            return Example(pytree.tree_unflatten(leaves, example.spec), tuple(leaves), example.paths, example.samples)
        return None


def _evaluated(expression: Any, values: Mapping[str, tuple[int, str]]) -> Any:
    """An expression for values of its symbols: a number, or whether it is true."""
    if isinstance(expression, int):
        return expression
    import sympy  # type: ignore[import-untyped]  # torch.export has imported it

    found = expression.xreplace({s: sympy.Integer(values[s.name][0]) for s in expression.free_symbols})
    return bool(found) if found in (sympy.true, sympy.false) else int(found)


def _resized(leaf: Any, shape: list[int]) -> Any:
    """A tensor cut to ``shape``, or made longer with its last entries."""
    for dim, size in enumerate(shape):
        if size != leaf.shape[dim]:
            places = torch.arange(size, device=leaf.device).clamp(max=leaf.shape[dim] - 1)
            leaf = leaf.index_select(dim, places)
    return leaf
