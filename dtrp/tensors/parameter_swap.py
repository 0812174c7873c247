"""A module with other parameters in their places, for a while.

What `torch.func.functional_call` does for one forward, for anything that is run meanwhile; and the
places are looked up once, not in every call.
"""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor, nn

Place = tuple[dict[str, nn.Parameter | None], str]  # of a module's own parameters, and the name among them


class Places:
    """Where each parameter of a module is; a tied one is in several places."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._places: dict[str, list[Place]] = {}
        names: dict[int, str] = {}  # of the first place of each tensor
        for prefix, owner in module.named_modules():
            for attribute, tensor in owner._parameters.items():
                if tensor is not None:
                    name = f"{prefix}.{attribute}" if prefix else attribute
                    first = names.setdefault(id(tensor), name)
                    self._places.setdefault(first, []).append((owner._parameters, attribute))

    def hold(self, tensors: dict[str, Tensor]) -> Exchange:
        """Within it the module has ``tensors`` for its own of these names."""
        if tensors and isinstance(self._module, torch.jit.ScriptModule):
            raise TypeError(
                "a scripted module cannot run at other weights than its own; give the module it was made of"
            )
        return Exchange([(self._places[name], tensor) for name, tensor in tensors.items()])


class Exchange:
    """The context of `Places.hold`."""

    __slots__ = ("_own", "_places")

    def __init__(self, places: list[tuple[list[Place], Tensor]]) -> None:
        self._places = places
        self._own: list[nn.Parameter | None] = []

    def __enter__(self) -> None:
        for places, tensor in self._places:
            for members, attribute in places:
                self._own.append(members[attribute])
                members[attribute] = tensor  # type: ignore[assignment]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        own = iter(self._own)
        for places, _ in self._places:
            for members, attribute in places:
                members[attribute] = next(own)
