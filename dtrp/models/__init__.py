"""Networks for the command line and the benchmarks, each a plain `nn.Sequential` of named blocks.

The GPT takes text; all others take images. A model can be cut between any two of its blocks, and no block writes to its
input.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..lazy import lazy_names
from ..validation import unknown

if TYPE_CHECKING:
    from torch import nn

    from .auxiliary_networks import auxiliary
    from .resnet import cifar_resnet
    from .transformer import gpt

__all__ = ["auxiliary", "cifar_resnet", "get_model", "gpt", "has_convolutions", "has_stem", "list_models", "takes_text"]

__getattr__, __dir__ = lazy_names(
    __name__, {"auxiliary": ".auxiliary_networks", "cifar_resnet": ".resnet", "gpt": ".transformer"}
)

# Names of networks, and the arguments, the depth, or depth and widening, that each name stands for.
_CIFAR_RESNETS: dict[str, dict[str, int]] = {
    **{f"resnet{depth}": {"depth": depth} for depth in (20, 32, 44, 56, 110, 1202)},
    "resnet14-8": {"depth": 14, "width": 8},
}
_RESNETS = {f"resnet{depth}": depth for depth in (18, 34, 50)}
_WIDE_RESNETS = {"wrn28-10": (28, 10), "wrn16-2": (16, 2)}
_VGGS: dict[str, dict[str, int]] = {
    **{f"vgg{depth}": {"depth": depth} for depth in (11, 16)},
    "vgg11-16": {"depth": 11, "width": 16},
}
_NAMES = (*_CIFAR_RESNETS, *_RESNETS, *_WIDE_RESNETS, *_VGGS, "mlp", "gpt")


def list_models() -> list[str]:
    """The names that `get_model` knows."""
    return list(_NAMES)


def has_convolutions(name: str) -> bool:
    """Whether the model has convolutions."""
    return name != "mlp" and not takes_text(name)


def has_stem(name: str) -> bool:
    """Whether the model has a choice of its first layers."""
    return name in _RESNETS


def takes_text(name: str) -> bool:
    """Whether the model takes tokens (N, T), and not images."""
    return name == "gpt"


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

    ``gpt`` maps tokens (N, T) from ``num_classes`` characters to logits (N, T, num_classes); it ignores ``in_channels``
    and ``image_size``.

    >>> [block for block, _ in get_model("resnet20").named_children()][:3]
    ['stem', 'block1', 'block2']

    The weights are drawn from torch's global generator.

    Args:
        name: one of `list_models`.
        in_channels: channels of an image.
        num_classes: number of classes, which is that of the logits.
        image_size: H and W. It fixes the inputs of mlp, and the VGGs need at least 32; the others take any size.
        stem: first layers of resnet18, 34 and 50: ``"cifar"`` (3x3, stride 1) or ``"imagenet"`` (7x7, stride 2,
            max-pool).
        layers: number of blocks of gpt; None: 6.
        width: features of a token in gpt; None: 128.
        heads: number of attention heads in gpt; None: 4.
        context: largest number of tokens that gpt takes at once; None: 64.

    Raises:
        ValueError: an unknown name (with the nearest right one), a stem or a size that the model has no choice of, a
            number out of range.
    """
    if name not in _NAMES:
        raise ValueError(unknown("model", name, _NAMES))
    from .layers import check_positive
    from .mlp import mlp
    from .resnet import STEMS, cifar_resnet, resnet
    from .transformer import gpt
    from .vgg import vgg
    from .wide_resnet import wide_resnet

    sizes = {"layers": layers, "width": width, "heads": heads, "context": context}
    given = {size: number for size, number in sizes.items() if number is not None}
    if name == "gpt":
        return gpt(num_classes, **given)
    for size, number in given.items():
        raise ValueError(f"{size}={number} but {name} has no choice of it; leave it out, or take gpt")
    check_positive(in_channels=in_channels, num_classes=num_classes, image_size=image_size)
    if stem not in STEMS:
        raise ValueError(f"stem={stem!r}: pass one of {', '.join(map(repr, STEMS))}")
    if stem != "cifar" and name not in _RESNETS:
        raise ValueError(f"stem={stem!r} but {name} has no choice of stem; leave it out, or take {', '.join(_RESNETS)}")
    shape: dict[str, Any] = {"in_channels": in_channels, "num_classes": num_classes}
    if name in _CIFAR_RESNETS:
        return cifar_resnet(**_CIFAR_RESNETS[name], **shape)
    if name in _RESNETS:
        return resnet(_RESNETS[name], **shape, stem=stem)
    if name in _VGGS:
        return vgg(**_VGGS[name], **shape, image_size=image_size)
    return mlp(**shape, image_size=image_size) if name == "mlp" else wide_resnet(*_WIDE_RESNETS[name], **shape)
