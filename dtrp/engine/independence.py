"""Whether a model's output for a sample depends on the samples beside it, where a mini-batch is about to be cut.

Mini-batches are cut along dimension 0. A model that reads that as the sequence (``nn.LSTM`` and ``nn.Transformer`` as
they are by default) is given parts of its sequences then, and trains on something else without a word.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..tensors.module_mode import in_mode
from ..tensors.pytree import map_tensors, num_samples, split, tensors_of
from ..typing import Tree

_TOLERANCE = 1e-2  # of the largest output: far above the difference that kernels make between sizes
_MESSAGE = (
    "the model's outputs for the second half of this mini-batch change when the first half is left out: its samples are not "
    "along dimension 0, or depend on each other, and by default a mini-batch is cut into as many micro-batches as there are "
    "stages. Pass x and y with the samples first (batch_first=True of torch's modules), or num_microbatches=1, or a number "
    "of your own if this is meant"
)

Call = Callable[[nn.Module, Tree, str], Tree]  # (stage, input, name) -> output


def has_sequences_first(stages: Sequence[nn.Module]) -> bool:
    """Whether a module says that dimension 0 of its input is the sequence, by ``batch_first``."""
    modules = (module for stage in stages for module in stage.modules())
    return any(getattr(module, "batch_first", True) is False for module in modules)


def warn_if_samples_mix(stages: Sequence[nn.Module], call: Call, x: Tree) -> None:
    """Run the model in eval mode on a mini-batch and on its second half; warn where the outputs differ.

    On the second half, since a model that reads a sequence from its start makes the same of the first. Nothing is left
    of it: neither draws nor buffers nor modes. A model that cannot be run so is not judged.
    """
    mixed = False
    with contextlib.suppress(Exception):
        half = split(x, 2)[1]
        rows, some = num_samples(x), num_samples(half)
        for a, b in zip(_outputs(stages, call, x), _outputs(stages, call, half), strict=True):
            if a.dim() and b.dim() and a.is_floating_point() and a.numel() and (len(a), len(b)) == (rows, some):
                mixed = mixed or bool((a[rows - some :] - b).abs().max() > _TOLERANCE * a.abs().max())
    if mixed:
        warnings.warn(_MESSAGE, UserWarning, stacklevel=3)


def _beside(stage: nn.Module, value: Tree) -> Tree:
    """A value on the device of a stage's parameters."""
    device = next((p.device for p in stage.parameters()), None)
    return value if device is None else map_tensors(lambda t: t.to(device), value)


@torch.no_grad()
def _outputs(stages: Sequence[nn.Module], call: Call, x: Tree) -> list[Tensor]:
    devices = sorted({t.device for stage in stages for t in stage.parameters() if t.device.type != "cpu"}, key=str)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        for stage in stages:
            stack.enter_context(in_mode(stage, training=False))
        value = map_tensors(lambda t: t.detach().clone(), x)
        for number, stage in enumerate(stages):
            value = call(stage, _beside(stage, value), str(number))
        return tensors_of(value)
