"""A multilayer perceptron."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from .layers import Named


def mlp(
    *, in_channels: int = 3, num_classes: int = 10, image_size: int = 32, width: int = 256, hidden: int = 4
) -> nn.Sequential:
    """``hidden`` layers of ``width`` ReLUs: (N, in_channels, image_size, image_size) to (N, num_classes)."""
    blocks: Named = OrderedDict(flatten=nn.Flatten())
    inputs = in_channels * image_size**2
    for i in range(1, hidden + 1):
        blocks[f"block{i}"] = nn.Sequential(OrderedDict(linear=nn.Linear(inputs, width), relu=nn.ReLU()))
        inputs = width
    blocks["head"] = nn.Linear(inputs, num_classes)
    return nn.Sequential(blocks)
