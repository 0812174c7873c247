"""The mode in which the uses of a stage's weights are recorded, one node of the graph a use.

A weight is known by identity, and so is what is computed of weights alone (a view, a cast, a parametrization): its
gradient is queued too, and goes on to the weights at the end of W. Everything else runs as it is.

The node does not have the weight among its inputs, so autograd itself gives the weight nothing. It keeps what autograd's
nodes keep, the input and the weight, in the same way: hooks on saved tensors see them, and a checkpoint recomputes them.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...tensors.torch_private import is_wrapped_by_functorch, without_base, without_torch_functions
from .operations import Convolution, Lookup, Operation, Product

_aten = torch.ops.aten


@dataclass(frozen=True)
class Known:
    """A tensor that is computed of a stage's weights alone.

    Args:
        tensor: a leaf, or what was computed of leaves.
        leaf: its index among the leaves; None where it is computed.
        roots: the indices of the leaves that it is computed of.
    """

    tensor: Tensor
    leaf: int | None
    roots: frozenset[int]


@dataclass(slots=True)
class Use:
    """One use of a weight, with the weight and the bias to which its gradients belong."""

    owner: Owner
    operation: Operation
    weight: Known
    bias: Known | None


class Owner(Protocol):
    """Whoever has made the uses: it is given what is left of their backward."""

    def defer(self, use: Use, x: Tensor, w: Tensor, g: Tensor) -> None:
        """Queue the gradients of a use's weight and bias."""
        ...

    def leaves_whole(self, known: Known) -> bool:
        """Whether the uses of a tensor are not divided."""
        ...

    def note(self, roots: Iterable[frozenset[int]], function: Any) -> None:
        """Note that weights were used in a function that is not divided."""
        ...


class _Divided(torch.autograd.Function):
    """The node of one use."""

    @staticmethod
    def forward(
        ctx: Any, use: Use, run: Callable[..., Tensor], x: Tensor, anchor: Tensor | None, tensors: tuple[Tensor, ...]
    ) -> Tensor:
        ctx.use = use
        ctx.save_for_backward(x, tensors[0])
        return without_base(run(x, *tensors))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, None, Tensor | None, None, None]:
        use: Use = ctx.use
        x, w = ctx.saved_tensors
        with without_torch_functions():  # but not the line before, where a checkpoint recomputes
            use.owner.defer(use, x, w, g)
            gradient = use.operation.input_gradient(g, x, w) if ctx.needs_input_grad[2] else None
        return None, None, gradient, None, None


class Recorder(TorchFunctionMode):
    """The mode.

    Args:
        owner: receives what is deferred.
        leaves: the weights.
        hooked: which of them have hooks.
    """

    def __init__(self, owner: Owner, leaves: Sequence[Tensor], hooked: Sequence[bool]) -> None:
        super().__init__()
        self.owner = owner
        self.known = {id(leaf): Known(leaf, i, frozenset([i])) for i, leaf in enumerate(leaves)}
        # An input without a gradient makes a node none: a leaf beside it does, and gets nothing. A hook would see that.
        free = [leaf for leaf, has_hook in zip(leaves, hooked, strict=True) if not has_hook]
        self._anchor = free[0] if free else torch.zeros((), requires_grad=True)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Every function of torch that the stage calls comes by here: the less is done for the others the better.
        handle = _HANDLERS.get(func)
        if handle is not None:
            return handle(self, func, args, kwargs or {})
        known = self.known
        for a in args:
            if id(a) in known:
                return self.follow(func, args, kwargs or {})
        if not kwargs:
            return func(*args)
        for a in kwargs.values():
            if id(a) in known:
                return self.follow(func, args, kwargs)
        return func(*args, **kwargs)

    def follow(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run a function of a known tensor; what it returns is known if nothing else in it requires a gradient."""
        out = func(*args, **kwargs)
        if isinstance(out, Tensor):
            made = [out] if out.requires_grad else []
        else:
            made = (
                [t for t in out if isinstance(t, Tensor) and t.requires_grad] if isinstance(out, (tuple, list)) else []
            )
        if not made or not torch.is_grad_enabled():
            return out
        known, inputs = self.known, list(_tensors_in([*args, *kwargs.values()]))
        roots = [known[id(t)].roots for t in inputs if id(t) in known]
        if any(t.requires_grad and id(t) not in known for t in inputs):
            self.owner.note(roots, func)
            return out
        for t in made:
            if id(t) not in known:
                known[id(t)] = Known(t, None, frozenset().union(*roots))
        return out

    def find(self, x: Any, weight: Any, bias: Any) -> tuple[Known, Known | None] | None:
        """The known weight and bias of a use; None where it is not divided."""
        w = self.known.get(id(weight))
        if w is None or type(x) not in _PLAIN or self.owner.leaves_whole(w):
            return None
        if x.layout is not torch.strided or weight.layout is not torch.strided or x.is_complex():
            return None
        b = None if bias is None else self.known.get(id(bias))
        if b is None and bias is not None and bias.requires_grad:
            return None
        if (b is not None and self.owner.leaves_whole(b)) or is_wrapped_by_functorch(x):
            return None
        return w, b

    def use(
        self, run: Callable[..., Tensor], operation: Operation, found: tuple[Known, Known | None], x: Tensor, bias: Any
    ) -> Tensor:
        """Run a use as a node of its own.

        Args:
            run: the function, of x, weight and bias.
            operation: its gradients.
            found: weight and bias, as they are known.
            x: the input.
            bias: the bias, also one that is not trained; None: there is none.
        """
        known, known_bias = found
        use = Use(self.owner, operation, known, known_bias)
        w = known.tensor if known.leaf is not None else known.tensor.detach().requires_grad_()
        given: tuple[Tensor, ...] = (w,) if bias is None else (w, bias)
        anchor = None if x.requires_grad else self._anchor
        kind: str = w.device.type
        if not torch.is_autocast_enabled(kind) or not x.is_floating_point():
            return cast(Tensor, _Divided.apply(use, run, x, anchor, given))  # type: ignore[no-untyped-call]
        dtype = torch.get_autocast_dtype(kind)
        given = tuple(_cast(t.detach(), dtype).requires_grad_(t.requires_grad) for t in given)
        with torch.autocast(kind, enabled=False):
            return cast(Tensor, _Divided.apply(use, run, _cast(x, dtype), anchor, given))  # type: ignore[no-untyped-call]


_PLAIN = {Tensor, nn.Parameter, nn.Buffer}


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor as autocast passes it on."""
    return t if t.dtype == torch.float64 or not t.is_floating_point() else t.to(dtype)


def _tensors_in(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors_in(value)


# -- how each function calls its arguments ----------------------------------------------------------
# The divided ones are called with the recorder and the arguments, and return None where the call is not divided.


_product = functools.cache(Product)
_convolution_of = functools.cache(Convolution)


def _linear(recorder: Recorder, input: Any = None, weight: Any = None, bias: Any = None, **more: Any) -> Tensor | None:
    found = None if more else recorder.find(input, weight, bias)
    if found is None or input.dim() < 2 or weight.dim() != 2:
        return None
    operation = _product(True, None if found[1] is None else bias.shape)
    return recorder.use(F.linear, operation, found, input, bias)


def _matmul(recorder: Recorder, input: Any = None, other: Any = None, **more: Any) -> Tensor | None:
    found = None if more else recorder.find(input, other, None)
    if found is None or input.dim() < 2 or other.dim() != 2:
        return None
    return recorder.use(torch.matmul, _product(False, None), found, input, None)


def _rmatmul(recorder: Recorder, weight: Any = None, input: Any = None) -> Tensor | None:
    return _matmul(recorder, input, weight)


def _addmm(
    recorder: Recorder, input: Any = None, mat1: Any = None, mat2: Any = None, *scaled: Any, **more: Any
) -> Tensor | None:
    found = None if scaled or more else recorder.find(mat1, mat2, input)
    if found is None or mat1.dim() != 2:
        return None
    operation = _product(False, None if found[1] is None else input.shape)
    return recorder.use(_added, operation, found, mat1, input)


def _added(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    return torch.addmm(bias, x, w)


def _embedding(
    recorder: Recorder, input: Any = None, weight: Any = None, padding_idx: Any = None, max_norm: Any = None,
    norm_type: Any = 2.0, scale_grad_by_freq: Any = False, sparse: Any = False,
) -> Tensor | None:  # fmt: skip
    found = None if max_norm is not None or sparse else recorder.find(input, weight, None)
    if found is None:
        return None
    row = -1 if padding_idx is None else padding_idx + weight.shape[0] * (padding_idx < 0)
    return recorder.use(_Looked(row, scale_grad_by_freq), Lookup(row, bool(scale_grad_by_freq)), found, input, None)


def _aten_embedding(
    recorder: Recorder, weight: Any = None, indices: Any = None, padding_idx: Any = -1,
    scale_grad_by_freq: Any = False, sparse: Any = False,
) -> Tensor | None:  # fmt: skip
    row = None if padding_idx < 0 else padding_idx
    return _embedding(recorder, indices, weight, row, None, 2.0, scale_grad_by_freq, sparse)


@dataclass(frozen=True)
class _Looked:
    padding_idx: int
    scale: bool

    def __call__(self, x: Tensor, w: Tensor) -> Tensor:
        return torch.embedding(w, x, self.padding_idx, self.scale, False)


@dataclass(frozen=True)
class _Convolved:
    """A convolution as ``aten::convolution`` has its arguments."""

    arguments: tuple[Any, ...]

    def __call__(self, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.convolution(x, w, bias, *self.arguments)


def _convolve(
    recorder: Recorder,
    x: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Tensor | None:
    found = recorder.find(x, weight, bias)
    if found is None:
        return None
    n = weight.dim() - 2
    if x.dim() == n + 1:  # a single sample
        out = _convolve(
            recorder, x.unsqueeze(0), weight, bias, stride, padding, dilation, transposed, output_padding, groups
        )
        return None if out is None else out.squeeze(0)
    if isinstance(padding, str):
        twice = [d * (k - 1) for d, k in zip(_each(dilation, n), weight.shape[2:], strict=True)]
        if padding != "valid" and any(t % 2 for t in twice):
            return None
        padding = [0] * n if padding == "valid" else [t // 2 for t in twice]
    shape = (_each(stride, n), _each(padding, n), _each(dilation, n), transposed, _each(output_padding, n), groups)
    operation = _convolution_of(*shape, None if bias is None else tuple(bias.shape), found[1] is not None)
    return recorder.use(_Convolved(shape), operation, found, x, bias)


def _each(value: Any, n: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * n if len(values) == 1 else values


def _conv(
    recorder: Recorder, input: Any = None, weight: Any = None, bias: Any = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Tensor | None:  # fmt: skip
    return _convolve(recorder, input, weight, bias, stride, padding, dilation, False, 0, groups)


def _conv_transpose(
    recorder: Recorder, input: Any = None, weight: Any = None, bias: Any = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Tensor | None:  # fmt: skip
    return _convolve(recorder, input, weight, bias, stride, padding, dilation, True, output_padding, groups)


def _convolution(
    recorder: Recorder, input: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any,
    transposed: Any, output_padding: Any, groups: Any,
) -> Tensor | None:  # fmt: skip
    if isinstance(input, Tensor) and torch.is_autocast_enabled(input.device.type):
        return None  # which does not cast its arguments everywhere
    return _convolve(recorder, input, weight, bias, stride, padding, dilation, transposed, output_padding, groups)


_DIVIDED: dict[Any, Callable[..., Tensor | None]] = {
    **dict.fromkeys([F.linear, _aten.linear, _aten.linear.default], _linear),
    **dict.fromkeys([torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm], _matmul),
    **dict.fromkeys([_aten.matmul, _aten.matmul.default, _aten.mm, _aten.mm.default], _matmul),
    Tensor.__rmatmul__: _rmatmul,
    **dict.fromkeys([torch.addmm, Tensor.addmm, _aten.addmm, _aten.addmm.default], _addmm),
    F.embedding: _embedding,
    **dict.fromkeys([torch.embedding, _aten.embedding, _aten.embedding.default], _aten_embedding),
    **dict.fromkeys([F.conv1d, F.conv2d, F.conv3d, _aten.conv1d, _aten.conv2d, _aten.conv3d], _conv),
    **dict.fromkeys([_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default], _conv),
    **dict.fromkeys([_aten.conv1d.padding, _aten.conv2d.padding, _aten.conv3d.padding], _conv),
    **dict.fromkeys([F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d], _conv_transpose),
    **dict.fromkeys([_aten.conv_transpose1d, _aten.conv_transpose2d, _aten.conv_transpose3d], _conv_transpose),
    **dict.fromkeys([_aten.conv_transpose1d.default, _aten.conv_transpose2d.input], _conv_transpose),
    _aten.conv_transpose3d.input: _conv_transpose,
    **dict.fromkeys([torch.convolution, _aten.convolution, _aten.convolution.default], _convolution),
}


def _show(function: Any) -> Any:
    """A copy of a function of torch that does not hand itself to the mode, so that the mode sees what it calls."""
    checks = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    hidden = {**function.__globals__, **dict.fromkeys(checks, lambda *tensors: False)}
    arguments = (function.__name__, function.__defaults__, function.__closure__)
    shown = types.FunctionType(function.__code__, hidden, *arguments)
    shown.__kwdefaults__ = function.__kwdefaults__
    return shown


def _run_shown(shown: Any, recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    with recorder:
        return shown(*args, **kwargs)


def _run_divided(divide: Callable[..., Tensor | None], recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return func(*args, **kwargs)
    out = divide(recorder, *args, **kwargs)
    return recorder.follow(func, args, kwargs) if out is None else out


# Shown are attention, for its linear maps, and backwards within a backward, in which a checkpoint recomputes a part.
_HANDLERS: dict[Any, Callable[[Recorder, Any, Any, Any], Any]] = {
    **{function: functools.partial(_run_divided, divide) for function, divide in _DIVIDED.items()},
    **{
        function: functools.partial(_run_shown, _show(function))
        for function in (F.multi_head_attention_forward, torch.autograd.backward, torch.autograd.grad, Tensor.backward)
    },
}
