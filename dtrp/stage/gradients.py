"""Checks and clipping of a mini-batch's gradient, between its last backward and its update.

A gradient that is not finite would spoil weights and optimizer for good, so it is checked before U (on an accelerator
the answer is read at the next U): one pass over it for its 2-norm, which is not finite where an entry is not. The same
norm clips it::

    scale = min(1, max_grad_norm / (norm + 1e-6))       as torch.nn.utils.clip_grad_norm_ has it

Whose norm? A stage's own needs no waiting. That of all stages exists when the last of them is through with the
mini-batch, and no stage can update before: which is what a method that flushes does anyway, and what the others are
there to avoid.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ..methods import Method
from ..tensors.torch_private import sparse_parts
from ..validation import is_number

Clip = Literal["stage", "global"]
OnNonfinite = Literal["stop", "skip"]


@dataclass(frozen=True)
class GradientRule:
    """What to do with gradients that are too long, or not finite; see `dtrp.Pipeline`."""

    max_norm: float | None = None
    clip: Clip = "stage"
    on_nonfinite: OnNonfinite = "stop"
    together: bool = False  # whether all stages decide by the norms of all

    @classmethod
    def checked(cls, max_grad_norm: Any, clip: Any, on_nonfinite: Any, method: Method) -> GradientRule:
        """The rule that the arguments of `dtrp.Pipeline` make for ``method``.

        Raises:
            ValueError: they make none, with what to change.
        """
        if clip not in get_args(Clip):
            raise ValueError(f"clip={clip!r}: choose 'stage' or 'global'")
        if on_nonfinite not in get_args(OnNonfinite):
            raise ValueError(f"on_nonfinite={on_nonfinite!r}: choose 'stop' or 'skip'")
        if max_grad_norm is not None and (not is_number(max_grad_norm) or max_grad_norm <= 0):
            raise ValueError(f"max_grad_norm={max_grad_norm!r}: pass a finite number above 0, or None")
        if clip == "global" and max_grad_norm is None:
            raise ValueError("clip='global' without max_grad_norm: pass the norm to clip to, or leave clip out")
        if clip == "global" and not method.flush:
            raise ValueError(
                f"clip='global' with method={method.name!r}: its stages update without waiting for each other, and the norm over "
                "all stages is known only when the last of them is through with the mini-batch; pass clip='stage', or a "
                "method that flushes (bp, gpipe)"
            )
        together = method.flush and (clip == "global" or on_nonfinite == "skip")
        norm = None if max_grad_norm is None else float(max_grad_norm)
        return cls(norm, clip, on_nonfinite, together)


def gradient_norm(gradients: Sequence[Tensor | None], *, waits: bool = True) -> Tensor:
    """The 2-norm, a scalar tensor; inf or nan exactly where an entry is.

    A norm that leaves the range of its dtype while every entry is in it is computed again in float64, if ``waits``: an
    accelerator is waited for then.
    """
    present = [_values(g) for g in gradients if g is not None]
    norm = get_total_norm(present)
    if waits and not torch.isfinite(norm) and all(bool(torch.isfinite(g).all()) for g in present):
        norm = get_total_norm([g.to(torch.complex128 if g.is_complex() else torch.float64) for g in present])
    return norm


def overall(norms: Sequence[float]) -> float:
    """The norm over all stages, from the norms of the stages."""
    return norms[0] if len(norms) == 1 else math.hypot(*norms)


def clip_(parameters: Sequence[nn.Parameter], max_norm: float, norm: Tensor) -> None:
    """Scale the gradients of ``parameters``, whose norm is ``norm``, in place, so that it is at most ``max_norm``."""
    dense = [p for p in parameters if p.grad is not None and p.grad.layout is torch.strided]
    clip_grads_with_norm_(dense, max_norm, norm)
    for p in parameters:
        if p.grad is not None and p.grad.layout is not torch.strided:
            p.grad.mul_(torch.clamp(max_norm / (norm + 1e-6), max=1.0).item())


def nonfinite(
    minibatch: int, stage: int, names: Sequence[str], gradients: Sequence[Tensor | None]
) -> FloatingPointError:
    """The error that says which gradient is not finite.

    Args:
        minibatch: b.
        stage: k.
        names: the names of the stage's parameters.
        gradients: their gradients; empty where they are gone, or another rank's.
    """
    where = ""
    for name, gradient in zip(names, gradients, strict=False):
        values = None if gradient is None else _values(gradient)
        if values is not None and not torch.isfinite(values).all():
            first = values.flatten()[~torch.isfinite(values.flatten())][0].item()
            where = f" ({name}: {first})"
            break
    return FloatingPointError(
        f"the gradient of mini-batch {minibatch} at stage {stage} is not finite{where}; lower the learning rate, look at the data "
        "of this mini-batch, or leave such updates out (on_nonfinite='skip')"
    )


class PendingNorms:
    """Norms on their way from an accelerator, which are read when they have arrived, without waiting for them."""

    def __init__(self) -> None:
        self._norms: deque[tuple[int, Tensor, Any]] = deque()

    def add(self, minibatch: int, gradients: Sequence[Tensor | None], device: torch.device) -> None:
        """Start the transfer of a norm of the gradient of ``minibatch``."""
        present = [values for g in gradients if g is not None and (values := _values(g)).numel()]
        if not present:
            return
        largest = get_total_norm(present, math.inf)  # unlike the 2-norm it cannot leave the range of the dtype
        norm = torch.empty((), dtype=largest.dtype, pin_memory=largest.device.type != "cpu")
        norm.copy_(largest, non_blocking=True)
        stream = torch.get_device_module(device).current_stream(device)
        self._norms.append((minibatch, norm, stream.record_event()))  # on a CPU the event is None

    def first_bad(self) -> int | None:
        """The first mini-batch whose gradient was not finite, if there was one."""
        while self._norms:
            minibatch, norm, arrived = self._norms[0]
            if arrived is not None:
                arrived.synchronize()
            if not torch.isfinite(norm):
                return minibatch
            self._norms.popleft()
        return None

    def drop(self) -> None:
        self._norms.clear()


def shows_nonfinite(roots: Sequence[Tensor | GradientEdge], starts: Sequence[Tensor | None]) -> Tensor:
    """Whether the loss of a micro-batch was not finite: a boolean scalar, not waited for.

    A mask or an ignored label hides a nan on its way back, so `mark_nonfinite` writes it into the first entries of a
    gradient that is sent on.

    Args:
        roots: where differentiation starts: losses, and the edges of outputs.
        starts: the gradients of these.
    """
    signs = [~torch.isfinite(root.detach()) for root in roots if isinstance(root, Tensor)]
    signs += [_first_entry(gradient).isnan().any() for gradient in starts if gradient is not None]
    return torch.stack(signs).any()


def mark_nonfinite(gradients: Sequence[Tensor | None], spoiled: Tensor) -> None:
    """Show in the gradients that are sent on whether (``spoiled``, a boolean scalar) the loss was not finite."""
    for gradient in gradients:
        if gradient is not None:
            _first_entry(gradient).masked_fill_(spoiled, math.nan)


def _first_entry(x: Tensor) -> Tensor:
    """A view of the first entry, if there is one; of a sparse tensor all stored ones, whose order may change."""
    return sparse_parts(x)[1] if x.is_sparse else x[(slice(1),) * x.dim()]


def _values(gradient: Tensor) -> Tensor:
    """The entries of a gradient as a dense tensor; of a sparse gradient the stored ones, each once."""
    if gradient.layout is torch.strided:
        return gradient
    return sparse_parts(gradient.coalesce())[1]
