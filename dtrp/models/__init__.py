"""Networks for the command line and the benchmarks, each a plain `nn.Sequential` of named blocks.

All take images but the GPT, which takes text.

A plain Sequential can be cut between any two of its top-level layers. No block writes its input.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from ..did_you_mean import unknown
from .auxiliary import auxiliary
from .gpt import gpt
from .layers import check_positive
from .mlp import mlp
from .resnet import STEMS, cifar_resnet, resnet
from .vgg import vgg
from .wide_resnet import wide_resnet

__all__ = ["auxiliary", "cifar_resnet", "get_model", "gpt", "has_convolutions", "list_models", "takes_text"]

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
_OF_TEXT = {"gpt": gpt}


def list_models() -> list[str]:
    """The names that `get_model` knows."""
    return [*_BUILDERS, *_OF_TEXT]


def has_convolutions(name: str) -> bool:
    """Whether this model has any."""
    return name != "mlp" and not takes_text(name)


def takes_text(name: str) -> bool:
    """Whether this model reads tokens (N, T); the others read images."""
    return name in _OF_TEXT


def get_model(
    name: str,
    in_channels: int = 3,
    num_classes: int = 10,
    *,
    image_size: int = 32,
    stem: str = "cifar",
    layers: int | None = None,
    width: int | None = None,
    heads: int | None = None,
    context: int | None = None,
) -> nn.Sequential:
    """The network called ``name``: images (N, in_channels, H, W) to logits (N, num_classes).

    ``gpt`` takes tokens (N, T) of ``num_classes`` characters to logits (N, T, num_classes), and has no ``in_channels``
    and no ``image_size``.

    >>> [block for block, _ in get_model("resnet20").named_children()][:3]
    ['stem', 'block1', 'block2']

    The weights are drawn from torch's global generator.

    Args:
        name: one of `list_models`.
        in_channels: of an image.
        num_classes: outputs.
        image_size: H and W. It fixes the inputs of mlp, and the VGGs need at least 32; the others take any size.
        stem: of resnet18, 34 and 50: ``"cifar"`` (3x3, stride 1) or ``"imagenet"`` (7x7, stride 2, max-pool).
        layers: blocks of gpt; None: 6.
        width: features of a token in gpt; None: 128.
        heads: of each attention in gpt; None: 4.
        context: the most tokens that gpt reads at once; None: 64.

    Raises:
        ValueError: an unknown name (with the nearest right one), a stem or a size the model has no choice of, a number
            out of range.
    """
    if name not in list_models():
        raise ValueError(unknown("model", name, list_models()))
    sizes = {"layers": layers, "width": width, "heads": heads, "context": context}
    given = {size: number for size, number in sizes.items() if number is not None}
    if takes_text(name):
        return _OF_TEXT[name](num_classes, **given)
    for size, number in given.items():
        raise ValueError(f"{size}={number} but {name} has no choice of it; leave it out, or take {', '.join(_OF_TEXT)}")
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
