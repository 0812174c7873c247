"""Values as JSON and tensors, and back.

What is no tensor goes to the manifest as it is, or, where JSON has no such thing, as an object with one key that names
it. A tensor goes to `torch.distributed.checkpoint` under a key, and the manifest records its layout: where a tensor
begins in its cache line can decide the last bit of what is computed from it (`dtrp.tensors.layout`).
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, defaultdict
from typing import Any

import torch
from torch import Tensor

from ..tensors.layout import LINE_BYTES, Layout, aligned_room, parts_of
from ..typing import Json
from .manifest import CheckpointError, are_counts

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype) and not str(dtype).startswith(("torch.q", "torch.bits"))
}


class Encoder:
    """Takes values apart.

    Attributes:
        tensors: tensors met so far, by key.
        specs: dtype and layout of each of them, for the manifest.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.specs: dict[str, dict[str, Json]] = {}

    def encode(self, value: Any, key: str) -> Json:
        """The value as JSON.

        Args:
            value: a tensor, a number, text, None, or lists, tuples and dicts of them.
            key: name of the value: the key of a tensor, or the beginning of the keys of the tensors in it.

        Raises:
            CheckpointError: it holds something else.
        """
        kind = type(value)
        if isinstance(value, Tensor):
            return self._tensor(value, key)
        if value is None or kind in (bool, int, str):
            return value
        if kind is float:
            return value if math.isfinite(value) else {"float": repr(value)}
        if kind in (list, tuple, torch.Size):
            entries = [self.encode(v, f"{key}.{i}") for i, v in enumerate(value)]
            return entries if kind is list else {"tuple": entries}
        if kind in (dict, OrderedDict, defaultdict, Counter) and all(type(k) in (bool, int, str, float) for k in value):
            pairs = [[self.encode(k, key), self.encode(v, f"{key}.{k}")] for k, v in value.items()]
            return {"counter" if kind is Counter else "dict": pairs}
        raise CheckpointError(
            f"{key} is a {kind.__name__}, which no checkpoint can hold; it holds tensors, numbers, text, None, and lists, "
            "tuples and dicts of them"
        )

    def _tensor(self, t: Tensor, key: str) -> dict[str, Json]:
        if key in self.tensors:
            raise CheckpointError(f"two tensors would be saved as {key!r}; give one of them another name")
        coded: dict[str, Json] = {"tensor": key}
        name = str(t.dtype).removeprefix("torch.")
        if t.layout is torch.sparse_coo:
            named = zip(("indices", "values"), parts_of(t), strict=True)
            parts = {name: self._tensor(part, f"{key}.{name}") for name, part in named}
            coded = {"sparse": {**parts, "shape": list(t.shape), "coalesced": t.is_coalesced()}}
        elif t.layout is not torch.strided or name not in DTYPES:
            raise CheckpointError(
                f"{key} is a {t.layout} tensor of {t.dtype}; dense and sparse COO ones of ordinary dtypes can be saved"
            )
        else:
            self.tensors[key] = t.detach()
            self.specs[key] = {"dtype": name, **Layout.from_tensor(t)._asdict()}
        return {**coded, "grad": True} if t.requires_grad else coded


class TensorSpec:
    """Dtype and layout of a tensor, as a manifest records them.

    Args:
        key: key of the tensor.
        spec: entry of the manifest.

    Raises:
        CheckpointError: no tensor can be like that.
    """

    def __init__(self, key: str, spec: Json) -> None:
        fits = isinstance(spec, dict) and spec.keys() == {"dtype", *Layout._fields} and spec["dtype"] in DTYPES
        fits = fits and are_counts([spec["span"], spec["shift"]])
        if not (fits and are_counts(spec["shape"]) and are_counts(spec["strides"])):
            raise CheckpointError(f"what the manifest says of the tensor {key!r} is not of its type")
        self.dtype = DTYPES[spec["dtype"]]
        self.layout = Layout(tuple(spec["shape"]), tuple(spec["strides"]), spec["span"], spec["shift"])
        self.numel = math.prod(self.layout.shape)
        self.nbytes = self.numel * self.dtype.itemsize
        shape, strides, span, shift = self.layout
        reach = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=False))
        fits = len(shape) == len(strides) and shift < LINE_BYTES and shift % self.dtype.itemsize == 0
        if not fits or (self.numel and (span != reach or span > 4 * self.numel)):
            raise CheckpointError(f"what the manifest says of the tensor {key!r} is no layout")

    def laid(self, values: Tensor, device: torch.device) -> Tensor:
        """The values on ``device``, in the layout of the saved tensor."""
        if not self.numel:
            return torch.empty(self.layout.shape, dtype=self.dtype, device=device)
        room = aligned_room(self.layout.shift + self.layout.span * self.dtype.itemsize, device)
        tensor = self.layout.over(room, self.dtype)
        self.layout.fill(tensor, values.to(device))
        return tensor


class Decoder:
    """Puts values together again.

    Args:
        tensors: tensors that have been read, on the CPU, by key.
        specs: dtypes and layouts of these tensors.
    """

    def __init__(self, tensors: dict[str, Tensor], specs: dict[str, TensorSpec]) -> None:
        self._tensors, self._specs = tensors, specs

    def decode(self, coded: Json, device: torch.device) -> Any:
        """The value that `Encoder.encode` took apart, its tensors on ``device``.

        Raises:
            CheckpointError: it is no encoded value.
        """
        match coded:
            case None | bool() | int() | float() | str():
                return coded
            case list():
                return [self.decode(entry, device) for entry in coded]
            case {"float": text}:
                return float(text)
            case {"tuple": entries}:
                return tuple(self.decode(entries, device))
            case {"dict": pairs}:
                return dict(self.decode(pairs, device))
            case {"counter": pairs}:
                return Counter(dict(self.decode(pairs, device)))
            case {"tensor": key}:
                tensor = self._specs[key].laid(self._tensors[key], device)
            case {"sparse": parts}:
                indices, values = self.decode(parts["indices"], device), self.decode(parts["values"], device)
                form = {"is_coalesced": parts["coalesced"], "check_invariants": True}
                tensor = torch.sparse_coo_tensor(indices, values, parts["shape"], **form)
            case _:
                raise CheckpointError(f"the manifest holds {str(coded)[:60]!r} where a value is expected")
        return tensor.requires_grad_() if coded.get("grad") else tensor


def tensor_keys(coded: Json) -> list[str]:
    """The keys of all tensors in what `Encoder.encode` returned."""
    if isinstance(coded, dict) and isinstance(coded.get("tensor"), str):
        return [coded["tensor"]]
    entries = coded.values() if isinstance(coded, dict) else coded if isinstance(coded, list) else ()
    return [key for entry in entries for key in tensor_keys(entry)]
