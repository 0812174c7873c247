"""The predictors that know an optimizer's update rule: ``linear``, ``rollout`` and ``informed``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer


class Predictor(Protocol):
    """What a predictor is; see the module's documentation."""

    def __call__(
        self,
        parameters: Sequence[Tensor],
        optimizer: Optimizer,
        horizon: int,
        out: Sequence[Tensor],
        *,
        stage: int,
        microbatch: int,
        version: int,
    ) -> None: ...


Rule = Callable[[Tensor, dict[str, Any], dict[str, Any], int, Tensor], None]  # (p, state, group, horizon, out)


class BuiltInPredictor:
    """``linear``, ``rollout`` or ``informed`` for SGD, Adam, AdamW and NAdam.

    Unless it uses gradients, the result depends on the version and the horizon alone, so micro-batches that share both
    share it.
    """

    def __init__(self, name: str, rules: dict[type[Optimizer], Rule], *, uses_gradients: bool = False) -> None:
        self.name = name
        self.uses_gradients, self.alike = uses_gradients, not uses_gradients
        self.rules = rules

    def __repr__(self) -> str:
        return f"<predictor {self.name}>"

    def knows(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer's update rule is known."""
        return type(optimizer) in self.rules

    def check(self, optimizer: Optimizer) -> None:
        """Refuse an optimizer whose update rule is not known here.

        Raises:
            TypeError: naming the optimizer and the ways out.
        """
        if not self.knows(optimizer):
            known = ", ".join(cls.__name__ for cls in self.rules)
            raise TypeError(
                f"prediction {self.name!r} does not know the update rule of {type(optimizer).__name__} (it knows {known}, "
                "not their subclasses); use one of these, pass predict='last' or 'auto', which need no rule, or a predictor of "
                "your own, method=get_method(..., predict=my_predictor), or switch prediction off with predict=None"
            )

    @torch.no_grad()
    def __call__(
        self,
        parameters: Sequence[Tensor],
        optimizer: Optimizer,
        horizon: int,
        out: Sequence[Tensor],
        *,
        stage: int = 0,
        microbatch: int = 0,
        version: int = 0,
        gradients: Sequence[Tensor | None] = (),
        share: float = 0.0,
    ) -> None:
        self.check(optimizer)
        rule = self.rules[type(optimizer)]
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for p, o, gradient in zip(parameters, out, gradients or [None] * len(out), strict=True):
            state = optimizer.state.get(p, {})
            if not _has_begun(state, optimizer):
                o.copy_(p)
            else:
                group = groups[id(p)]
                # torch's Adam family sees pairs of reals.
                if p.is_complex() and type(optimizer) in _LINEAR_OF_TORCH and type(optimizer) is not SGD:
                    state = {k: torch.view_as_real(t) if torch.is_complex(t) else t for k, t in state.items()
                             if isinstance(t, Tensor)}  # fmt: skip
                    p, o = torch.view_as_real(p), torch.view_as_real(o)
                    gradient = gradient if gradient is None else torch.view_as_real(gradient)
                if gradient is not None and self.uses_gradients:
                    state = _informed(p, state, group, gradient, share, decoupled=_is_decoupled(group, optimizer))
                rule(p, state, group, horizon, o)


def _has_begun(state: dict[str, Any], optimizer: Optimizer) -> bool:
    """Whether there is a state of a weight to predict from."""
    if type(optimizer) in _LINEAR_OF_TORCH:
        return state.get("momentum_buffer" if type(optimizer) is SGD else "exp_avg") is not None
    return bool(state)


def _informed(
    p: Tensor, state: dict[str, Any], group: dict[str, Any], gradient: Tensor, share: float, *, decoupled: bool
) -> dict[str, Any]:
    """The state after the next update, as the rules read it: they correct Adam's moments for the steps so far.

    The second moment moves too: a weight that never had a gradient (a token's, not seen before) has none to be divided
    by.
    """
    known = -gradient if group["maximize"] else gradient
    if group["weight_decay"] and not decoupled:
        known = known.add(p, alpha=share * group["weight_decay"])
    if "momentum_buffer" in state:
        mu = group["momentum"]
        v = torch.mul(state["momentum_buffer"], 1 - share * (1 - mu))
        return {**state, "momentum_buffer": v.add_(known, alpha=1 - group["dampening"])}
    (beta1, beta2), t = map(float, group["betas"]), float(state["step"])
    now, then = (1 - beta1**t, 1 - beta2**t), (1 - beta1 ** (t + 1), 1 - beta2 ** (t + 1))
    whole = torch.add(known, state["exp_avg"], alpha=(1 - share) / now[0])
    m = torch.lerp(state["exp_avg"], whole, 1 - beta1)
    v = torch.mul(state["exp_avg_sq"], beta2).addcmul_(whole, whole, value=1 - beta2)
    moved = {**state, "exp_avg": m.mul_(now[0] / then[0])}
    if "max_exp_avg_sq" in state:  # never corrected
        moved["max_exp_avg_sq"] = torch.maximum(state["max_exp_avg_sq"], v)
    return {**moved, "exp_avg_sq": v.mul_(now[1] / then[1])}


# -- SGD ------------------------------------------------------------------------------------------------


def _sgd_linear(p: Tensor, state: dict[str, Any], group: dict[str, Any], horizon: int, out: Tensor) -> None:
    torch.add(p, state["momentum_buffer"], alpha=-horizon * float(group["lr"]), out=out)


def _sgd_rollout(p: Tensor, state: dict[str, Any], group: dict[str, Any], horizon: int, out: Tensor) -> None:
    """h steps with g = decay p, as one linear map of (p, v): p_h = a p + b v.

    ``maximize`` turns the sign of the gradient, which is zero, and not that of the decay.
    """
    lr, mu, decay = float(group["lr"]), group["momentum"], group["weight_decay"]
    # p and v as coefficients of the (p, v) of now
    pp, pv = 1.0, 0.0
    vp, vv = 0.0, 1.0
    for _ in range(horizon):
        gp, gv = decay * pp, decay * pv
        vp, vv = mu * vp + (1 - group["dampening"]) * gp, mu * vv + (1 - group["dampening"]) * gv
        sp, sv = (gp + mu * vp, gv + mu * vv) if group["nesterov"] else (vp, vv)
        pp, pv = pp - lr * sp, pv - lr * sv
    if decay:
        torch.mul(p, pp, out=out).add_(state["momentum_buffer"], alpha=pv)
    else:
        torch.add(p, state["momentum_buffer"], alpha=pv, out=out)


# -- the Adam family ------------------------------------------------------------------------------------


def _is_decoupled(group: dict[str, Any], optimizer: Optimizer | None = None) -> bool:
    # Adam, AdamW and NAdam all carry the flag in recent torch; older AdamW does not (see _with_flag).
    return type(optimizer) is AdamW or bool(group.get("decoupled_weight_decay", False))


def _adam_linear(p: Tensor, state: dict[str, Any], group: dict[str, Any], horizon: int, out: Tensor) -> None:
    if group["amsgrad"]:
        _extrapolate(_adam_rollout, p, state, group, horizon, out)
        return
    lr, eps, t = float(group["lr"]), group["eps"], float(state["step"])
    beta1, beta2 = map(float, group["betas"])
    denominator = (state["exp_avg_sq"] / (1 - beta2**t)).sqrt_().add_(eps)
    shrink = 1 - horizon * lr * group["weight_decay"] if _is_decoupled(group) else 1.0
    torch.mul(p, shrink, out=out).addcdiv_(state["exp_avg"], denominator, value=-horizon * lr / (1 - beta1**t))


def _adam_rollout(p: Tensor, state: dict[str, Any], group: dict[str, Any], horizon: int, out: Tensor) -> None:
    lr, eps, t, decay = float(group["lr"]), group["eps"], float(state["step"]), group["weight_decay"]
    beta1, beta2 = map(float, group["betas"])
    coupled = decay and not _is_decoupled(group)
    if coupled:
        pieces = _pieces(p, state, out)
    else:
        pieces = iter([(p, state["exp_avg"], state["exp_avg_sq"], state.get("max_exp_avg_sq"), out)])
    for weight, m, v, v_max, o in pieces:
        o.copy_(weight)
        denominator = torch.empty_like(v)
        if coupled:  # the decay enters the moments: they need room to move in
            m, v = m.clone(), v.clone()
            v_max = None if v_max is None else v_max.clone()
        for i in range(1, horizon + 1):
            if coupled:
                m.mul_(beta1).add_(o, alpha=(1 - beta1) * decay)
                v.mul_(beta2).addcmul_(o, o, value=(1 - beta2) * decay * decay)
                left = (1.0, 1.0)
            else:  # the moments only fade
                left = (beta1**i, beta2**i)
                if decay:
                    o.mul_(1 - lr * decay)
            if v_max is None:
                torch.mul(v, left[1] / (1 - beta2 ** (t + i)), out=denominator)
            else:  # fading never raises the maximum; the coupled decay may
                if coupled:
                    torch.maximum(v_max, v, out=v_max)
                torch.div(v_max, 1 - beta2 ** (t + i), out=denominator)
            denominator.sqrt_().add_(eps)
            o.addcdiv_(m, denominator, value=-lr * left[0] / (1 - beta1 ** (t + i)))


def _nadam_rollout(p: Tensor, state: dict[str, Any], group: dict[str, Any], horizon: int, out: Tensor) -> None:
    lr, eps, t, decay = float(group["lr"]), group["eps"], float(state["step"]), group["weight_decay"]
    beta1, beta2 = map(float, group["betas"])
    coupled = decay and not _is_decoupled(group)
    pieces = _pieces(p, state, out) if coupled else iter([(p, state["exp_avg"], state["exp_avg_sq"], None, out)])
    # Products of mu as torch forms them: in the dtype of its state, whatever that is.
    products, product = [], state["mu_product"].clone()
    for i in range(1, horizon + 2):
        mu = beta1 * (1 - 0.5 * 0.96 ** ((t + i) * group["momentum_decay"]))
        if i <= horizon:
            product *= mu
            products.append((mu, product.item()))
        else:
            products.append((mu, 0.0))
    for weight, m, v, _, o in pieces:
        o.copy_(weight)
        denominator = torch.empty_like(v)
        if coupled:
            m, v, of_gradient = m.clone(), v.clone(), torch.empty_like(o)
        for i in range(1, horizon + 1):
            (mu, mu_product), (mu_next, _) = products[i - 1], products[i]
            if coupled:
                m.mul_(beta1).add_(o, alpha=(1 - beta1) * decay)
                v.mul_(beta2).addcmul_(o, o, value=(1 - beta2) * decay * decay)
                torch.div(v, 1 - beta2 ** (t + i), out=denominator)
                left = 1.0
            else:
                if decay:
                    o.mul_(1 - lr * decay)
                torch.mul(v, beta2**i / (1 - beta2 ** (t + i)), out=denominator)
                left = beta1**i
            denominator.sqrt_().add_(eps)
            if coupled:  # the gradient of this step, decay p, is in the Nesterov step too
                torch.div(o, denominator, out=of_gradient)
            o.addcdiv_(m, denominator, value=-lr * mu_next * left / (1 - mu_product * mu_next))
            if coupled:
                o.add_(of_gradient, alpha=-lr * (1 - mu) / (1 - mu_product) * decay)


def _nadam_linear(p: Tensor, state: dict[str, Any], group: dict[str, Any], horizon: int, out: Tensor) -> None:
    _extrapolate(_nadam_rollout, p, state, group, horizon, out)


def _extrapolate(
    rule: Rule, p: Tensor, state: dict[str, Any], group: dict[str, Any], horizon: int, out: Tensor
) -> None:
    """One step with a zero gradient, ``horizon`` times over: p + horizon (p_1 - p)."""
    rule(p, state, group, 1, out)
    out.sub_(p).mul_(horizon).add_(p)


def _pieces(
    p: Tensor, state: dict[str, Any], out: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]]:
    """The parameter and its moments a fifth at a time, so that what moves with them takes no more room than p."""
    v_max = state.get("max_exp_avg_sq")
    tensors = [p, state["exp_avg"], state["exp_avg_sq"], out] + ([] if v_max is None else [v_max])
    if all(t.is_contiguous() for t in tensors):
        tensors = [t.view(-1) for t in tensors]
        size = max(1, -(-p.numel() // 5))
    else:
        size = max(1, -(-p.shape[0] // 5)) if p.dim() else 1
    parts = [tuple(tensors)] if not tensors[0].dim() else list(zip(*(t.split(size) for t in tensors), strict=True))
    for weight, m, v, o, *maximum in parts:
        yield weight, m, v, (maximum[0] if maximum else None), o


def _with_flag(rule: Rule) -> Rule:
    """AdamW of a torch whose groups do not carry ``decoupled_weight_decay``."""

    def adamw(p: Tensor, state: dict[str, Any], group: dict[str, Any], horizon: int, out: Tensor) -> None:
        rule(p, state, {**group, "decoupled_weight_decay": True}, horizon, out)

    return adamw


_LINEAR_OF_TORCH: dict[type[Optimizer], Rule] = {
    SGD: _sgd_linear,
    Adam: _adam_linear,
    AdamW: _with_flag(_adam_linear),
    NAdam: _nadam_linear,
}
linear = BuiltInPredictor("linear", dict(_LINEAR_OF_TORCH))
informed = BuiltInPredictor("informed", _LINEAR_OF_TORCH, uses_gradients=True)
rollout = BuiltInPredictor(
    "rollout", {SGD: _sgd_rollout, Adam: _adam_rollout, AdamW: _with_flag(_adam_rollout), NAdam: _nadam_rollout}
)


def register(optimizer: type[Optimizer], rule: Rule) -> None:
    """Tell ``linear``, and so ``auto``, the update rule of an optimizer.

    Args:
        optimizer: the class; its subclasses are not meant.
        rule: called as ``rule(p, state, group, horizon, out)``: writes into ``out`` the weights that the last update,
            ``horizon`` times over, would make of ``p``, from the optimizer's ``state`` of p and p's parameter
            ``group``, and touches nothing else. It is not called while there is no state.

    Raises:
        TypeError: what is no class of optimizers, or cannot be called.
    """
    if not (isinstance(optimizer, type) and issubclass(optimizer, Optimizer)):
        raise TypeError(f"register was given {optimizer!r}; pass a class of optimizers, and its rule")
    if not callable(rule):
        raise TypeError(f"the rule of {optimizer.__name__} is a {type(rule).__name__}; pass a function")
    linear.rules[optimizer] = rule
