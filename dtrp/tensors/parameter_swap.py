"""A module with other parameters in their places, for a while.

What `torch.func.functional_call` does for one forward, for anything that is run meanwhile; and the
places are looked up once, not in every call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from .torch_private import parameter_dict


class Places:
    """Where each parameter of a module is; a tied one is in several places."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        # By name of the parameter: the dictionaries that hold it, and its name in them.
        self._places: dict[str, list[tuple[dict[str, nn.Parameter | None], str]]] = {}
        names: dict[int, str] = {}  # of the first place of each tensor
        for prefix, owner in module.named_modules():
            for attribute, tensor in parameter_dict(owner).items():
                if tensor is not None:
                    name = f"{prefix}.{attribute}" if prefix else attribute
                    first = names.setdefault(id(tensor), name)
                    self._places.setdefault(first, []).append((parameter_dict(owner), attribute))

    def hold(self, tensors: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Within it the module has ``tensors`` in the places of its parameters of these names."""
        return self._holding(tensors) if tensors else nullcontext()

    @contextmanager
    def _holding(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        if isinstance(self._module, torch.jit.ScriptModule):
            raise TypeError(
                "a scripted module cannot run at other weights than its own; give the module it was made of"
            )
        places = [(*place, tensor) for name, tensor in tensors.items() for place in self._places[name]]
        before = [parameters[attribute] for parameters, attribute, _ in places]
        try:
            for parameters, attribute, tensor in places:
                parameters[attribute] = tensor  # type: ignore[assignment]
            yield
        finally:
            for (parameters, attribute, _), parameter in zip(places, before, strict=True):
                parameters[attribute] = parameter
