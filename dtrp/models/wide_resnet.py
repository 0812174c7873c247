"""Wide residual networks: BatchNorm and ReLU come before each convolution."""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Named, add_groups, conv, pooled_linear, with_kaiming_init


class PreActivationBlock(nn.Module):
    """y = relu(norm(x)); shortcut + conv(relu(norm(conv(y)))), with 3x3 convolutions.

    (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride). The shortcut is x or, where the shape changes,
    a 1x1 convolution of y.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv(in_channels, out_channels, 3, stride)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv(out_channels, out_channels, 3)
        same = stride == 1 and in_channels == out_channels
        self.projection = None if same else conv(in_channels, out_channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(x), inplace=True)
        shortcut: Tensor = x if self.projection is None else self.projection(y)
        residual: Tensor = self.conv2(F.relu(self.norm2(self.conv1(y)), inplace=True))
        residual += shortcut
        return residual


def wide_resnet(depth: int, widening: int, *, in_channels: int = 3, num_classes: int = 10) -> nn.Sequential:
    """WRN-depth-widening for CIFAR, without dropout: (N, in_channels, H, W), of any size, to (N, num_classes).

    ``depth`` is 6n + 4: a stem of 16 channels; three groups of n blocks, of 16, 32 and 64 times ``widening`` channels.

    Source: Zagoruyko and Komodakis, Wide residual networks, arXiv:1605.07146.
    """
    num_blocks = (depth - 4) // 6
    blocks: Named = OrderedDict(stem=conv(in_channels, 16, 3))
    groups = ((16 * widening * 2**group, num_blocks) for group in range(3))
    channels = add_groups(blocks, 16, groups, PreActivationBlock)
    head: Named = OrderedDict(norm=nn.BatchNorm2d(channels), relu=nn.ReLU())
    head.update(pooled_linear(channels, num_classes))
    blocks["head"] = nn.Sequential(head)
    return with_kaiming_init(nn.Sequential(blocks))
