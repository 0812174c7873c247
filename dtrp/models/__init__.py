"""Networks for the command line and the benchmarks, each a plain `nn.Sequential` of named blocks.

A plain Sequential can be cut between any two of its top-level layers. No block writes its input.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from ..names import unknown
from .layers import check_positive
from .mlp import mlp
from .resnet import STEMS, cifar_resnet, resnet
from .vgg import vgg
from .wide_resnet import wide_resnet

__all__ = ["cifar_resnet", "get_model", "list_models"]

_WITH_STEM: dict[str, Callable[..., nn.Sequential]] = {
    f"resnet{depth}": partial(resnet, depth) for depth in (18, 34, 50)
}
_WITH_SIZE: dict[str, Callable[..., nn.Sequential]] = {
    **{f"vgg{depth}": partial(vgg, depth) for depth in (11, 16)},
    "mlp": mlp,
}
_BUILDERS: dict[str, Callable[..., nn.Sequential]] = {
    **{f"resnet{depth}": partial(cifar_resnet, depth) for depth in (20, 32, 44, 56, 110, 1202)},
    "resnet14-8": partial(cifar_resnet, 14, width=8),
    **_WITH_STEM,
    "wrn28-10": partial(wide_resnet, 28, 10),
    **_WITH_SIZE,
}


def list_models() -> list[str]:
    """The names that `get_model` knows."""
    return list(_BUILDERS)


def get_model(
    name: str, in_channels: int = 3, num_classes: int = 10, *, image_size: int = 32, stem: str = "cifar"
) -> nn.Sequential:
    """The network called ``name``: images (N, in_channels, H, W) to logits (N, num_classes).

    >>> [block for block, _ in get_model("resnet20").named_children()][:3]
    ['stem', 'block1', 'block2']

    The weights are drawn from torch's global generator.

    Args:
        name: one of `list_models`.
        in_channels: of an image.
        num_classes: outputs.
        image_size: H and W. It fixes the inputs of mlp, and the VGGs need at least 32; the others take any size.
        stem: of resnet18, 34 and 50: ``"cifar"`` (3x3, stride 1) or ``"imagenet"`` (7x7, stride 2, max-pool).

    Raises:
        ValueError: an unknown name (with the nearest right one), a stem the model does not have, a number out of range.
    """
    if name not in _BUILDERS:
        raise ValueError(unknown("model", name, _BUILDERS))
    check_positive(in_channels=in_channels, num_classes=num_classes, image_size=image_size)
    if stem not in STEMS:
        raise ValueError(f"stem={stem!r}: pass one of {', '.join(map(repr, STEMS))}")
    options: dict[str, Any] = {}
    if name in _WITH_STEM:
        options["stem"] = stem
    elif stem != "cifar":
        raise ValueError(
            f"stem={stem!r} but {name} has no choice of stem; leave it out, or take {', '.join(_WITH_STEM)}"
        )
    if name in _WITH_SIZE:
        options["image_size"] = image_size
    return _BUILDERS[name](in_channels=in_channels, num_classes=num_classes, **options)
