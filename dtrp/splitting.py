"""A model into stages.

A stage is an `nn.Sequential` of some of the model's own layers under their own names, so that its
parameters are the model's objects and its state dict is a part of the model's.
"""

from __future__ import annotations

import itertools
import operator
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn


def equal_cuts(num_layers: int, num_stages: int) -> list[int]:
    """Cuts into equal numbers of layers; the first stages take the remainder.

    >>> equal_cuts(11, 4)
    [3, 6, 9]
    """
    size, rest = divmod(num_layers, num_stages)
    return [k * size + min(k, rest) for k in range(1, num_stages)]


def into_stages(
    model: nn.Sequential | Sequence[nn.Module], num_stages: int | None = None, cuts: Sequence[int] | None = None
) -> list[nn.Sequential]:
    """The stages of a model, each layer in exactly one of them.

    Args:
        model: an `nn.Sequential`, cut between its top-level layers, or a list of modules, one a stage.
        num_stages: K. None: the length of the list, or of ``cuts`` plus 1, or 1.
        cuts: index of the first layer of stages 1..K-1, for a Sequential.

    Raises:
        TypeError: a model that is neither, or has a forward of its own.
        ValueError: stages without layers, cuts out of order or range, a parameter in two stages.
    """
    if isinstance(model, nn.Module):
        layers = layers_of(model)
        if cuts is None:
            cuts = _cuts_for(len(layers), 1 if num_stages is None else num_stages)
        else:
            cuts = _checked_cuts(cuts, len(layers), num_stages)
    else:
        layers = layers_of(model)
        if cuts is not None:
            raise ValueError(
                f"cuts={list(cuts)} with a list of {len(layers)} modules, which already is one module a stage; "
                "pass nn.Sequential(*modules) to cut it elsewhere"
            )
        if num_stages not in (None, len(layers)):
            raise ValueError(
                f"num_stages={num_stages} but the list has {len(layers)} modules, one a stage; leave num_stages out, "
                "or pass nn.Sequential(*modules)"
            )
        cuts = range(1, len(layers))
    bounds = [0, *cuts, len(layers)]
    stages = [nn.Sequential(OrderedDict(layers[start:end])) for start, end in itertools.pairwise(bounds)]
    _refuse_shared(stages)
    return stages


def _sequential_of(modules: Sequence[nn.Module]) -> nn.Sequential:
    if not isinstance(modules, Sequence) or not all(isinstance(module, nn.Module) for module in modules):
        raise TypeError(
            f"model is a {type(modules).__name__}; pass an nn.Sequential, or a list of modules, one a stage"
        )
    if not modules:
        raise ValueError("model is an empty list; pass at least one module")
    return nn.Sequential(*modules)


def layers_of(model: nn.Module | Sequence[nn.Module]) -> list[tuple[str, nn.Module]]:
    """The layers between which a model can be cut, with their names."""
    if not isinstance(model, nn.Module):
        model = _sequential_of(model)
    if not isinstance(model, nn.Sequential) or type(model).forward is not nn.Sequential.forward:
        raise TypeError(
            f"model is a {type(model).__name__}, whose forward cannot be cut between layers; pass an nn.Sequential of its "
            "parts, or a list of modules, one a stage"
        )
    own = [*model._parameters, *model._buffers]
    if own or model._forward_hooks or model._forward_pre_hooks:
        raise TypeError(
            f"the nn.Sequential itself has {', '.join(own) or 'hooks'}, which belongs to no layer; move it into a layer"
        )
    if not len(model):
        raise ValueError("model is an empty nn.Sequential; pass at least one layer")
    return list(model._modules.items())


def _cuts_for(num_layers: int, num_stages: int) -> list[int]:
    if not isinstance(num_stages, int) or num_stages < 1:
        raise ValueError(f"num_stages={num_stages!r}: pass a whole number of at least 1")
    if num_stages > num_layers:
        raise ValueError(
            f"num_stages={num_stages} but the model has {num_layers} layers; pass num_stages<={num_layers}"
        )
    return equal_cuts(num_layers, num_stages)


def _checked_cuts(cuts: Sequence[int], num_layers: int, num_stages: int | None) -> list[int]:
    try:
        cuts = [operator.index(cut) for cut in cuts]
    except TypeError:
        raise ValueError(f"cuts={cuts!r}: pass whole numbers, the first layer of each stage but the first") from None
    if num_stages is not None and num_stages != len(cuts) + 1:
        raise ValueError(f"cuts={cuts} make {len(cuts) + 1} stages but num_stages={num_stages}; pass one of the two")
    for cut in cuts:
        if not 0 < cut < num_layers:
            raise ValueError(
                f"cuts={cuts}: {cut!r} is out of range; the model has {num_layers} layers, cut at 1..{num_layers - 1}"
            )
    if any(a >= b for a, b in itertools.pairwise(cuts)):
        raise ValueError(f"cuts={cuts}: put them in rising order, each once; every stage has at least one layer")
    return cuts


def _refuse_shared(stages: Sequence[nn.Module]) -> None:
    owner: dict[int, tuple[int, str]] = {}
    for index, stage in enumerate(stages):
        tensors = [*stage.named_parameters(), *stage.named_buffers()]
        for name, tensor in tensors:
            first, other = owner.setdefault(id(tensor), (index, name))
            if first != index:
                raise ValueError(
                    f"{other} of stage {first} and {name} of stage {index} are one tensor; two stages would train it apart. "
                    "Cut the model so that both lie in one stage, or give each its own"
                )


def stage_device(stage: nn.Module) -> torch.device | None:
    """Where a stage's parameters and buffers are; None when it has none.

    Raises:
        ValueError: they are on several devices.
    """
    places = {t.device: name for name, t in [*stage.named_parameters(), *stage.named_buffers()]}
    if len(places) > 1:
        where = ", ".join(f"{name} on {device}" for device, name in places.items())
        raise ValueError(f"one stage has its tensors on several devices ({where}); pass devices=, one per stage")
    return next(iter(places), None)
