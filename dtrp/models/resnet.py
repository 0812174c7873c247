"""The residual networks of He et al. for CIFAR and for ImageNet.

Source: He et al., Deep residual learning for image recognition, arXiv:1512.03385.
"""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Named, add_groups, check_positive, conv, conv_norm_relu, pooled_linear, with_kaiming_init

STEMS = ("cifar", "imagenet")

# Depth: number of blocks in each of the four groups, and whether they are bottlenecks.
_GROUPS = {18: ((2, 2, 2, 2), False), 34: ((3, 4, 6, 3), False), 50: ((3, 4, 6, 3), True)}


class PaddedShortcut(nn.Module):
    """Option A, without parameters: every stride-th pixel, and zeros in the additional channels.

    Half of the additional channels come before the others, and half after them.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        new = out_channels - in_channels
        self.before, self.behind = new // 2, new - new // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.behind))


def projection(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Option B: a 1x1 convolution with BatchNorm."""
    return nn.Sequential(
        OrderedDict(conv=conv(in_channels, out_channels, 1, stride), norm=nn.BatchNorm2d(out_channels))
    )


def add_relu(residual: Tensor, shortcut: Tensor) -> Tensor:
    """relu(residual + shortcut), computed in place in ``residual``."""
    residual += shortcut
    return F.relu(residual, inplace=True)


class BasicBlock(nn.Module):
    """relu(x + norm(conv(relu(norm(conv(x)))))), with 3x3 convolutions.

    (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: nn.Module) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, out_channels, 3, stride)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv(out_channels, out_channels, 3)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return add_relu(self.norm2(self.conv2(out)), self.shortcut(x))


class Bottleneck(nn.Module):
    """A 1x1 convolution to a quarter of the channels, a 3x3 convolution, a 1x1 convolution back, and the shortcut.

    (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride). The 3x3 convolution has the stride, as is now
    common; in the paper the first 1x1 convolution has it.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: nn.Module) -> None:
        super().__init__()
        width = out_channels // 4
        self.conv1 = conv(in_channels, width, 1)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, stride)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv3 = conv(width, out_channels, 1)
        self.norm3 = nn.BatchNorm2d(out_channels)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x)), inplace=True)
        out = F.relu(self.norm2(self.conv2(out)), inplace=True)
        return add_relu(self.norm3(self.conv3(out)), self.shortcut(x))


def cifar_resnet(depth: int, *, width: int = 16, in_channels: int = 3, num_classes: int = 10) -> nn.Sequential:
    """The paper's CIFAR network: (N, in_channels, H, W) to (N, num_classes).

    A 3x3 stem; three groups of n basic blocks, of ``width``, 2 and 4 times ``width`` channels, where the second and
    third group halve the image size; the mean over H and W; a linear layer. Shortcuts are option A. Takes any image
    size.

    >>> len(cifar_resnet(14, width=8))  # a stem, 3 x 2 blocks, a head
    8

    Args:
        depth: number of layers with weights, 6n + 2.
        width: channels of the stem.
        in_channels: channels of an image.
        num_classes: number of classes, which is that of the logits.

    Raises:
        ValueError: a depth that is not 6n + 2 with n at least 1, or a number below 1.
    """
    check_positive(depth=depth, width=width, in_channels=in_channels, num_classes=num_classes)
    num_blocks, rest = divmod(depth - 2, 6)
    if rest or num_blocks < 1:
        below = max(num_blocks, 1) * 6 + 2
        nearest = f"{below}" if depth < below else f"{below} or {below + 6}"
        raise ValueError(f"depth={depth} but a CIFAR ResNet has 6n + 2 layers, n>=1; pass depth={nearest}")

    def block(channels: int, out_channels: int, stride: int) -> nn.Module:
        shortcut = nn.Identity() if stride == 1 else PaddedShortcut(channels, out_channels, stride)
        return BasicBlock(channels, out_channels, stride, shortcut)

    blocks: Named = OrderedDict(stem=nn.Sequential(conv_norm_relu(in_channels, width, 3)))
    channels = add_groups(blocks, width, ((width * 2**group, num_blocks) for group in range(3)), block)
    blocks["head"] = nn.Sequential(pooled_linear(channels, num_classes))
    return with_kaiming_init(nn.Sequential(blocks))


def resnet(depth: int, *, in_channels: int = 3, num_classes: int = 10, stem: str = "cifar") -> nn.Sequential:
    """The paper's ImageNet network of 18, 34 or 50 layers: (N, in_channels, H, W) to (N, num_classes).

    Four groups of 64, 128, 256 and 512 channels (four times as many in bottlenecks), shortcuts of option B. Takes any
    image size: with ``stem="cifar"`` (3x3, stride 1) the last group is at H / 8, with ``"imagenet"`` (7x7, stride 2,
    and a 3x3 max-pool, stride 2) at H / 32.
    """
    num_blocks, bottleneck = _GROUPS[depth]
    block_class, expansion = (Bottleneck, 4) if bottleneck else (BasicBlock, 1)

    def block(channels: int, out_channels: int, stride: int) -> nn.Module:
        same = stride == 1 and channels == out_channels
        shortcut = nn.Identity() if same else projection(channels, out_channels, stride)
        return block_class(channels, out_channels, stride, shortcut)

    first = conv_norm_relu(in_channels, 64, *((3, 1) if stem == "cifar" else (7, 2)))
    if stem == "imagenet":
        first["pool"] = nn.MaxPool2d(3, stride=2, padding=1)
    blocks: Named = OrderedDict(stem=nn.Sequential(first))
    groups = ((64 * 2**group * expansion, num) for group, num in enumerate(num_blocks))
    channels = add_groups(blocks, 64, groups, block)
    blocks["head"] = nn.Sequential(pooled_linear(channels, num_classes))
    return with_kaiming_init(nn.Sequential(blocks))
