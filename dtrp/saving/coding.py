"""Values as JSON and tensors, and back.

What is no tensor goes to the manifest as it is, or, where JSON has no such thing, as an object with one key that names
it. A tensor goes to `torch.distributed.checkpoint` under a key, and its place in the manifest says how it lay: where a
tensor begins in its line can decide the last bit of what is computed from it (`dtrp.tensors.layout`).
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, defaultdict
from typing import Any

import torch
from torch import Tensor

from ..tensors.layout import LINE_BYTES, Layout, aligned_room
from .manifest import CheckpointError, is_count

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype) and not str(dtype).startswith(("torch.q", "torch.bits"))
}


class Encoder:
    """Takes values apart; ``tensors`` collects the tensors by key."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.specs: dict[str, dict[str, Any]] = {}

    def encode(self, value: Any, key: str) -> Any:
        """The value as JSON.

        Args:
            value: a tensor, a number, text, None, or lists, tuples and dicts of such.
            key: what it is; a tensor's key, or the beginning of the keys of those in it.

        Raises:
            CheckpointError: there is something else in it.
        """
        if isinstance(value, Tensor):
            return self._tensor(value, key)
        if value is None or isinstance(value, (bool, int, str)):
            if type(value) not in (type(None), bool, int, str):
                raise _refused(value, key)
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {"float": repr(value)}
        if type(value) is list:
            return [self.encode(v, f"{key}.{i}") for i, v in enumerate(value)]
        if type(value) in (tuple, torch.Size):
            return {"tuple": [self.encode(v, f"{key}.{i}") for i, v in enumerate(value)]}
        if type(value) in (dict, OrderedDict, defaultdict, Counter):
            name = "counter" if type(value) is Counter else "dict"
            if all(type(k) in (bool, int, str, float) for k in value):
                return {name: [[self.encode(k, key), self.encode(v, f"{key}.{k}")] for k, v in value.items()]}
        raise _refused(value, key)

    def _tensor(self, t: Tensor, key: str) -> Any:
        if key in self.tensors:
            raise CheckpointError(f"two tensors would be saved as {key!r}; give one of them another name")
        if t.layout is torch.sparse_coo:
            parts = {"indices": t._indices(), "values": t._values()}
            coded = {name: self._tensor(part, f"{key}.{name}") for name, part in parts.items()}
            sparse = {"sparse": {**coded, "shape": list(t.shape), "coalesced": t.is_coalesced()}}
            return {**sparse, "grad": True} if t.requires_grad else sparse
        name = str(t.dtype).removeprefix("torch.")
        if t.layout is not torch.strided or name not in DTYPES:
            raise CheckpointError(
                f"{key} is a {t.layout} tensor of {t.dtype}; dense and sparse COO ones of ordinary dtypes can be saved"
            )
        layout = Layout.of(t)
        self.tensors[key] = t.detach()
        self.specs[key] = {"dtype": name, "shape": list(layout.shape), "strides": list(layout.strides),
                           "span": layout.span, "shift": layout.shift}  # fmt: skip
        return {"tensor": key, "grad": t.requires_grad} if t.requires_grad else {"tensor": key}


def _refused(value: Any, key: str) -> CheckpointError:
    return CheckpointError(
        f"{key} is a {type(value).__name__}, which no checkpoint can hold; it holds tensors, numbers, text, None, and lists, "
        "tuples and dicts of them"
    )


class Spec:
    """What a manifest says of one tensor, checked."""

    def __init__(self, key: str, said: Any) -> None:
        self.key = key
        names = {"dtype", "shape", "strides", "span", "shift"}
        right = isinstance(said, dict) and said.keys() == names and said["dtype"] in DTYPES
        right = right and all(is_count(said[name]) for name in ("span", "shift"))
        right = right and all(isinstance(said[n], list) and all(map(is_count, said[n])) for n in ("shape", "strides"))
        if not right:
            raise CheckpointError(f"what the manifest says of the tensor {key!r} is not of its type")
        self.dtype = DTYPES[said["dtype"]]
        self.layout = Layout(tuple(said["shape"]), tuple(said["strides"]), said["span"], said["shift"])
        self.numel = math.prod(self.layout.shape)
        self.nbytes = self.numel * self.dtype.itemsize
        own = self.layout
        reach = 1 + sum((n - 1) * stride for n, stride in zip(own.shape, own.strides, strict=False))
        if len(own.shape) != len(own.strides) or own.shift >= LINE_BYTES or own.shift % self.dtype.itemsize:
            raise CheckpointError(f"what the manifest says of the tensor {key!r} is no layout")
        if self.numel and (own.span != reach or own.span > 4 * self.numel):
            raise CheckpointError(f"what the manifest says of the tensor {key!r} is no layout")

    def laid(self, values: Tensor, device: torch.device) -> Tensor:
        """The values as the saved tensor lay, on ``device``."""
        if not self.numel:
            return torch.empty(self.layout.shape, dtype=self.dtype, device=device)
        room = aligned_room(self.layout.shift + self.layout.span * self.dtype.itemsize, device)
        tensor = self.layout.over(room, self.dtype)
        self.layout.fill(tensor, values.to(device))
        return tensor


class Decoder:
    """Puts values together.

    Args:
        tensors: what the reader has read, on the CPU, by key.
        specs: of those.
    """

    def __init__(self, tensors: dict[str, Tensor], specs: dict[str, Spec]) -> None:
        self._tensors, self._specs = tensors, specs

    def decode(self, coded: Any, device: torch.device) -> Any:
        """What `Encoder.encode` took apart, its tensors on ``device``.

        Raises:
            CheckpointError: it is none of that.
        """
        if coded is None or isinstance(coded, (bool, int, float, str)):
            return coded
        if isinstance(coded, list):
            return [self.decode(v, device) for v in coded]
        if isinstance(coded, dict) and coded:
            name, inner = next(iter(sorted(coded.items(), key=lambda entry: entry[0] == "grad")))
            if name == "float":
                return float(inner)
            if name == "tuple":
                return tuple(self.decode(v, device) for v in inner)
            if name == "dict":
                return {self.decode(k, device): self.decode(v, device) for k, v in inner}
            if name == "counter":
                return Counter({self.decode(k, device): self.decode(v, device) for k, v in inner})
            if name == "tensor":
                tensor = self._specs[inner].laid(self._tensors[inner], device)
                return tensor.requires_grad_() if coded.get("grad") else tensor
            if name == "sparse":
                indices, values = (self.decode(inner[part], device) for part in ("indices", "values"))
                tensor = torch.sparse_coo_tensor(
                    indices, values, inner["shape"], is_coalesced=inner["coalesced"], check_invariants=True
                )
                return tensor.requires_grad_() if coded.get("grad") else tensor
        raise CheckpointError(f"the manifest holds {str(coded)[:60]!r} where a value is expected")


def tensor_keys(coded: Any) -> list[str]:
    """The keys of all tensors in what `Encoder.encode` returned."""
    if isinstance(coded, list):
        return [key for v in coded for key in tensor_keys(v)]
    if isinstance(coded, dict):
        own = [coded["tensor"]] if isinstance(coded.get("tensor"), str) else []
        return own + [key for v in coded.values() for key in tensor_keys(v)]
    return []
