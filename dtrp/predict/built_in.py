"""The predictors that know an optimizer's update rule: ``linear``, ``rollout`` and ``informed``."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer

from ..optim import Braking
from ..tensors.module_buffers import copy_all
from ..tensors.torch_private import foreach
from .batches import Batch, Weight, in_batches


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


@dataclass(frozen=True)
class ListRule:
    """An optimizer's update rule for many parameters at once.

    Attributes:
        predict: called as ``predict(batch, horizon)``; writes ``batch.out``.
        begun: the name of the state without which there is nothing to predict from.
    """

    predict: Callable[[Batch, int], None]
    begun: str


class BuiltInPredictor:
    """``linear``, ``rollout`` or ``informed`` for SGD, Adam, AdamW and NAdam, and SGD with braking.

    Unless it uses gradients, the result depends on the version and the horizon alone, so micro-batches that share both
    share it.
    """

    def __init__(
        self, name: str, rules: dict[type[Optimizer], ListRule | Rule], *, uses_gradients: bool = False
    ) -> None:
        self.name = name
        self.uses_gradients, self.alike = uses_gradients, not uses_gradients
        self.rules = rules

    def __repr__(self) -> str:
        return f"<predictor {self.name}>"

    def knows(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer's update rule is known."""
        return type(optimizer) in self.rules

    def foresees(self, optimizer: Optimizer) -> bool:
        """Whether the rule is known and has something to go by, which SGD without momentum has not."""
        rule = self.rules.get(type(optimizer))
        momentum = isinstance(rule, ListRule) and rule.begun == "momentum_buffer"
        return rule is not None and (not momentum or any(group["momentum"] for group in optimizer.param_groups))

    def check(self, optimizer: Optimizer) -> None:
        """Refuse an optimizer whose update rule is not known here.

        Raises:
            TypeError: naming the optimizer and the ways out.
        """
        if not self.knows(optimizer):
            known = ", ".join(cls.__name__ for cls in self.rules)
            raise TypeError(
                f"prediction {self.name!r} does not know the update rule of {type(optimizer).__name__} (it knows {known}, "
                "not their subclasses); use one of these, pass method=get_method(..., predict='last' or 'auto'), which need no "
                "rule (--prediction auto), or a predictor of your own there, or switch prediction off with predict=None"
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
        known = gradients if gradients and self.uses_gradients else [None] * len(out)
        begun: list[tuple[Weight, dict[str, Any]]] = []
        still: list[tuple[Tensor, Tensor]] = []
        for p, o, gradient in zip(parameters, out, known, strict=True):
            state = optimizer.state.get(p, {})
            if state.get(rule.begun) is None if isinstance(rule, ListRule) else not state:
                still.append((o, p))
            elif not isinstance(rule, ListRule):
                rule(p, state, groups[id(p)], horizon, o)
            else:
                weight = Weight(p, o, state, gradient)
                begun.append((weight if type(optimizer) in _OF_MOMENTUM else _as_reals(weight), groups[id(p)]))
        if still:
            copy_all(*zip(*still, strict=True))
        for batch in in_batches(begun):
            assert isinstance(rule, ListRule)
            moves_moments = batch.gradient is not None or _is_coupled(batch, optimizer)
            for part in batch.chunks(scratch=5 if moves_moments else 1):
                if part.gradient is not None:
                    part = _informed(part, share, optimizer)
                rule.predict(part, horizon)


def _as_reals(weight: Weight) -> Weight:
    """A complex weight as pairs of reals, as which torch's Adam family sees it."""
    if not weight.p.is_complex():
        return weight
    state = {
        k: torch.view_as_real(t) if t.is_complex() else t for k, t in weight.state.items() if isinstance(t, Tensor)
    }
    gradient = None if weight.gradient is None else torch.view_as_real(weight.gradient)
    return Weight(torch.view_as_real(weight.p), torch.view_as_real(weight.out), state, gradient)


def _is_coupled(batch: Batch, optimizer: Optimizer | None = None) -> bool:
    """Whether the weight decay is a part of the gradient, and so moves Adam's moments."""
    group = batch.group
    # Adam, AdamW and NAdam all carry the flag in recent torch; older AdamW does not (see _with_flag).
    decoupled = type(optimizer) is AdamW or bool(group.get("decoupled_weight_decay", False))
    return bool(group["weight_decay"]) and not decoupled and "exp_avg" in batch.state


def _informed(batch: Batch, share: float, optimizer: Optimizer) -> Batch:
    """The states after the next update, as the rules read them: they correct Adam's moments for the steps so far.

    The second moment moves too: a weight that never had a gradient (a token's, not seen before) has none to be divided
    by.
    """
    group, state = batch.group, batch.state
    assert batch.gradient is not None
    known = foreach.neg(batch.gradient) if group["maximize"] else batch.gradient
    if group["weight_decay"] and ("momentum_buffer" in state or _is_coupled(batch, optimizer)):
        known = foreach.add(known, batch.p, alpha=share * group["weight_decay"])
    if "momentum_buffer" in state:
        v = foreach.mul(state["momentum_buffer"], 1 - share * (1 - group["momentum"]))
        foreach.add_(v, known, alpha=1 - group["dampening"])
        return replace(batch, state={"momentum_buffer": v})
    (beta1, beta2), t = map(float, group["betas"]), _scalar(batch.t)
    now, then = (1 - beta1**t, 1 - beta2**t), (1 - beta1 ** (t + 1), 1 - beta2 ** (t + 1))
    if isinstance(now[0], Tensor):
        whole = foreach.mul(state["exp_avg"], _each((1 - share) / now[0]))
        foreach.add_(whole, known)
    else:
        whole = foreach.add(known, state["exp_avg"], alpha=(1 - share) / now[0])
    m = foreach.lerp(state["exp_avg"], whole, 1 - beta1)
    v = foreach.mul(state["exp_avg_sq"], beta2)
    foreach.addcmul_(v, whole, whole, value=1 - beta2)
    moved = {**state}
    if "max_exp_avg_sq" in state:  # never corrected
        moved["max_exp_avg_sq"] = foreach.maximum(state["max_exp_avg_sq"], v)
    foreach.mul_(m, _each(now[0] / then[0]))
    foreach.mul_(v, _each(now[1] / then[1]))
    return replace(batch, state={**moved, "exp_avg": m, "exp_avg_sq": v})


# -- numbers, or tensors of them ------------------------------------------------------------------------
# A number of steps is a float; on an accelerator it is a vector with an element for each weight, and so is what is
# computed from it. The bits are then those of arithmetic in its dtype, as in torch's own capturable step.

Scalar = float | Tensor


def _scalar(value: float | list[Tensor]) -> Scalar:
    return torch.stack(value).flatten() if isinstance(value, list) else value


def _each(c: Scalar) -> Any:
    """What the operations on lists take: a number, or a list of tensors of one element."""
    return list(c.unbind()) if isinstance(c, Tensor) else c


def _addcdiv_(out: list[Tensor], m: list[Tensor], d: list[Tensor], c: Scalar) -> None:
    """``out += c m / d``; with a vector c it writes d."""
    if isinstance(c, Tensor):
        foreach.div_(d, _each(c))
        foreach.addcdiv_(out, m, d)
    else:
        foreach.addcdiv_(out, m, d, value=c)


def _add_(out: list[Tensor], x: list[Tensor], c: Scalar) -> None:
    """``out += c x``; with a vector c it writes x."""
    if isinstance(c, Tensor):
        foreach.mul_(x, _each(c))
        foreach.add_(out, x)
    else:
        foreach.add_(out, x, alpha=c)


def _rate(group: dict[str, Any], t: Scalar) -> Scalar:
    lr = group["lr"]
    return lr if isinstance(t, Tensor) and isinstance(lr, Tensor) else float(lr)


# -- SGD ------------------------------------------------------------------------------------------------


def _sgd_linear(of: Batch, horizon: int) -> None:
    foreach.copy_(of.out, of.p)
    foreach.add_(of.out, of.state["momentum_buffer"], alpha=-horizon * float(of.group["lr"]))


def _sgd_rollout(of: Batch, horizon: int) -> None:
    """h steps with g = decay p, as one linear map of (p, v): p_h = a p + b v.

    ``maximize`` turns the sign of the gradient, which is zero, and not that of the decay.
    """
    group = of.group
    lr, mu, decay = float(group["lr"]), group["momentum"], group["weight_decay"]
    # p and v as coefficients of the (p, v) of now
    pp, pv = 1.0, 0.0
    vp, vv = 0.0, 1.0
    for _ in range(horizon):
        gp, gv = decay * pp, decay * pv
        vp, vv = mu * vp + (1 - group["dampening"]) * gp, mu * vv + (1 - group["dampening"]) * gv
        sp, sv = (gp + mu * vp, gv + mu * vv) if group["nesterov"] else (vp, vv)
        pp, pv = pp - lr * sp, pv - lr * sv
    foreach.copy_(of.out, of.p)
    if decay:
        foreach.mul_(of.out, pp)
    foreach.add_(of.out, of.state["momentum_buffer"], alpha=pv)


# -- the Adam family ------------------------------------------------------------------------------------


def _adam_linear(of: Batch, horizon: int) -> None:
    group, t = of.group, _scalar(of.t)
    if group["amsgrad"]:
        _extrapolate(_adam_rollout, of, horizon)
        return
    lr, (beta1, beta2) = _rate(group, t), map(float, group["betas"])
    denominator = foreach.div(of.state["exp_avg_sq"], _each(1 - beta2**t))
    foreach.sqrt_(denominator)
    foreach.add_(denominator, group["eps"])
    foreach.copy_(of.out, of.p)
    if not _is_coupled(of):
        foreach.mul_(of.out, 1 - horizon * lr * group["weight_decay"])
    _addcdiv_(of.out, of.state["exp_avg"], denominator, -horizon * lr / (1 - beta1**t))


def _adam_rollout(of: Batch, horizon: int) -> None:
    group, t, o = of.group, _scalar(of.t), of.out
    lr, decay, (beta1, beta2) = _rate(group, t), group["weight_decay"], map(float, group["betas"])
    m, v, v_max = of.state["exp_avg"], of.state["exp_avg_sq"], of.state.get("max_exp_avg_sq")
    coupled = _is_coupled(of)
    foreach.copy_(o, of.p)
    if coupled:  # the decay enters the moments: they need room to move in
        m, v = foreach.clone(m), foreach.clone(v)
        v_max = None if v_max is None else foreach.clone(v_max)
    for i in range(1, horizon + 1):
        if coupled:
            _decay_moments(m, v, o, beta1, beta2, decay)
            left = (1.0, 1.0)
        else:  # the moments only fade
            left = (beta1**i, beta2**i)
            if decay:
                foreach.mul_(o, 1 - lr * decay)
        if v_max is None:
            denominator = foreach.mul(v, _each(left[1] / (1 - beta2 ** (t + i))))
        else:  # fading never raises the maximum; the coupled decay may
            if coupled:
                foreach.maximum_(v_max, v)
            denominator = foreach.div(v_max, _each(1 - beta2 ** (t + i)))
        foreach.sqrt_(denominator)
        foreach.add_(denominator, group["eps"])
        _addcdiv_(o, m, denominator, -lr * left[0] / (1 - beta1 ** (t + i)))
        del denominator  # before the next one is made


def _decay_moments(m: list[Tensor], v: list[Tensor], o: list[Tensor], beta1: float, beta2: float, decay: float) -> None:
    """The moments of one step whose gradient is the decay of the weights ``o``."""
    foreach.mul_(m, beta1)
    foreach.add_(m, o, alpha=(1 - beta1) * decay)
    foreach.mul_(v, beta2)
    foreach.addcmul_(v, o, o, value=(1 - beta2) * decay * decay)


def _nadam_rollout(of: Batch, horizon: int) -> None:
    group, t, o = of.group, _scalar(of.t), of.out
    lr, decay, (beta1, beta2) = _rate(group, t), group["weight_decay"], map(float, group["betas"])
    m, v, coupled = of.state["exp_avg"], of.state["exp_avg_sq"], _is_coupled(of)
    mus = [beta1 * (1 - 0.5 * 0.96 ** ((t + i) * group["momentum_decay"])) for i in range(1, horizon + 2)]
    products = _products(of, mus)
    foreach.copy_(o, of.p)
    if coupled:
        m, v = foreach.clone(m), foreach.clone(v)
    for i in range(1, horizon + 1):
        (mu, mu_product), mu_next = (mus[i - 1], products[i - 1]), mus[i]
        if coupled:
            _decay_moments(m, v, o, beta1, beta2, decay)
            denominator = foreach.div(v, _each(1 - beta2 ** (t + i)))
            left = 1.0
        else:
            if decay:
                foreach.mul_(o, 1 - lr * decay)
            denominator = foreach.mul(v, _each(beta2**i / (1 - beta2 ** (t + i))))
            left = beta1**i
        foreach.sqrt_(denominator)
        foreach.add_(denominator, group["eps"])
        # The gradient of this step, decay p, is in the Nesterov step too.
        of_gradient = foreach.div(o, denominator) if coupled else []
        _addcdiv_(o, m, denominator, -lr * mu_next * left / (1 - mu_product * mu_next))
        if coupled:
            _add_(o, of_gradient, -lr * (1 - mu) / (1 - mu_product) * decay)
        del denominator, of_gradient


def _products(of: Batch, mus: list[Any]) -> list[Any]:
    """The product of mu after each of the next steps, as torch forms it: in the dtype of its state, whatever that is."""
    if isinstance(of.mu_product, list):
        product, found = _scalar(of.mu_product), []
        for mu in mus[:-1]:
            product = product * mu
            found.append(product)
        return found
    factors = torch.tensor([of.mu_product, *mus[:-1]], dtype=of.mu_dtype).unbind()
    numbers: list[float] = torch.stack(list(itertools.accumulate(factors, torch.mul))[1:]).tolist()
    return numbers


def _nadam_linear(of: Batch, horizon: int) -> None:
    _extrapolate(_nadam_rollout, of, horizon)


def _extrapolate(rule: Callable[[Batch, int], None], of: Batch, horizon: int) -> None:
    """One step with a zero gradient, ``horizon`` times over: p + horizon (p_1 - p)."""
    rule(of, 1)
    foreach.sub_(of.out, of.p)
    foreach.mul_(of.out, horizon)
    foreach.add_(of.out, of.p)


def _with_flag(rule: ListRule) -> ListRule:
    """AdamW of a torch whose groups do not carry ``decoupled_weight_decay``."""

    def adamw(of: Batch, horizon: int) -> None:
        rule.predict(replace(of, group={**of.group, "decoupled_weight_decay": True}), horizon)

    return replace(rule, predict=adamw)


def _of_sgd(rule: Callable[[Batch, int], None]) -> dict[type[Optimizer], ListRule | Rule]:
    """Braking scales gradients, of which a prediction has none."""
    return dict.fromkeys((SGD, Braking), ListRule(rule, "momentum_buffer"))


def _of_adam(
    adam: Callable[[Batch, int], None], nadam: Callable[[Batch, int], None]
) -> dict[type[Optimizer], ListRule | Rule]:
    rule = ListRule(adam, "exp_avg")
    return {Adam: rule, AdamW: _with_flag(rule), NAdam: replace(rule, predict=nadam)}


_OF_MOMENTUM = (SGD, Braking)
_LINEAR = _of_sgd(_sgd_linear) | _of_adam(_adam_linear, _nadam_linear)
linear = BuiltInPredictor("linear", dict(_LINEAR))
informed = BuiltInPredictor("informed", _LINEAR, uses_gradients=True)
rollout = BuiltInPredictor("rollout", _of_sgd(_sgd_rollout) | _of_adam(_adam_rollout, _nadam_rollout))


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
