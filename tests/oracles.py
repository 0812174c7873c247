"""What every method must compute, written from the equations. Imports nothing of the library.

A run is replayed mini-batch by mini-batch, with the weights of every version of every stage kept. With
n the updates that a stage has made when the forward of micro-batch m runs, and b the mini-batch of m:

    backwards made before F(m)  =  m - lead (+ 1 if backward first),  lead = ceil(ahead * (K-1-k))
    n                           =  mini-batches whose micro-batches all lie among those
    forward weights             =  W_k[n], or predicted from it and its optimizer's state, b - n ahead
    backward weights            =  W_k[b] ("current"), or the forward's ("stashed")
    W_k[b+1]                    =  one optimizer step from W_k[b] with the sample-weighted mean gradient

Where each stage has a loss of its own (``local``), with C_k the auxiliary network of stage k < K-1 (DGL, arXiv:1901.08164):

    h_0 = x,  h_k+1 = W_k[b](h_k), of which no gradient is taken at stage k+1
    loss_k                      =  l(C_k[b](h_k+1), y), and l(h_K, y) at the last stage
    (W_k, C_k)[b+1]             =  one optimizer step from (W_k, C_k)[b] with the sample-weighted mean gradient of loss_k
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

Weights = dict[str, Tensor]
State = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """A method, in the oracle's own words."""

    ahead: float
    backward_first: bool
    keep: str
    backward_at: str
    predict: str | None = None
    grad_shrink: float = 1.0
    lr_shrink: float = 1.0
    flush: bool = False
    forward_all: bool = False
    local: bool = False
    split_backward: bool = False  # W is added to the gradient before the update, as a whole backward's would be
    leads: Sequence[int] | None = None
    orders: Sequence[str] | None = None


ROWS = {
    "bp": Row(1, False, "graph", "current", flush=True),
    "gpipe": Row(1, False, "graph", "current", flush=True, forward_all=True),
    "ddg": Row(1, False, "graph", "stashed"),
    "fr": Row(1, False, "input", "current"),
    "fdg": Row(2, False, "graph", "stashed"),
    "adl": Row(2, False, "graph", "stashed"),
    "dtr": Row(2, True, "input", "current"),
    "dtrp": Row(2, True, "input", "current", "rollout"),
    "dtrp-1f1b": Row(1, False, "input", "current", "rollout"),
    "pipedream": Row(1, False, "graph", "stashed"),
    "spectrain": Row(1, False, "graph", "stashed", "linear"),
    "dgl": Row(1, False, "graph", "stashed", local=True),
    "dtrp-split": Row(0.5, False, "input", "current", "rollout", split_backward=True),
    "spectrain-split": Row(1, False, "graph", "stashed", "linear", split_backward=True),
    "bp-zb": Row(1, False, "graph", "current", flush=True, split_backward=True),
}


@dataclass(frozen=True)
class Sgd:
    """v <- mu v + g + decay w (the first g alone starts v);  w <- w - lr v."""

    momentum: float = 0.9
    decay: float = 0.0

    def step(self, w: Tensor, g: Tensor, s: dict[str, Any], lr: float) -> Tensor:
        g = g + self.decay * w
        s["v"] = self.momentum * s["v"] + g if "v" in s else g
        stepped: Tensor = w - lr * s["v"]
        return stepped

    def linear(self, w: Tensor, s: dict[str, Any], lr: float, horizon: int) -> Tensor:
        predicted: Tensor = w - horizon * lr * s["v"]
        return predicted


@dataclass(frozen=True)
class AdamW:
    """w <- w - lr decay w;  m, v moving means of g, g^2;  w <- w - lr m_hat / (sqrt(v_hat) + eps)."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    decay: float = 0.01

    def step(self, w: Tensor, g: Tensor, s: dict[str, Any], lr: float) -> Tensor:
        s["t"] = s.get("t", 0) + 1
        s["m"] = self.beta1 * s.get("m", torch.zeros_like(w)) + (1 - self.beta1) * g
        s["v"] = self.beta2 * s.get("v", torch.zeros_like(w)) + (1 - self.beta2) * g * g
        return w - lr * self.decay * w - lr * self._direction(s)

    def linear(self, w: Tensor, s: dict[str, Any], lr: float, horizon: int) -> Tensor:
        return w - horizon * lr * (self._direction(s) + self.decay * w)

    def _direction(self, s: dict[str, Any]) -> Tensor:
        m_hat, v_hat = s["m"] / (1 - self.beta1 ** s["t"]), s["v"] / (1 - self.beta2 ** s["t"])
        direction: Tensor = m_hat / (v_hat.sqrt() + self.eps)
        return direction


def predict(rule: str, optimizer: Any, w: Tensor, s: dict[str, Any], lr: float, horizon: int) -> Tensor:
    """``linear``: the last step ``horizon`` times over. ``rollout``: that many steps with a zero gradient."""
    if not s:
        return w
    if rule == "linear":
        linear: Tensor = optimizer.linear(w, s, lr, horizon)
        return linear
    s = dict(s)
    for _ in range(horizon):
        w = optimizer.step(w, torch.zeros_like(w), s, lr)
    return w


@dataclass
class Run:
    """What a run must have come to."""

    losses: list[Tensor]
    weights: list[Weights]  # by stage, under the stage's own names
    buffers: list[Weights]
    delays: list[list[int]]  # by stage and micro-batch
    history: list[list[Weights]] = field(default_factory=list)  # by stage and version


def train(
    stages: Sequence[nn.Module],
    segments: Sequence[Sequence[tuple[Tensor, Tensor]]],
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    row: Row,
    optimizer: Any,
    lr: Callable[[int], float],
    rng: Callable[[int, int], AbstractContextManager[None]],
    num_microbatches: int = 1,
    keep: Sequence[str] | None = None,
    clip: Callable[[Weights], Weights] = lambda gradients: gradients,
    networks: Sequence[nn.Module] = (),
) -> Run:
    """Replay a run. ``segments`` are lists of mini-batches with a flush after each; ``rng(stage, m)`` draws.

    ``keep``: of each stage, instead of the row's; one that keeps its graph differentiates at its forward's weights.
    ``clip``: what a stage's gradient is made into before its update. ``networks``: where each stage has a loss of its own.
    """
    if row.local:  # there is nothing to flush
        batches = [batch for segment in segments for batch in segment]
        return train_local(stages, networks, batches, loss_fn, optimizer, lr, rng, num_microbatches, clip)
    stages = [copy.deepcopy(stage) for stage in stages]
    num = len(stages)
    stashed = [row.backward_at == "stashed" or (one == "graph" and not row.flush) for one in keep or [""] * num]
    leads = [math.ceil(round(row.ahead * (num - 1 - k), 9)) for k in range(num)]
    history: list[list[Weights]] = [[{n: p.detach().clone() for n, p in s.named_parameters()}] for s in stages]
    states: list[list[State]] = [[{n: {} for n, _ in s.named_parameters()}] for s in stages]
    buffers = [{n: b.clone() for n, b in s.named_buffers()} for s in stages]
    result = Run([], [], buffers, [[] for _ in stages])

    def run(k: int, m: int, weights: Weights, moved: Weights, x: Tensor) -> Tensor:
        with rng(k, m):
            out: Tensor = functional_call(stages[k], {**weights, **moved}, (x,))
        return out

    m = b = 0
    for segment in segments:
        first_m, first_b, ends = m, b, [0]
        for x, _ in segment:
            ends.append(ends[-1] + min(num_microbatches, len(x)))
        for x, y in segment:
            parts = min(num_microbatches, len(x))
            loss_sum: Tensor | None = None
            gradients: list[Weights] = [{} for _ in stages]
            for part, target in zip(torch.tensor_split(x, parts), torch.tensor_split(y, parts), strict=True):
                inputs, read = [], []
                h = part
                for k in range(num):
                    if row.flush or leads[k] == 0:
                        n = b
                    else:
                        backwards = max(0, m - first_m - leads[k] + (1 if row.backward_first else 0))
                        n = first_b + max(i for i, end in enumerate(ends) if end <= backwards)
                        n = min(n, b)
                    weights = history[k][n]
                    if row.predict and n < b:
                        rate = lr(n) * row.lr_shrink ** (num - 1 - k)
                        weights = {
                            name: predict(row.predict, optimizer, w, states[k][n][name], rate, b - n)
                            for name, w in weights.items()
                        }
                    result.delays[k].append(b - n)
                    inputs.append(h)
                    read.append(weights)
                    with torch.no_grad():
                        h = run(k, m, weights, {name: t.clone() for name, t in buffers[k].items()}, h)
                g: Tensor | None = None
                for k in reversed(range(num)):
                    weights = read[k] if stashed[k] else history[k][b]
                    leaves = {name: w.detach().clone().requires_grad_() for name, w in weights.items()}
                    leaf = inputs[k].detach().clone().requires_grad_()
                    out = run(k, m, leaves, buffers[k], leaf)
                    if k == num - 1:
                        out = loss_fn(out, target) * (len(part) / len(x))
                        loss_sum = out.detach() if loss_sum is None else loss_sum + out.detach()
                    elif g is not None:
                        g = g * row.grad_shrink
                    *grads, g = torch.autograd.grad(out, [*leaves.values(), leaf], g, allow_unused=True)
                    for name, grad in zip(leaves, grads, strict=True):
                        if grad is not None:
                            gradients[k][name] = gradients[k][name] + grad if name in gradients[k] else grad
                m += 1
            assert loss_sum is not None
            result.losses.append(loss_sum)
            for k in range(num):
                state = {name: dict(s) for name, s in states[k][b].items()}
                rate = lr(b) * row.lr_shrink ** (num - 1 - k)
                gradients[k] = clip(gradients[k])
                history[k].append(
                    {
                        name: optimizer.step(w, gradients[k][name], state[name], rate) if name in gradients[k] else w
                        for name, w in history[k][b].items()
                    }
                )
                states[k].append(state)
            b += 1
    result.weights = [versions[-1] for versions in history]
    result.history = history
    return result


def train_local(
    stages: Sequence[nn.Module],
    networks: Sequence[nn.Module],
    batches: Sequence[tuple[Tensor, Tensor]],
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    optimizer: Any,
    lr: Callable[[int], float],
    rng: Callable[[int, int], AbstractContextManager[None]],
    num_microbatches: int = 1,
    clip: Callable[[Weights], Weights] = lambda gradients: gradients,
) -> Run:
    """Replay a run in which each stage has a loss of its own; ``networks`` are those of all stages but the last.

    A stage's weights and buffers in the result are its own and, after ``aux.``, those of its network.
    """
    pairs = [
        nn.ModuleDict({"own": own, "aux": nn.Identity() if aux is None else aux})
        for own, aux in zip(copy.deepcopy(list(stages)), [*copy.deepcopy(list(networks)), None], strict=True)
    ]
    num = len(pairs)
    weights = [{n: p.detach().clone() for n, p in pair.named_parameters()} for pair in pairs]
    buffers = [{n: b.clone() for n, b in pair.named_buffers()} for pair in pairs]
    states: list[State] = [{n: {} for n in own} for own in weights]
    result = Run([], [], [], [[] for _ in pairs])

    def of(tensors: Weights, part: str) -> Weights:
        return {n.removeprefix(part + "."): t for n, t in tensors.items() if n.startswith(part + ".")}

    m = 0
    for b, (x, y) in enumerate(batches):
        parts = min(num_microbatches, len(x))
        gradients: list[Weights] = [{} for _ in pairs]
        loss_sum = torch.zeros(())
        for part, target in zip(torch.tensor_split(x, parts), torch.tensor_split(y, parts), strict=True):
            h = part
            for k, pair in enumerate(pairs):
                leaves = {n: w.detach().clone().requires_grad_() for n, w in weights[k].items()}
                moved = {**leaves, **buffers[k]}
                with rng(k, m):
                    out = functional_call(pair["own"], of(moved, "own"), (h,))
                    judged = functional_call(pair["aux"], of(moved, "aux"), (out,))
                loss = loss_fn(judged, target) * (len(part) / len(x))
                if k == num - 1:
                    loss_sum = loss_sum + loss.detach()
                for name, g in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
                    gradients[k][name] = gradients[k][name] + g if name in gradients[k] else g
                result.delays[k].append(0)
                h = out.detach()
            m += 1
        result.losses.append(loss_sum)
        for k, own in enumerate(weights):
            gradients[k] = clip(gradients[k])
            weights[k] = {n: optimizer.step(w, gradients[k][n], states[k][n], lr(b)) for n, w in own.items()}
    result.weights = [{n.removeprefix("own."): w for n, w in own.items()} for own in weights]
    result.buffers = [{n.removeprefix("own."): t for n, t in own.items()} for own in buffers]
    return result
