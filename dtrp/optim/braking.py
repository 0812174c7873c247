"""SGD with adaptive braking."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD

from ..validation import is_number
from .factories import loss_of

_REFUSED = {
    "maximize": "braking is for a loss that is minimized; turn the sign of the loss",
    "fused": "braking changes gradients before the step, which a GradScaler would scale back within it; leave it out",
    "differentiable": "braking is not differentiated through; leave it out",
}


class Braking(SGD):
    """SGD with momentum whose gradient counts for less where it points along the momentum, and for more against it.

    For each filter (a slice along dimension 0 of a parameter of two and more dimensions; the whole of a vector), with
    the gradient g and the momentum v before the update::

        g <- g (1 - rho cos(g, v)),      cos(g, v) = <g, v> / max(|g| |v|, eps)

    and SGD goes on with that gradient; weight decay is added to it afterwards. The first update, which has no momentum
    yet, is SGD's.

    Source: Venigalla et al., *Adaptive braking for mitigating gradient delay*, arXiv:2007.01397, whose abstract says that
    the gradient is scaled by its alignment with the velocity. Only the abstract could be read: this formula, its
    granularity and its default are our reading.

    Args:
        params, lr, momentum: as of ``torch.optim.SGD``; the momentum is above 0.
        rho: how much the alignment counts; 0: SGD. Above 1 a gradient that lies along the momentum is turned round.
        eps: least product of the two norms.
        options: other options of SGD; ``maximize``, ``fused`` and ``differentiable`` are refused.

    Raises:
        ValueError: a momentum of 0, or ``rho`` or ``eps`` out of range.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.9,
        *,
        rho: float = 0.5,
        eps: float = 1e-20,
        **options: Any,
    ) -> None:
        if not momentum > 0:
            raise ValueError(
                f"momentum={momentum!r}: braking compares the gradient with the momentum; pass one above 0"
            )
        for name, value in (("rho", rho), ("eps", eps)):
            if not is_number(value) or value < 0:
                raise ValueError(f"{name}={value!r}: a finite number of at least 0")
        for name, advice in _REFUSED.items():
            if options.get(name):
                raise ValueError(f"{name}=True: {advice}")
        super().__init__(params, lr, momentum, **options)
        self.defaults |= {"rho": rho, "brake_eps": eps}
        self._complete()

    def _complete(self) -> None:
        """Give groups that were made without them, as SGD's are, the options of braking."""
        for group in self.param_groups:
            for name in ("rho", "brake_eps"):
                group.setdefault(name, self.defaults[name])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._complete()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; returns what ``closure`` returns, if there is one."""
        loss = loss_of(closure)
        before: list[tuple[Tensor, Tensor]] = []
        try:
            for group in self.param_groups:
                for p in group["params"]:
                    velocity = self.state[p].get("momentum_buffer") if p in self.state else None
                    if p.grad is not None and p.grad.layout is not torch.strided:
                        raise TypeError("Braking takes dense gradients; make the embedding with sparse=False")
                    if p.grad is not None and velocity is not None and group["rho"]:
                        before.append((p, p.grad))
                        p.grad = p.grad * braked(p.grad, velocity, group["rho"], group["brake_eps"])
            inner = SGD([dict(group) for group in self.param_groups])
            inner.state = self.state
            inner.step()
        finally:
            for p, gradient in before:
                p.grad = gradient
        return loss


def braked(gradient: Tensor, velocity: Tensor, rho: float, eps: float) -> Tensor:
    """``1 - rho cos(gradient, velocity)``, of each filter, in a shape that multiplies the gradient."""
    kind = gradient.dtype
    if gradient.element_size() < 4:  # whose squares may be too small for its range
        gradient, velocity = gradient.float(), velocity.float()
    dims = tuple(range(1, gradient.dim())) or tuple(range(gradient.dim()))
    dot = gradient * velocity
    if gradient.is_complex():
        dot = (gradient * velocity.conj()).real
        kind = dot.dtype
    if dims:
        dot = dot.sum(dims, keepdim=True)
        lengths = [torch.linalg.vector_norm(t, dim=dims, keepdim=True) for t in (gradient, velocity)]
    else:
        lengths = [gradient.abs(), velocity.abs()]
    cosine: Tensor = dot / (lengths[0] * lengths[1]).clamp(min=eps)
    return (1 - rho * cosine).to(kind)
