"""A module with other parameters and buffers in their places, for a while.

What `torch.func.functional_call` does for one forward, for anything that is run meanwhile; and the
places are looked up once, not in every call.
"""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor, nn

Place = tuple[dict[str, Tensor | None], str]  # of a module's own parameters or buffers, and the name among them


class Places:
    """Where each parameter and buffer of a module is; a tied one is in several places."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._places: dict[str, list[Place]] = {}
        names: dict[int, str] = {}  # of the first place of each tensor
        for prefix, owner in module.named_modules():
            for members in (owner._parameters, owner._buffers):
                for attribute, tensor in members.items():
                    if tensor is not None:
                        name = f"{prefix}.{attribute}" if prefix else attribute
                        first = names.setdefault(id(tensor), name)
                        self._places.setdefault(first, []).append((members, attribute))

    def of(self, name: str) -> list[Place]:
        """The places of the tensor that goes by ``name``."""
        places = self._places.get(name)
        if places is None:  # a buffer that the module has registered since
            prefix, _, attribute = name.rpartition(".")
            owner = self._module.get_submodule(prefix)
            self._places[name] = places = [(owner._buffers, attribute)]
        return places

    def hold(self, tensors: dict[str, Tensor]) -> Exchange:
        """Within it the module has ``tensors`` for its own of these names; what it puts in their places, they hold after."""
        if tensors and isinstance(self._module, torch.jit.ScriptModule):
            raise TypeError(
                "a scripted module cannot run at other weights than its own; give the module it was made of"
            )
        return Exchange([(name, self.of(name)) for name in tensors], tensors)


class Exchange:
    """The context of `Places.hold`."""

    __slots__ = ("_names", "_own", "_tensors")

    def __init__(self, names: list[tuple[str, list[Place]]], tensors: dict[str, Tensor]) -> None:
        self._names, self._tensors = names, tensors
        self._own: list[Tensor | None] = []

    def __enter__(self) -> None:
        for name, places in self._names:
            tensor = self._tensors[name]
            for members, attribute in places:
                self._own.append(members[attribute])
                members[attribute] = tensor

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        own = iter(self._own)
        for name, places in self._names:
            for members, attribute in places:
                changed = members[attribute]
                if changed is not None:
                    self._tensors[name] = changed
                members[attribute] = next(own)
