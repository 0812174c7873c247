"""Rate and noise floor against the delay: the engine held against what the theory page proves.

    python benchmarks/theory/run.py                # about 3 minutes on one core; cells that are there are not repeated
    python benchmarks/theory/run.py --figure       # results/theory.svg from results/theory.jsonl

Each cell trains shifts ``h -> h + w`` with `dtrp.Pipeline` in float64 on ``lam/2 |w + x|**2``: 16,384 coordinates, each with
noise of its own, which gives the floor; and one coordinate without noise, which gives the rate. `exact.py` has both in closed form.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dtrp

sys.path.insert(0, str(Path(__file__).parent))
from exact import DELAY, Problem, bound, sgd_variance

RESULTS = Path(__file__).parent / "results" / "theory.jsonl"
LAM, SIGMA, COORDINATES, UPDATES, SETTLING = 2.0, 1.5, 16384, 600, 20


class Shift(nn.Module):
    """``h -> h + w``, a stage with one weight a coordinate."""

    def __init__(self, coordinates: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(coordinates))

    def forward(self, h: Tensor) -> Tensor:
        return h + self.w


def make(
    method: str | dtrp.Method, stages: int, step: float, coordinates: int, *, trained: str, momentum: float
) -> tuple[dtrp.Pipeline, list[Shift]]:
    """A pipeline of shifts, all ``trained`` or the first only, and those shifts; in float64, the default dtype of the caller."""
    shifts = [Shift(coordinates) for _ in range(stages if trained == "all" else 1)]
    layers = [*shifts, *(nn.Identity() for _ in range(stages - len(shifts)))]
    pipe = dtrp.Pipeline(
        nn.Sequential(*layers),
        lambda params: torch.optim.SGD(params, lr=step / LAM, momentum=momentum),
        lambda out, target: LAM / 2 * (out - target).square().sum(1).mean(),
        num_stages=stages,
        method=method,
        seed=0,
        num_microbatches=1,
    )
    return pipe, shifts


def expected(method: str, stages: int, step: float, *, trained: str, momentum: float) -> Problem:
    """The same in theory; its delays are those that the papers count, not those of the library's schedule."""
    distances = range(stages - 1, -1, -1) if trained == "all" else [stages - 1]
    predict = dtrp.get_method(method).predict if momentum else None  # plain SGD has no velocity to predict by
    return Problem(tuple(DELAY[method](d) for d in distances), step, momentum, predict)


def residuals(pipe: dtrp.Pipeline, shifts: list[Shift], noise: Iterator[Tensor]) -> Iterator[Tensor]:
    """The sum of the weights at versions 1, 2, ..., as far as all stages have come while ``noise`` lasts.

    After a step stages differ in the number of their updates, by their leads. A stage that has begun to move makes one
    update a step, so its versions are counted from there.
    """
    target = torch.zeros(1, shifts[0].w.numel())
    first = [shift.w.detach().clone() for shift in shifts]
    versions: list[deque[Tensor]] = [deque() for _ in shifts]
    moving = [False] * len(shifts)
    for x in noise:
        pipe.step(x, target)
        for k, (shift, start) in enumerate(zip(shifts, first, strict=True)):
            if moving[k] or not torch.equal(shift.w, start):
                moving[k] = True
                versions[k].append(shift.w.detach().clone())
        if all(versions):
            yield torch.stack([seen.popleft() for seen in versions]).sum(0)


def trajectory(
    method: str | dtrp.Method, stages: int, step: float, count: int, *, momentum: float = 0.0
) -> list[float]:
    """The weight of a single trained stage, from 1 and with noise 0, at versions 1, 2, ... while ``count`` steps last."""
    pipe, shifts = make(method, stages, step, 1, trained="first", momentum=momentum)
    with torch.no_grad():
        shifts[0].w.fill_(1.0)
    weights = [float(w) for w in residuals(pipe, shifts, iter([torch.zeros(1, 1)] * count))]
    pipe.close()
    return weights


def floor(method: str | dtrp.Method, stages: int, step: float, *, trained: str = "first", momentum: float = 0.0,
          coordinates: int = COORDINATES, updates: int = UPDATES, seed: int = 0) -> dict[str, Any]:  # fmt: skip
    """Mean of r**2 over sigma**2, over coordinates and updates after the run has settled."""
    pipe, shifts = make(method, stages, step, coordinates, trained=trained, momentum=momentum)
    generator = torch.Generator().manual_seed(seed)
    settle = int(SETTLING / step * (1 - momentum))
    noise = (SIGMA * torch.randn(1, coordinates, generator=generator) for _ in range(settle + updates))
    means = [float(r.square().mean()) / SIGMA**2 for r in residuals(pipe, shifts, noise)][settle:]
    delays = {stage: max(counter) for stage, counter in pipe.delays().items()}
    pipe.close()
    parts = torch.stack([part.mean() for part in torch.tensor(means).tensor_split(10)])
    return {
        "floor": sum(means) / len(means),
        "floor_error": float(parts.std() / 10**0.5),
        "delays": delays,
        "updates": len(means),
        "coordinates": coordinates,
    }


def rate(weights: list[float]) -> float:
    """The factor an update in the long run, from a weight's path: of two lags, the dominant root of w'' = p w' + q w."""
    a, b, c, d = weights[-4:]
    determinant = b * b - a * c
    if abs(determinant) < 1e-13 * b * b:  # one real root is left
        return b / a
    p, q = (b * c - a * d) / determinant, (b * d - c * c) / determinant
    return max(abs(complex(root)) for root in torch.linalg.eigvals(torch.tensor([[p, q], [1.0, 0.0]])).tolist())


def cells() -> Iterator[dict[str, Any]]:
    for stages in (2, 3, 4):
        for method in ("bp", "ddg", "fr", "fdg", "dtr", "dtrp"):
            for step in (0.05, 0.15):
                yield {"method": method, "stages": stages, "step": step, "trained": "first", "momentum": 0.0}
    for stages in (2, 3, 4):
        for method in ("fdg", "dtr", "dtrp", "dtrp-1f1b", "spectrain"):
            yield {"method": method, "stages": stages, "step": 0.01, "trained": "first", "momentum": 0.9}
    for stages in (2, 4):
        for method in ("fdg", "dtr"):
            yield {"method": method, "stages": stages, "step": 0.02, "trained": "all", "momentum": 0.0}


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """A cell's line: what the engine did, and what the theory says."""
    start = time.perf_counter()
    problem = expected(**cell)
    line: dict[str, Any] = {**cell, **floor(**cell), "exact_floor": problem.variance(), "exact_rate": problem.rate()}
    if cell["trained"] == "first":
        path = trajectory(cell["method"], cell["stages"], cell["step"], 400, momentum=cell["momentum"])
        exact = problem.residuals([0.0] * len(path), 1.0)[1:]
        line["path_error"] = max(abs(w - r) for w, r in zip(path, exact, strict=True))
        usable = [w for w in path if abs(w) > 1e-9]
        line["rate"] = rate(usable)
        line["updates_of_rate"] = len(usable)
        squares = [1.0, *(w * w for w in path[:-1])]
        line["mean_square"] = sum(squares) / len(squares)  # of |grad f|**2 over lam**2, from 1
        line["mean_square_bound"] = 1 / (cell["step"] * len(squares))  # 2 (f(0) - f*) / (eta T), the same units
    if not cell["momentum"]:
        count = len(problem.delays)
        line["gradient_floor"] = count * line["floor"]
        line["theorem_floor"] = bound(cell["step"], max(problem.delays), count)
        if count == 1:
            line["closed_form"] = sgd_variance(cell["step"], problem.delays[0])
    line["expected_delays"] = list(problem.delays)
    line.update(lam=LAM, sigma=SIGMA, seconds=time.perf_counter() - start, torch=torch.__version__,
                python=platform.python_version(), dtrp=dtrp.__version__)  # fmt: skip
    return {key: None if value == float("inf") else value for key, value in line.items()}


def read() -> list[dict[str, Any]]:
    return [json.loads(text) for text in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def figure() -> None:
    """Floor and rate against delay: points measured, lines exact."""
    from matplotlib.figure import Figure

    lines = [line for line in read() if line["trained"] == "first" and not line["momentum"]]
    drawing = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = drawing.subplots(1, 2)
    marks = {"bp": "*", "ddg": "s", "fr": "D", "fdg": "o", "dtr": "^", "dtrp": "v"}
    for step, colour in ((0.05, "#0072b2"), (0.15, "#d55e00")):
        chosen = [line for line in lines if line["step"] == step]
        delays = range(7)
        left.plot(delays, [sgd_variance(step, delay) for delay in delays], color=colour, label=f"closed form, a={step}")
        bounds = [bound(step, delay) for delay in delays if bound(step, delay) < float("inf")]
        left.plot(range(len(bounds)), bounds, color=colour, linestyle=":", label=f"theorem, a={step}")
        right.plot(delays, [Problem((delay,), step).rate() for delay in delays], color=colour, label=f"root, a={step}")
        for line in chosen:
            at = line["expected_delays"][0]
            left.plot(at, line["floor"], marks[line["method"]], color=colour, markersize=5, alpha=0.7)
            right.plot(at, line["rate"], marks[line["method"]], color=colour, markersize=5, alpha=0.7)
    for axes, title in ((left, "noise floor / gradient variance"), (right, "shrinking factor an update")):
        axes.set_xlabel("delay in updates")
        axes.set_title(title)
        axes.legend(fontsize=8)
    for method, mark in marks.items():
        right.plot([], [], mark, color="grey", label=method)
    right.legend(fontsize=8, ncols=2)
    drawing.savefig(RESULTS.with_suffix(".svg"), metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--figure", action="store_true", help="draw the figure from the lines that are there, and nothing else"
    )
    options = parser.parse_args()
    if not options.figure:
        torch.set_num_threads(1)
        torch.set_default_dtype(torch.float64)
        done = [{key: line[key] for key in ("method", "stages", "step", "trained", "momentum")} for line in read()]
        RESULTS.parent.mkdir(exist_ok=True)
        for cell in cells():
            if cell in done:
                continue
            line = measure(cell)
            with RESULTS.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps({key: line[key] for key in (*cell, "floor", "exact_floor", "seconds")}), flush=True)
    figure()


if __name__ == "__main__":
    main()
