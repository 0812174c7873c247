"""Layers and loops that several networks share."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import TypeAlias

from torch import nn

from ..validation import whole

# Layers or blocks by name, for an `nn.Sequential`.
Named: TypeAlias = OrderedDict[str, nn.Module]

# (input channels, output channels, stride) -> a residual block.
BlockMaker: TypeAlias = Callable[[int, int, int], nn.Module]


def conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A convolution that keeps H and W, or divides them by ``stride``; without bias, since a BatchNorm follows."""
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)


def conv_norm_relu(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> Named:
    """Named layers for an `nn.Sequential`: convolution, BatchNorm, ReLU."""
    return OrderedDict(
        conv=conv(in_channels, out_channels, kernel, stride),
        norm=nn.BatchNorm2d(out_channels),
        relu=nn.ReLU(inplace=True),
    )


def pooled_linear(channels: int, num_classes: int) -> Named:
    """Named layers from features (N, channels, H, W), averaged over H and W, to logits (N, num_classes)."""
    return OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), linear=nn.Linear(channels, num_classes))


def add_groups(blocks: Named, channels: int, groups: Iterable[tuple[int, int]], make_block: BlockMaker) -> int:
    """Append groups of residual blocks; the first block of every group but the first has stride 2.

    Args:
        blocks: named blocks to append to; a new block is named for its place in it.
        channels: input channels of the first group.
        groups: output channels and number of blocks of each group.
        make_block: maker of blocks.

    Returns:
        The output channels of the last group.
    """
    for group, (out_channels, num_blocks) in enumerate(groups):
        for i in range(num_blocks):
            blocks[f"block{len(blocks)}"] = make_block(channels, out_channels, 2 if group and i == 0 else 1)
            channels = out_channels
    return channels


def with_kaiming_init(model: nn.Sequential) -> nn.Sequential:
    """The model, with convolutions initialized as in He et al. 2015 (arXiv:1502.01852), by their fan out."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def check_positive(**numbers: int) -> None:
    """Raise ValueError for a number that is not whole or below 1."""
    for name, number in numbers.items():
        whole(name, number)
