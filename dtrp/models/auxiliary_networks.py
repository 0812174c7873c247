"""Auxiliary networks: classifiers of what a stage passes on, for methods in which every stage has a loss of its own."""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..tensors.module_mode import in_mode
from ..tensors.pytree import map_tensors
from .layers import check_positive, conv_norm_relu

_DEPTH = 3  # convolutions, and hidden layers


def auxiliary(example: Any, num_classes: int) -> Callable[[Sequence[nn.Module]], list[nn.Module | None]]:
    """The auxiliary networks of decoupled greedy learning, for the stages of any model that classifies.

    >>> from dtrp.models import get_model
    >>> networks = auxiliary(torch.randn(2, 3, 32, 32), 10)([get_model("resnet20")[:5], get_model("resnet20")[5:]])
    >>> networks[0](torch.randn(2, 32, 16, 16)).shape
    torch.Size([2, 10])

    ::

        pipe = dtrp.Pipeline(model, optimizer, loss_fn, num_stages=4, method="dgl", aux=auxiliary(x, 10))

    - For images (N, C, H, W), the paper's MLP-SR: averaged to a quarter of H and W; three 1x1 convolutions with BatchNorm and
      ReLU; averaged to 2x2; three hidden layers of 4C with BatchNorm and ReLU, and a linear one.
    - For features (N, C): the same hidden layers, of C, and a linear one (ours).
    - For features (N, T, C), as of text: LayerNorm and a linear layer, at each of the T places (ours).

    BatchNorm takes at least two samples in each micro-batch. The weights are drawn from torch's global generator.
    Source: Belilovsky et al., Decoupled greedy learning of CNNs, ICML 2020; arXiv:1901.08164, and the code of its authors for
    what the paper leaves open.

    Args:
        example: what the model is called with, of any number of samples; it goes through the stages once, in eval mode.
        num_classes: outputs.

    Returns:
        A function from the stages to a network for each but the last; None for one that has nothing to train.

    Raises:
        ValueError: from that function: a stage passes on what none of these fits.
    """
    check_positive(num_classes=num_classes)

    @torch.no_grad()
    def networks(stages: Sequence[nn.Module]) -> list[nn.Module | None]:
        made: list[nn.Module | None] = []
        value = example
        for k, stage in enumerate(stages[:-1]):
            own = next(itertools.chain(stage.parameters(), stage.buffers()), None)
            if own is not None:
                value = map_tensors(partial(torch.Tensor.to, device=own.device), value)
            with in_mode(stage, training=False):
                value = stage(value)
            trains = any(p.requires_grad for p in stage.parameters())
            made.append(_network(k, value, num_classes) if trains else None)
        return made

    return networks


def _network(stage: int, out: Any, num_classes: int) -> nn.Module:
    if not isinstance(out, Tensor) or not out.is_floating_point() or out.dim() not in (2, 3, 4):
        what = f"{out.dtype} of shape {tuple(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
        raise ValueError(
            f"stage {stage} passes on {what}, and the auxiliary networks made here take features (N, C), (N, T, C) or "
            "(N, C, H, W); pass modules of your own, aux=[...], or cut the model elsewhere"
        )
    channels = out.shape[-1] if out.dim() == 3 else out.shape[1]
    if out.dim() == 4:
        layers = _of_images(channels, *out.shape[2:])
        channels *= 4
    else:
        layers = OrderedDict(norm=nn.LayerNorm(channels)) if out.dim() == 3 else OrderedDict()
    if out.dim() != 3:
        layers.update(_hidden(channels))
    layers["linear"] = nn.Linear(channels, num_classes)
    return nn.Sequential(layers).to(out)


def _of_images(channels: int, height: int, width: int) -> OrderedDict[str, nn.Module]:
    """(N, channels, height, width) to (N, 4 * channels)."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        shrink=nn.AdaptiveAvgPool2d((math.ceil(height / 4), math.ceil(width / 4)))
    )
    for i in range(1, _DEPTH + 1):
        layers[f"block{i}"] = nn.Sequential(conv_norm_relu(channels, channels, 1))
    layers["pool"] = nn.AdaptiveAvgPool2d(2)
    layers["flatten"] = nn.Flatten()
    return layers


def _hidden(width: int) -> OrderedDict[str, nn.Module]:
    """(N, width) to the same."""
    return OrderedDict(
        (
            f"hidden{i}",
            nn.Sequential(
                OrderedDict(
                    linear=nn.Linear(width, width, bias=False), norm=nn.BatchNorm1d(width), relu=nn.ReLU()
                )  # BatchNorm takes a bias out again
            ),
        )
        for i in range(1, _DEPTH + 1)
    )
