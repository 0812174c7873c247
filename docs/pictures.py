"""Pictures of schedules, drawn from `dtrp.Schedule` and `dtrp.simulate` when the site is built.

Three directives put an SVG into the page itself, so that it follows the page's light and dark::

    ```{grid} dtrp                     who does what, slot by slot
    :stages: 4
    :minibatches: 8
    :microbatches: 1
    :show: versions | stash            below each cell: versions of the weights; micro-batches held
    :follow: 4                         this micro-batch stands out
    ```

    ```{timeline} bp 4, dtrp           methods, each with its micro-batches, to the scale of time
    :stages: 4
    :minibatches: 3
    :latency: 0.5                      of a message, in forwards
    ```

    ```{prediction}                    where the weights will be, and what the predictors say
    ```

F is light with dark letters, B and I dark with light letters, R and W between the two, an update a bar at the end of its
cell, and every cell says what it is: colour adds nothing that is not there without it.
"""

from __future__ import annotations

from html import escape
from typing import Any, ClassVar

import torch
from docutils import nodes
from docutils.parsers.rst import Directive, directives
from sphinx.application import Sphinx

import dtrp

LEFT, CELL, ROW, SCALE = 54, 21, 40, 13  # px: labels; an action; a stage; a forward's time
KINDS = {"F": "forward", "B": "backward", "I": "backward", "R": "again", "W": "weights"}


class Drawing:
    """The parts of an SVG, and how far they reach."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.width = self.height = 0.0

    def box(self, x: float, y: float, width: float, height: float, kind: str) -> None:
        self.parts.append(f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="2"/>')
        self.width, self.height = max(self.width, x + width), max(self.height, y + height)

    def text(
        self, x: float, y: float, text: str, kind: str = "", anchor: str = "middle", size: float | None = None
    ) -> None:
        written = "" if size is None else f' font-size="{size:g}"'
        place = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}"{written}'
        self.parts.append(f'<text class="{kind}" {place}>{escape(text)}</text>')
        self.height = max(self.height, y + 4)
        if anchor == "start":
            self.width = max(self.width, x + 7.2 * len(text))

    def line(self, points: list[tuple[float, float]], kind: str) -> None:
        self.parts.append(f'<polyline class="{kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>')
        self.width = max(self.width, *(x for x, _ in points))
        self.height = max(self.height, *(y for _, y in points))

    def svg(self, what: str) -> str:
        """``what``: the picture in words, for who does not see it."""
        width, height = round(self.width + 4), round(self.height + 4)
        return (
            f'<div class="picture" tabindex="0"><svg role="img" aria-label="{escape(what)}" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}">{"".join(self.parts)}</svg></div>'
        )


def draw_grid(schedule: dtrp.Schedule, *, show: str = "", follow: int | None = None) -> str:
    """A schedule's grid, the cells of ``str(schedule)``."""
    drawing = Drawing()
    lines = [line for line in str(schedule).splitlines() if line.startswith("stage")]
    rows = [[cell.split() for cell in line.split("|")[1:]] for line in lines]
    most = [
        max(1, *(len([a for a in row[c : c + 1][0] if a != "U"]) for row in rows if c < len(row)))
        for c in range(len(rows[0]))
    ]
    for stage, row in enumerate(rows):
        y, x, updates, held = stage * (ROW + (14 if show else 0)), LEFT, 0, 0
        drawing.text(0, y + 21, f"stage {stage}", anchor="start")
        for column, actions in enumerate(most):
            drawing.box(x, y, CELL * actions, 32, "empty")
            at, passes = x, []
            for action in row[column] if column < len(row) else []:
                if action == "U":
                    drawing.box(at - 4, y + 1, 3, 30, "update")
                    updates += 1
                    continue
                held += {"F": 1, "B": -1, "W": -1}.get(action[0], 0)
                kind = KINDS[action[0]] + (" aside" if follow not in (None, int(action[1:])) else "")
                drawing.box(at + 1, y + 1, CELL - 2, 30, kind)
                drawing.text(at + CELL / 2 - 1, y + 21, action, kind, size=9 if len(action) > 2 else None)
                if show == "versions":
                    drawing.text(at + CELL / 2, y + 44, f"v{updates}", "small")
                passes.append(action)
                at += CELL
            if show == "stash" and passes:
                drawing.text((x + at) / 2, y + 44, str(held), "small")
            x += CELL * actions + 2
    return drawing.svg(str(schedule))


def draw_timeline(runs: list[tuple[str, int]], num_stages: int, num_minibatches: int, latency: float) -> str:
    """Simulated runs one below the other, to one scale; F takes 1 and B 2 for a whole mini-batch."""
    drawing, y, said = Drawing(), 0.0, []
    for method, parts in runs:
        found = dtrp.simulate(
            method, num_stages=num_stages, num_minibatches=num_minibatches, num_microbatches=parts,
            forward_s=1 / parts, backward_s=2 / parts, latency_s=latency,
        )  # fmt: skip
        words = f"{method}, {parts} micro-batch{'es' if parts > 1 else ''}: {num_minibatches} mini-batches in {found.total_s:g}"
        said.append(words)
        drawing.text(0, y + 12, words, anchor="start")
        y += 20
        recomputing = [dtrp.get_method(method).recomputes(num_stages, stage) for stage in range(num_stages)]
        for stage in range(num_stages):
            drawing.text(0, y + 15 + 26 * stage, f"stage {stage}", anchor="start")
            drawing.box(LEFT, y + 26 * stage, SCALE * found.total_s, 22, "empty")
        for span in found.timeline:
            if span.kind == "U":
                continue
            x, top = LEFT + SCALE * span.start_s, y + 26 * span.stage
            width = SCALE * (span.end_s - span.start_s)
            kind = KINDS[span.kind]
            if span.kind == "B" and recomputing[span.stage]:
                again = SCALE / parts
                waited = width - SCALE * 3 / parts
                drawing.box(x, top, again, 22, "again")
                x, width = x + again + waited, width - again - waited
            drawing.box(x, top, width, 22, kind)
            if width > 11:
                drawing.text(x + width / 2, top + 15, str(span.number), kind + " small")
        y += 26 * num_stages + 12
    return drawing.svg("; ".join(said))


def draw_prediction(horizon: int = 5) -> str:
    """One weight under SGD with momentum, its true path, and where the two predictors put it from one point on it."""
    weight = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=0.05, momentum=0.9)
    path, predicted, begin = [], {}, 5
    for update in range(begin + horizon + 1):
        path.append(weight.item())
        if update == begin:
            for name, predictor in (("linear", dtrp.linear), ("rollout", dtrp.rollout)):
                points = [weight.item()]
                for ahead in range(1, horizon + 1):
                    out = torch.empty_like(weight.data)
                    predictor([weight], optimizer, ahead, [out], stage=0, microbatch=0, version=update)
                    points.append(out.item())
                predicted[name] = points
        weight.grad = weight.data.clone()  # of the loss w**2 / 2
        optimizer.step()
    drawing = Drawing()
    top, low = max(path), min(min(path), *predicted["linear"], *predicted["rollout"])

    def at(update: float, value: float) -> tuple[float, float]:
        return 30 + 52 * update, 24 + 190 * (top - value) / (top - low)

    drawing.line([(30, 8), (30, 226), (30 + 52 * (len(path) - 0.6), 226)], "axis")
    for update in range(len(path)):
        drawing.text(at(update, 0)[0], 242, f"v{update}", "small")
    drawing.text(8, 14, "w", "small")
    curves = {"true": list(enumerate(path))}
    curves |= {name: [(begin + i, v) for i, v in enumerate(points)] for name, points in predicted.items()}
    stale = at(begin + horizon, path[begin])
    drawing.line([at(begin, path[begin]), stale], "stale")
    drawing.text(stale[0] + 8, stale[1] + 4, "no prediction", "small", "start")
    for name, points in curves.items():
        drawing.line([at(*point) for point in points], name)
        for x, y in (at(*point) for point in points):
            drawing.parts.append(f'<circle class="{name}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
        x, y = at(*points[-1])
        drawing.text(x + 8, y + 4, {"true": "the weight itself"}.get(name, name), "small", "start")
    off = {name: abs(points[-1] - path[-1]) for name, points in predicted.items()}
    return drawing.svg(
        f"A weight from version {begin} to {begin + horizon}. It moves by {abs(path[-1] - path[begin]):.2f}; the linear "
        f"prediction is {off['linear']:.2f} off at the end, the rollout {off['rollout']:.2f}."
    )


class Grid(Directive):
    """``{grid} METHOD``."""

    required_arguments = 1
    final_argument_whitespace = False
    option_spec: ClassVar[dict[str, Any]] = {
        "stages": directives.positive_int,
        "minibatches": directives.positive_int,
        "microbatches": directives.positive_int,
        "show": lambda text: directives.choice(text, ("versions", "stash")),
        "follow": directives.nonnegative_int,
    }

    def run(self) -> list[nodes.Node]:
        take = self.options.get
        parts = take("microbatches", 1)
        schedule = dtrp.Schedule.build(self.arguments[0], take("stages", 3), take("minibatches", 8), parts)
        return _raw(draw_grid(schedule, show=take("show", ""), follow=take("follow")))


class Timeline(Directive):
    """``{timeline} METHOD [A], METHOD [A], ...``."""

    required_arguments = 1
    final_argument_whitespace = True
    option_spec: ClassVar[dict[str, Any]] = {
        "stages": directives.positive_int,
        "minibatches": directives.positive_int,
        "latency": lambda text: float(text),
    }

    def run(self) -> list[nodes.Node]:
        runs = [(method, int(parts or 1)) for method, _, parts in
                (one.strip().partition(" ") for one in self.arguments[0].split(","))]  # fmt: skip
        take = self.options.get
        return _raw(draw_timeline(runs, take("stages", 4), take("minibatches", 3), take("latency", 0.0)))


class Prediction(Directive):
    """``{prediction}``."""

    def run(self) -> list[nodes.Node]:
        return _raw(draw_prediction())


def _raw(html: str) -> list[nodes.Node]:
    return [nodes.raw("", html, format="html")]


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("grid", Grid)
    app.add_directive("timeline", Timeline)
    app.add_directive("prediction", Prediction)
    return {"parallel_read_safe": True}
