"""The auxiliary networks of a method in which every stage learns from a loss of its own.

One stands between a stage's output and that loss. It is trained with the stage, by the stage's optimizer, and is no part of
the model::

    h -> module -> out ---------> the next stage (no gradient comes back)
                    '-> aux -> loss_fn( , y)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ..methods import Method

Auxiliary = Sequence[nn.Module | None] | Callable[[Sequence[nn.Module]], Sequence[nn.Module | None]]


class WithAux(nn.Module):
    """A stage's module and its auxiliary network as one, for their tensors' sake.

    The module's tensors keep their names; the network's are called ``aux.<name>.`` and what they are in it.

    Args:
        module: of the stage; what it holds is this one's too.
        name: of the network.
        aux: the network.
    """

    def __init__(self, module: nn.Module, name: str, aux: nn.Module) -> None:
        super().__init__()
        self._parameters, self._buffers = module._parameters, module._buffers
        self._non_persistent_buffers_set = module._non_persistent_buffers_set
        networks = nn.Module()
        networks._modules[name] = aux  # a layer's name, which may be that of a method of any class of modules
        self._modules = {**module._modules, "aux": networks}


def aux_of_stages(aux: Any, modules: Sequence[nn.Module], method: Method) -> list[tuple[str, nn.Module] | None]:
    """Each stage's auxiliary network and its name, which is that of the layer it follows, whatever the number of stages.

    Args:
        aux: as given to `dtrp.Pipeline`.
        modules: the stages.
        method: the row.

    Raises:
        TypeError, ValueError: there are none where the method needs them, or some where it does not, or not as many as stages.
    """
    if not method.local:
        if aux is not None:
            raise ValueError(
                f"aux= with method={method.name!r}, whose stages learn from the last one's loss alone; leave it out, or pass "
                "method='dgl'"
            )
        return [None] * len(modules)
    own = len(modules) - 1
    if aux is None and own:
        raise ValueError(
            f"method={method.name!r} trains each stage by a loss of its own: pass aux=, an auxiliary network for each of the {own} "
            "stages before the last, or dtrp.models.auxiliary(x, num_classes), which makes them"
        )
    networks = aux(modules) if callable(aux) and not isinstance(aux, nn.Module) else aux or ()
    if not isinstance(networks, Sequence) or not all(isinstance(each, nn.Module | None) for each in networks):
        raise TypeError(
            f"aux is a {type(networks).__name__}; pass a list of modules, one for each stage before the last, or a function from "
            "the stages to such a list"
        )
    if len(networks) != own:
        raise ValueError(f"aux has {len(networks)} networks for the {own} stages before the last; pass one for each")
    named: list[tuple[str, nn.Module] | None] = []
    for k, (module, network) in enumerate(zip(modules, networks, strict=False)):
        if network is None and any(p.requires_grad for p in module.parameters()):
            raise ValueError(f"aux[{k}] is None, and stage {k} has parameters to train; give it a network")
        if network is not None and "aux" in module._modules:
            raise ValueError(f"stage {k} has a layer named 'aux', as its auxiliary network's tensors are; rename it")
        layers = list(module._modules)
        name = layers[-1] if isinstance(module, nn.Sequential) and layers else str(k)
        named.append(None if network is None else (name, network))
    _refuse_shared(modules, named)
    return [*named, None]


def _refuse_shared(modules: Sequence[nn.Module], named: Sequence[tuple[str, nn.Module] | None]) -> None:
    owner = {id(t): k for k, module in enumerate(modules) for t in [*module.parameters(), *module.buffers()]}
    for k, own in enumerate(named):
        tensors = [] if own is None else [*own[1].named_parameters(), *own[1].named_buffers()]
        for name, t in tensors:
            if (other := owner.setdefault(id(t), k)) != k:
                raise ValueError(
                    f"{name} of aux[{k}] is a tensor of stage {other} too, and two stages would train it apart; give each its own"
                )
