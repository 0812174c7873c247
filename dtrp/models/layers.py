"""The parts that the networks share."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn


def conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A convolution that keeps H and W (or divides them by ``stride``), without bias: a BatchNorm follows it."""
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)


def conv_norm_relu(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> OrderedDict[str, nn.Module]:
    """Convolution, BatchNorm, ReLU, by name, for an `nn.Sequential`."""
    return OrderedDict(
        conv=conv(in_channels, out_channels, kernel, stride),
        norm=nn.BatchNorm2d(out_channels),
        relu=nn.ReLU(inplace=True),
    )


def pooled_linear(channels: int, num_classes: int) -> OrderedDict[str, nn.Module]:
    """Features (N, channels, H, W), averaged over H and W, to logits (N, num_classes)."""
    return OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), linear=nn.Linear(channels, num_classes))


def with_kaiming_init(model: nn.Sequential) -> nn.Sequential:
    """The model, its convolutions drawn as in He et al. 2015 (arXiv:1502.01852), with the fan of the backward."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def check_positive(**numbers: int) -> None:
    """Raises ValueError where a number is not a whole one of at least 1."""
    for name, number in numbers.items():
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"{name}={number!r}: pass a whole number of at least 1")
