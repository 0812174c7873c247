"""What the theory says of SGD on a quadratic whose gradient is read some updates late, written from the equations.

Nothing here imports the library: `run.py` and `tests/test_theory.py` hold the engine against it. The problem is that of
docs/theory.md: ``f(w; x) = lam/2 * |w_1 + ... + w_s + x|**2`` with x of variance ``sigma**2`` in each coordinate. Its stages
are shifts, ``h -> h + w_k``, so ``L = C = lam`` and the gradient of each coordinate has variance ``(lam * sigma)**2``.

Letters: a = eta * lam, the step in units of 1/L; D a delay in updates; r(b) the residual ``w_1 + ... + w_s`` that each gradient is
``lam * (r + x)`` of, at update b.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy

# Delay of a stage with d stages after it, one micro-batch a mini-batch, as the papers count it.
DELAY = {
    "bp": lambda d: 0,
    "ddg": lambda d: d,
    "fr": lambda d: d,
    "pipedream": lambda d: d,
    "spectrain": lambda d: d,
    "dtrp-1f1b": lambda d: d,
    "fdg": lambda d: 2 * d,
    "adl": lambda d: 2 * d,
    "dtr": lambda d: max(0, 2 * d - 1),
    "dtrp": lambda d: max(0, 2 * d - 1),
}


@dataclass(frozen=True)
class Problem:
    """SGD, or SGD with momentum, of shifts with a delay each.

    Args:
        delays: D of each trained stage.
        step: a = eta * lam.
        momentum: mu; 0: plain SGD.
        predict: how the forward predicts its weights over D updates: None, "linear" or "rollout".
    """

    delays: tuple[int, ...]
    step: float
    momentum: float = 0.0
    predict: str | None = None

    def reach(self, delay: int) -> float:
        """How many times the last step is added to the weights by the prediction, for a horizon of ``delay``."""
        if self.predict is None:
            return 0.0
        if self.predict == "linear":
            return float(delay)
        return sum(self.momentum**i for i in range(1, delay + 1))

    def residuals(self, noise: Sequence[float], start: float = 0.0) -> numpy.ndarray:
        """r(0), r(1), ... of one coordinate, by the recursion; ``start`` is the first stage's weight at 0, the others' is 0.

        ``v(b+1) = mu v(b) + lam (sum_k [w_k(b-D_k) - c_k eta v(b-D_k)] + x_b)`` and ``w_k(b+1) = w_k(b) - eta v(b+1)``:
        all stages see the same gradient, and have the same v. Before update 0 there was no other version than 0.
        """
        count = len(noise)
        moved = numpy.zeros(count + 1)  # of every stage's weight, the same for all
        velocity = numpy.zeros(count + 1)  # eta v
        for b in range(count):
            seen = start
            for delay in self.delays:
                read = max(0, b - delay)
                seen += moved[read] - self.reach(b - read) * velocity[read]
            velocity[b + 1] = self.momentum * velocity[b] + self.step * (seen + noise[b])
            moved[b + 1] = moved[b] - velocity[b + 1]
        return start + len(self.delays) * moved

    def variance(self) -> float:
        """Stationary variance of r over sigma**2: the sum of the squares of its response to one unit of noise."""
        response = numpy.zeros(0)
        count = 256
        while True:
            impulse = numpy.zeros(count)
            impulse[0] = 1.0
            response = self.residuals(impulse)
            total = float(response @ response)
            tail = float(response[count // 2 :] @ response[count // 2 :])
            if not math.isfinite(total) or count > 2**17:
                return math.inf
            if tail <= 1e-14 * total:
                return total
            count *= 2

    def rate(self) -> float:
        """The factor by which r shrinks in an update, in the long run: the largest root's modulus of the recursion.

        With ``W(z)`` for w and ``z W = W - V``, ``z V = mu V + a (sum_k z**-D_k W - c_k z**-D_k V)``, where V is eta v:
        ``(z-1)(z-mu) + a sum_k z**-D_k (1 * z + c_k (z-1)) = 0``, times z**D.
        """
        longest = max(self.delays)
        polynomial = numpy.zeros(longest + 3)  # highest power first
        polynomial[:3] += [1.0, -1.0 - self.momentum, self.momentum]
        for delay in self.delays:
            reach = self.reach(delay)
            power = longest - delay  # of the term's z**(1 + power) and z**power
            polynomial[-(power + 2)] += self.step * (1.0 + reach)
            polynomial[-(power + 1)] -= self.step * reach
        return float(max(abs(numpy.roots(polynomial))))


def sgd_variance(step: float, delay: int) -> float:
    """The closed form of `Problem.variance` for one stage and plain SGD; infinite from `sgd_limit` on."""
    if step >= sgd_limit(delay):
        return math.inf
    theta = 2 * math.asin(step / 2)
    beta = (delay + 0.5) * theta
    return step / (2 * math.cos(theta / 2)) * (1 + math.sin(beta)) / math.cos(beta)


def sgd_limit(delay: int) -> float:
    """The step a from which plain SGD with this delay does not settle: ``2 sin(pi / (2 (2D+1)))``."""
    return 2 * math.sin(math.pi / (2 * (2 * delay + 1)))


def bound(step: float, delay: int, stages: int = 1) -> float:
    """The floor of the theorem for constant steps: of ``E|grad f|**2`` over ``lam**2 sigma**2 * coordinates``.

    ``grad f`` has a block for each of the stages, all the same, so L and C are ``stages * lam``, and so is each block's share of
    the variance. Infinite where the step is too long for the theorem.
    """
    scaled = step * stages  # eta L = eta C
    if scaled * (1 + 2 * delay) > 1:
        return math.inf
    return stages * (scaled + 4 * scaled**2 * delay)
