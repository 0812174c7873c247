"""Auxiliary networks: classifiers of the output of a stage, for methods in which every stage has a local loss."""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..tensors.module_mode import in_mode
from ..tensors.pytree import map_tensors
from ..typing import Tree
from .layers import Named, check_positive, conv_norm_relu

_DEPTH = 3  # number of convolutions, and of hidden layers


def auxiliary(example: Tree, num_classes: int) -> Callable[[Sequence[nn.Module]], list[nn.Module | None]]:
    """The auxiliary networks of decoupled greedy learning, for the stages of any classifier.

    >>> from dtrp.models import get_model
    >>> networks = auxiliary(torch.randn(2, 3, 32, 32), 10)([get_model("resnet20")[:5], get_model("resnet20")[5:]])
    >>> networks[0](torch.randn(2, 32, 16, 16)).shape
    torch.Size([2, 10])

    ::

        pipe = dtrp.Pipeline(model, optimizer, loss_fn, num_stages=4, method="dgl", aux=auxiliary(x, 10))

    - For images (N, C, H, W), the paper's MLP-SR: averaged to a quarter of H and W; three 1x1 convolutions with
      BatchNorm and ReLU; averaged to 2x2; three hidden layers of width 4C with BatchNorm and ReLU; a linear layer.
    - For features (N, C): the same hidden layers, of width C, and a linear layer (ours).
    - For features (N, T, C), such as text: LayerNorm and a linear layer, at each of the T positions (ours).

    BatchNorm needs at least two samples in each micro-batch. The weights are drawn from torch's global generator.
    Source: Belilovsky et al., Decoupled greedy learning of CNNs, ICML 2020; arXiv:1901.08164, and the authors' code for
    what the paper leaves open.

    Args:
        example: input of the model, of any number of samples; it goes through the stages once, in eval mode.
        num_classes: number of classes, which is that of the logits.

    Returns:
        A function from the stages to a network for each stage but the last; None for a stage without trainable
        parameters.

    Raises:
        ValueError: raised by that function, for a stage whose output fits none of these networks.
    """
    check_positive(num_classes=num_classes)

    @torch.no_grad()
    def networks(stages: Sequence[nn.Module]) -> list[nn.Module | None]:
        made: list[nn.Module | None] = []
        value = example
        for k, stage in enumerate(stages[:-1]):
            weight = next(itertools.chain(stage.parameters(), stage.buffers()), None)
            if weight is not None:
                value = map_tensors(partial(torch.Tensor.to, device=weight.device), value)
            with in_mode(stage, training=False):
                value = stage(value)
            trains = any(p.requires_grad for p in stage.parameters())
            made.append(_network(k, value, num_classes) if trains else None)
        return made

    return networks


def _network(stage: int, out: Tree, num_classes: int) -> nn.Module:
    """The network for ``out``, the output of a stage."""
    if not isinstance(out, Tensor) or not out.is_floating_point() or out.dim() not in (2, 3, 4):
        what = f"{out.dtype} of shape {tuple(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
        raise ValueError(
            f"stage {stage} passes on {what}, and the auxiliary networks made here take features (N, C), (N, T, C) or "
            "(N, C, H, W); pass modules of your own, aux=[...], or cut the model elsewhere"
        )
    layers: Named = OrderedDict()
    width = out.shape[-1] if out.dim() == 3 else out.shape[1]
    if out.dim() == 3:
        layers["norm"] = nn.LayerNorm(width)
    if out.dim() == 4:
        layers["shrink"] = nn.AdaptiveAvgPool2d(tuple(math.ceil(size / 4) for size in out.shape[2:]))
        for i in range(1, _DEPTH + 1):
            layers[f"block{i}"] = nn.Sequential(conv_norm_relu(width, width, 1))
        layers.update(pool=nn.AdaptiveAvgPool2d(2), flatten=nn.Flatten())
        width *= 4
    if out.dim() != 3:
        for i in range(1, _DEPTH + 1):
            linear = nn.Linear(width, width, bias=False)  # BatchNorm would subtract a bias
            layers[f"hidden{i}"] = nn.Sequential(OrderedDict(linear=linear, norm=nn.BatchNorm1d(width), relu=nn.ReLU()))
    layers["linear"] = nn.Linear(width, num_classes)
    return nn.Sequential(layers).to(out)
