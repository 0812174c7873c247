"""VGG with BatchNorm, for small images."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from .layers import Named, conv_norm_relu, pooled_linear, with_kaiming_init

# Output channels of the 3x3 convolutions, in units of the first one's; a max-pool at the end of each row halves H and W.
_ROWS = {
    11: ((1,), (2,), (4, 4), (8, 8), (8, 8)),
    16: ((1, 1), (2, 2), (4, 4, 4), (8, 8, 8), (8, 8, 8)),
}


def vgg(
    depth: int, *, width: int = 64, in_channels: int = 3, num_classes: int = 10, image_size: int = 32
) -> nn.Sequential:
    """VGG-11 or VGG-16: (N, in_channels, H, W), H and W at least 32, to (N, num_classes).

    ``width`` is the number of channels of the first convolution, 64 in the paper; the last ones have eight times as
    many.

    Source: Simonyan and Zisserman, arXiv:1409.1556, configurations A and D. Unlike the paper: a BatchNorm after each
    convolution (which then has no bias), and one linear layer on the averaged features in place of three.
    """
    rows = _ROWS[depth]
    if image_size < 2 ** len(rows):
        raise ValueError(
            f"image_size={image_size} but vgg{depth} halves the image {len(rows)} times; "
            f"pass image_size>={2 ** len(rows)}, or take a resnet, which fits any"
        )
    blocks: Named = OrderedDict()
    channels = in_channels
    for row in rows:
        for i, factor in enumerate(row):
            out_channels = factor * width
            layers = conv_norm_relu(channels, out_channels, 3)
            if i == len(row) - 1:
                layers["pool"] = nn.MaxPool2d(2)
            blocks[f"block{len(blocks) + 1}"] = nn.Sequential(layers)
            channels = out_channels
    blocks["head"] = nn.Sequential(pooled_linear(channels, num_classes))
    return with_kaiming_init(nn.Sequential(blocks))
