"""Every name that torch keeps to itself and the library needs, with the reason.

Nothing else in the library uses a private name of torch. What is slow to import is imported on first use.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from types import ModuleType
from typing import Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import autocast_mode
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

# The marks that torch.export leaves where a region of `torch.no_grad` or `torch.autocast` begins and ends; they are
# compared by identity.
SET_GRAD_ENABLED = torch._C._set_grad_enabled
enter_autocast, exit_autocast = autocast_mode._enter_autocast, autocast_mode._exit_autocast
# Operators that torch.export writes into a graph: a check of the traced run, and what every cast becomes.
ASSERT_TENSOR_METADATA = torch.ops.aten._assert_tensor_metadata.default
TO_COPY = torch.ops.aten._to_copy.default
# `pytree` takes any nesting of containers apart, also those that users have registered; `torch.utils._cxx_pytree` and
# `torch.export` are built on it, and there is no public module.
pytree = torch.utils._pytree
# `uncompiled` keeps torch.compile out of a function. `torch.compiler.disable`, which is public, imports the compiler at
# once.
uncompiled = torch._compile._disable_dynamo
# By this function of `torch.nn.modules.transformer` encoders and decoders look whether a mask is causal where nobody says.
CAUSAL_MASK_DETECTION = "_detect_is_causal_mask"
# `TorchDispatchMode` sees every operator that runs; torch documents it, under this private path alone.

# -- tensors --------------------------------------------------------------------------------------


def write_count(t: Tensor) -> int:
    """How often the memory of a tensor was written in place: autograd counts it, and no public name tells."""
    return t._version


def sparse_parts(t: Tensor) -> tuple[Tensor, Tensor]:
    """Indices and values of a sparse COO tensor, also of one that is not coalesced, where the public methods raise."""
    return t._indices(), t._values()


def has_internal_overlap(t: Tensor) -> bool:
    """Whether elements of a strided tensor may share memory, as torch's in-place operations check it."""
    return bool(torch._debug_has_internal_overlap(t))


class _Foreach:
    """Operations on lists of tensors, in one launch each, as torch's optimizers do them; ``foreach.mul_(ts, 2.0)``."""

    def __getattr__(self, name: str) -> Any:
        operation = getattr(torch, f"_foreach_{name}")
        setattr(self, name, operation)
        return operation

    def clone(self, tensors: list[Tensor]) -> list[Tensor]:
        """Copies of tensors."""
        return list(torch._foreach_mul(tensors, 1.0))


foreach = _Foreach()


def without_functorch_wrappers(t: Tensor) -> Tensor:
    """The tensor within the wrappers that ``torch.func`` transforms put around it, which hide its memory."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(t):
        t = functorch.get_unwrapped(t)
    return t


def without_base(t: Tensor) -> Tensor:
    """The tensor; not as a view if it is one, which may not be written in place where an ``autograd.Function`` returns it."""
    return torch.ops.aten._unsafe_view.default(t, t.shape) if t._is_view() else t


def is_wrapped_by_functorch(t: Tensor) -> bool:
    """Whether a ``torch.func`` transform has put a wrapper around the tensor."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(t))


# Within it functions of torch call neither modes nor subclasses of tensors.
without_torch_functions = torch._C.DisableTorchFunction


def has_gradient_hooks(t: Tensor) -> bool:
    """Whether the tensor has hooks of either of the two kinds below."""
    return bool(t._backward_hooks or t._post_accumulate_grad_hooks)


def backward_hooks(t: Tensor) -> dict[int, Any]:
    """The hooks of ``t.register_hook``; no public name lists them."""
    return t._backward_hooks or {}


def grad_accumulated_hooks(t: Tensor) -> dict[int, Any]:
    """The hooks of ``t.register_post_accumulate_grad_hook``; no public name lists them."""
    return t._post_accumulate_grad_hooks or {}


def in_backward() -> bool:
    """Whether autograd runs a backward in this thread, as `torch.utils.checkpoint` asks."""
    return torch._C._current_graph_task_id() != -1


# -- modules --------------------------------------------------------------------------------------
# The dictionaries themselves: a module can so be given other tensors for a moment, without the checks of ``setattr``
# and without a call of hooks, and None entries and the order of the names stay. ``named_*()`` yields copies without
# them.


def parameter_dict(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The parameters of the module itself, by name."""
    return module._parameters


def buffer_dict(module: nn.Module) -> dict[str, Tensor | None]:
    """The buffers of the module itself, by name."""
    return module._buffers


def module_dict(module: nn.Module) -> dict[str, nn.Module | None]:
    """The children of the module, by name."""
    return module._modules


def replace_tensor_dicts(module: nn.Module, parameters: dict[str, Any], buffers: dict[str, Any]) -> None:
    """Give the module these dictionaries for its parameters and buffers."""
    module._parameters, module._buffers = parameters, buffers


def non_persistent_buffers(module: nn.Module) -> set[str]:
    """The names of the module's buffers that state dicts leave out; no public name tells."""
    return module._non_persistent_buffers_set


def forward_hooks(module: nn.Module) -> list[tuple[int, Any]]:
    """The hooks before and after the module's forward, with their numbers; no public name lists them."""
    return [*module._forward_pre_hooks.items(), *module._forward_hooks.items()]


def module_backward_hooks(module: nn.Module) -> list[tuple[int, Any]]:
    """The hooks before and after the module's backward, with their numbers; no public name lists them."""
    return [*module._backward_pre_hooks.items(), *module._backward_hooks.items()]


def global_hooks() -> tuple[list[tuple[int, Any]], list[tuple[int, Any]]]:
    """The hooks on the forward of every module, and those on its backward, with their numbers; no public name lists them."""
    of_all = nn.modules.module
    forward = [*of_all._global_forward_pre_hooks.items(), *of_all._global_forward_hooks.items()]
    return forward, [*of_all._global_backward_pre_hooks.items(), *of_all._global_backward_hooks.items()]


def forward_contexts(stage: Any) -> bool:
    """Whether a pipeline stage of torch 2.15 or later has a context registered for its forwards; no public name tells."""
    return bool(getattr(stage, "_forward_contexts", None))


# -- graphs of torch.export -----------------------------------------------------------------------


def is_operator(target: Any) -> TypeGuard[torch._ops.OpOverload]:
    """Whether the target of a graph's node is an operator of torch: the class has no public name."""
    return isinstance(target, torch._ops.OpOverload)


def operator_schema(target: torch._ops.OpOverload) -> Any:
    """Name, arguments and aliases of an operator, which only its schema tells."""
    return target._schema


def writes_arguments(target: Any) -> bool:
    """Whether the target of a graph's node is an operator that writes an argument in place."""
    return is_operator(target) and bool(target._schema.is_mutable)


def region_passes() -> tuple[ModuleType, ModuleType]:
    """The passes by which torch.export makes one operation of a region; no option of it leaves them out."""
    from torch._export.passes import replace_autocast_with_hop_pass, replace_set_grad_with_hop_pass

    return replace_autocast_with_hop_pass, replace_set_grad_with_hop_pass


# -- process groups -------------------------------------------------------------------------------
# A pipeline makes its groups itself, beside `torch.distributed.new_group`, which lets nobody name them.


def default_store() -> Any:
    """The store of the default process group; no public name returns it."""
    return dist.distributed_c10d._get_default_store()


def default_gloo_devices() -> list[Any]:
    """The network devices of the default group; empty where it is not gloo's, or does not show them."""
    with suppress(RuntimeError):
        backend = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
        return list(getattr(getattr(backend, "options", None), "_devices", ()))
    return []


def gloo_options(timeout: timedelta, devices: Sequence[Any]) -> Any:
    """What a gloo group is made with: the class and its fields have no public names."""
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout, options._devices = timeout, devices
    return options


def nccl_options(timeout: timedelta) -> Any:
    """What an NCCL group is made with: its time-out has no public name."""
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return options


# -- checkpoints ----------------------------------------------------------------------------------


def storage_info_class() -> type[Any]:
    """The class by which ``.metadata`` of a distributed checkpoint tells a tensor's place; it has no public name."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    return _StorageInfo
