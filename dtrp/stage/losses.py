"""Losses beside the last stage's: terms that modules add, and the local losses of auxiliary networks.

A module may add a term to the loss from inside its forward (`add_loss`): it is differentiated at the stage of the
module, and its value goes on with the output, so that the last stage returns the loss with it.

In methods in which every stage learns from a local loss, an auxiliary network stands between a stage's output and that
loss. It is trained with the stage, by the stage's optimizer, and is no part of the model::

    h -> module -> out ---------> the next stage (no gradient comes back)
                    '-> aux -> loss_fn( , y)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import CrossEntropyLoss
from torch.utils.checkpoint import CheckpointFunction

from ..methods import Method
from ..tensors.torch_private import (
    buffer_dict,
    module_dict,
    non_persistent_buffers,
    parameter_dict,
    replace_tensor_dicts,
    uncompiled,
)
from ..typing import LossFn

_terms: ContextVar[list[Tensor] | None] = ContextVar("terms", default=None)  # of the forward that is running
Section = Literal["aux", "loss"]  # of a state dict, beside the model
Auxiliary = Sequence[nn.Module | None] | Callable[[Sequence[nn.Module]], Sequence[nn.Module | None]]


def add_loss(value: Tensor) -> None:
    """Add a term to the loss of the current micro-batch, from inside the forward of a module.

    For what a layer's own activations are to be trained by: the balance of a mixture of experts, an activation penalty,
    a KL divergence. The term counts in the loss of the mini-batch as the micro-batch does (by its samples, or by
    ``loss_weight``), and is differentiated by the stage that the module is in, also where the stage repeats its
    forward. `Pipeline.step` returns the loss with it, as the forward computed it. In a forward that no pipeline trains
    (the model by itself, `Pipeline.infer`), and in another thread than that of the forward, it does nothing.

    Args:
        value: a scalar tensor, the mean over the samples of the micro-batch.

    Raises:
        TypeError: it is no scalar tensor of a floating-point dtype.
        RuntimeError: under an activation checkpoint of the reentrant kind, where the term would have no gradient.

    Example:
        >>> import torch, dtrp
        >>> class Penalized(torch.nn.Linear):
        ...     def forward(self, x):
        ...         out = super().forward(x)
        ...         dtrp.add_loss(1e-3 * out.square().mean())
        ...         return out
        >>> pipe = dtrp.Pipeline([Penalized(4, 4), torch.nn.Linear(4, 2)], lambda params: torch.optim.SGD(params, lr=0.1),
        ...                      torch.nn.functional.cross_entropy)
        >>> loss = pipe.step(torch.randn(8, 4), torch.randint(2, (8,)))
    """
    if not isinstance(value, Tensor) or value.dim() or not value.is_floating_point():
        kind = (
            f"tensor of shape {tuple(value.shape)}, {value.dtype}"
            if isinstance(value, Tensor)
            else type(value).__name__
        )
        raise TypeError(f"add_loss was given a {kind}; pass a scalar floating-point tensor, the mean over the samples")
    _append(value)


@uncompiled
def _append(value: Tensor) -> None:
    if (terms := _terms.get()) is not None:
        if not torch.is_grad_enabled() and _in_reentrant_checkpoint():
            raise RuntimeError(
                "add_loss is called under torch.utils.checkpoint with use_reentrant=True, which runs the forward without a graph; "
                "the term would have no gradient: pass use_reentrant=False"
            )
        terms.append(
            value.to(torch.promote_types(value.dtype, torch.float32))
        )  # their sum is no sum of rounded numbers


def _in_reentrant_checkpoint() -> bool:
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not CheckpointFunction.forward.__code__:
        frame = frame.f_back
    return frame is not None


@contextmanager
def collecting(terms: list[Tensor] | None = None) -> Iterator[list[Tensor]]:
    """The context in which `add_loss` appends its terms to the list, by default a new one."""
    terms = [] if terms is None else terms
    token = _terms.set(terms)
    try:
        yield terms
    finally:
        _terms.reset(token)


class WithLoss(nn.Module):
    """A stage's module and what is trained with it for its loss as one module, which names the tensors of both.

    The module's tensors keep their names; those of the loss have the prefix ``aux.<name>.``, or ``loss.``

    Args:
        module: the stage's module, whose parameters, buffers and submodules this module shares.
        section: ``"aux"``, or ``"loss"``.
        network: the auxiliary network, as the submodule of a module that names it; or the module that computes the
            loss.
    """

    def __init__(self, module: nn.Module, section: Section, network: nn.Module) -> None:
        super().__init__()
        replace_tensor_dicts(self, parameter_dict(module), buffer_dict(module))
        self._non_persistent_buffers_set = non_persistent_buffers(module)
        module_dict(self).update(module_dict(module), **{section: network})


def loss_module(loss_fn: LossFn, modules: Sequence[nn.Module], method: Method) -> nn.Module | None:
    """The loss as a module to train with the last stage, if it has something to train, or buffers that it may move.

    Raises:
        ValueError: several stages would train it, or hold what is in it, or it has the name of a layer.
    """
    if not isinstance(loss_fn, nn.Module):
        return None
    trains = any(p.requires_grad for p in loss_fn.parameters())
    # Those of torch's losses are constants, as are those of a frozen teacher in eval mode.
    moves = any(
        member.training and buffer_dict(member) and type(member).__module__ != CrossEntropyLoss.__module__
        for member in loss_fn.modules()
    )
    if not trains and (not moves or method.local):
        return None
    if method.local and len(modules) > 1:
        raise ValueError(
            f"loss_fn has parameters to train, and by method {method.name!r} every stage calls it and would train them apart; "
            "freeze them (requires_grad_(False)), or put them into the auxiliary networks and the last stage"
        )
    holders = {id(p): (name, k) for k, module in enumerate(modules) for name, p in module.named_parameters()}
    for name, p in loss_fn.named_parameters():
        if id(p) in holders:
            raise ValueError(
                f"{name} of loss_fn is {holders[id(p)][0]} of stage {holders[id(p)][1]}; a loss has parameters of its own: let the "
                "last stage return what it reads of the model"
            )
    if "loss" in module_dict(modules[-1]):
        raise ValueError("the last stage has a layer named 'loss', as the tensors of loss_fn are; rename it")
    return loss_fn


def aux_of_stages(
    aux: Auxiliary | None, modules: Sequence[nn.Module], method: Method
) -> list[tuple[str, nn.Module] | None]:
    """The auxiliary network of each stage, and its name: that of the layer it follows, whatever K is.

    Args:
        aux: the argument of `dtrp.Pipeline`.
        modules: the stages.
        method: the row.

    Raises:
        TypeError, ValueError: there are none where the method needs them, or some where it does not, or not as many as
            stages.
    """
    if not method.local:
        if aux is not None:
            raise ValueError(
                f"aux= with method={method.name!r}, whose stages learn from the last one's loss alone; leave it out, or pass "
                "method='dgl'"
            )
        return [None] * len(modules)
    wanted = len(modules) - 1
    if aux is None and wanted:
        raise ValueError(
            f"method={method.name!r} trains each stage by a loss of its own: pass aux=, an auxiliary network for each of the "
            f"{wanted} stages before the last, or dtrp.models.auxiliary(x, num_classes), which makes them"
        )
    networks = aux(modules) if callable(aux) and not isinstance(aux, nn.Module) else aux or ()
    if not isinstance(networks, Sequence) or not all(isinstance(network, nn.Module | None) for network in networks):
        raise TypeError(
            f"aux is a {type(networks).__name__}; pass a list of modules, one for each stage before the last, or a function from "
            "the stages to such a list"
        )
    if len(networks) != wanted:
        raise ValueError(f"aux has {len(networks)} networks for the {wanted} stages before the last; pass one for each")
    named: list[tuple[str, nn.Module] | None] = []
    for k, (module, network) in enumerate(zip(modules, networks, strict=False)):
        if network is None and any(p.requires_grad for p in module.parameters()):
            raise ValueError(f"aux[{k}] is None, and stage {k} has parameters to train; give it a network")
        if network is not None and "aux" in module_dict(module):
            raise ValueError(f"stage {k} has a layer named 'aux', as its auxiliary network's tensors are; rename it")
        layers = list(module_dict(module))
        name = layers[-1] if isinstance(module, nn.Sequential) and layers else str(k)
        named.append(None if network is None else (name, network))
    _refuse_shared(modules, named)
    return [*named, None]


def _refuse_shared(modules: Sequence[nn.Module], named: Sequence[tuple[str, nn.Module] | None]) -> None:
    owner = {id(t): k for k, module in enumerate(modules) for t in [*module.parameters(), *module.buffers()]}
    for k, entry in enumerate(named):
        for name, t in [] if entry is None else [*entry[1].named_parameters(), *entry[1].named_buffers()]:
            if (other := owner.setdefault(id(t), k)) != k:
                raise ValueError(
                    f"{name} of aux[{k}] is a tensor of stage {other} too, and two stages would train it apart; give each its own"
                )
