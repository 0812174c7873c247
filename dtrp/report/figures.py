"""Draws the figures of a report, from numbers that the page also contains.

Lines differ in dash and marker as well as in colour (`looks.py`). Figures have no background, and their text has the
colour of the page's text, so they suit light and dark pages.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from .looks import COLOURS, Look, numbered_look

_LEGEND_WIDTH, _ROW_WIDTH, _TITLE_WIDTH = 60, 30, 46  # characters in a line of a label, or of a title
_INK = "#123456"  # placeholder in an SVG for the colour of the page's text
# A label may contain dollar signs; ticks show whole numbers, not differences from an offset.
_PLAIN_TEXT: Any = {"text.parse_math": False, "axes.formatter.useoffset": False}


# Numbers by label, ``{label: {"x": [...], "y": [...]}}``, with lists "low" and "high" for a band.
Series: TypeAlias = dict[str, dict[str, list[Any]]]


@dataclass(frozen=True)
class Plot:
    """The content of a figure.

    Args:
        name: name of the file, and of the figure in the page.
        title, x_label, y_label: texts in the figure.
        series: numbers by label.
        kind: ``"lines"``; ``"bars"``: groups of bars, with their names in x; ``"rows"``: horizontal bars, with their
            names in x; ``"timeline"``: horizontal bars that start at x, in the row y, of a ``width``; ``"points"``:
            points with their bands as lines, over whole numbers, or in a row for each name in x.
        note: sentence below the figure.
        section: section of the page.
        limits: limits of the axis of values; None: from the numbers.
        looks: labels whose position here decides their style, so that a label looks the same in all figures. The style
            of other labels follows from their position in ``series``.
        styles: styles by label, before those; in rows by the name of the row.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    series: Series
    kind: str = "lines"
    note: str = ""
    section: str = ""
    limits: tuple[float, float] | None = None
    looks: tuple[str, ...] = ()
    styles: Mapping[str, Look] = field(default_factory=dict)

    def look(self, label: str) -> Look:
        """The style of a label."""
        if label in self.styles:
            return self.styles[label]
        return numbered_look(list(self.looks if label in self.looks else self.series).index(label))


def draw(plot: Plot, ink: str = _INK, background: str = "none") -> Figure:
    """Draw a figure as wide as a phone and as high as its legend and rows need, with text in the colour ``ink``."""
    widest = max((len(label) for label in plot.series), default=0)
    columns = max(1, min(3, 54 // (widest + 6)))
    # A long label takes several lines, and is in a column by itself.
    lines = sum(_num_lines(label, _LEGEND_WIDTH) for label in plot.series)
    legend_rows = max(math.ceil(len(plot.series) / columns), lines // columns)
    legend_rows = legend_rows if len(plot.series) > 1 else 0
    height = 3.1
    if plot.kind == "rows" or _in_rows(plot):
        height = max(height, 0.9 + 0.26 * sum(_num_lines(str(name), _ROW_WIDTH) for name in _values(plot, "x")))
    elif plot.kind == "timeline":
        height = 1.2 + 0.3 * (1 + max(_values(plot, "y")))
    figure = Figure(figsize=(5.2, height + 0.17 * legend_rows), layout="constrained", facecolor=background)
    axes = figure.add_subplot(facecolor=background)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[:].set_color(ink)
    axes.tick_params(colors=ink, labelsize=10)
    axes.set_title(textwrap.fill(plot.title, _TITLE_WIDTH), color=ink, loc="left", fontsize=12)
    axes.set_xlabel(plot.x_label, color=ink, fontsize=10)
    axes.set_ylabel(plot.y_label, color=ink, fontsize=10)
    axes.grid(alpha=0.25, linewidth=0.6, axis="x" if plot.kind in ("rows", "timeline") else "both")
    axes.set_axisbelow(True)
    {"bars": _bars, "rows": _rows, "points": _points, "timeline": _timeline}.get(plot.kind, _lines)(axes, plot, ink)
    if plot.limits is not None:
        (axes.set_xlim if _in_rows(plot) else axes.set_ylim)(*plot.limits)
    if len(plot.series) > 1:
        style: Any = {"ncols": columns, "handlelength": 3, "fontsize": 9, "frameon": False, "labelcolor": ink}
        handles, labels = axes.get_legend_handles_labels()
        wrapped = [textwrap.fill(label, _LEGEND_WIDTH, break_on_hyphens=False) for label in labels]
        figure.legend(handles, wrapped, loc="outside lower center", **style)
    return figure


def _lines(axes: Any, plot: Plot, ink: str) -> None:
    for label, line in plot.series.items():
        look = plot.look(label)
        axes.plot(
            line["x"], _floats(line["y"]), color=look.colour, linestyle=look.dash, marker=look.marker,
            markevery=max(1, len(line["x"]) // 12), markersize=5, linewidth=1.6, label=label,
        )  # fmt: skip
        if "low" in line and line["low"] != line["high"]:
            low, high = _floats(line["low"]), _floats(line["high"])
            if len(line["x"]) == 1:  # a band of one point has no width
                axes.vlines(line["x"], low, high, color=look.colour, linewidth=1.2)
            axes.fill_between(
                line["x"], low, high, color=look.colour, alpha=min(0.15, 0.6 / len(plot.series)), linewidth=0
            )
    xs = _values(plot, "x")
    margin = 0.04 * (max(xs) - min(xs)) or 0.5
    axes.set_xlim(min(xs) - margin, max(xs) + margin)  # with room for values that are not finite
    if all(isinstance(x, int) for x in xs):
        _whole_numbers(axes)


def _bars(axes: Any, plot: Plot, ink: str) -> None:
    names = _values(plot, "x")
    if all(isinstance(name, int) for name in names):
        names.sort()
    width = 0.8 / len(plot.series)
    for number, (label, line) in enumerate(plot.series.items()):
        look = plot.look(label)
        xs = [names.index(x) + (number - (len(plot.series) - 1) / 2) * width for x in line["x"]]
        style = {"color": look.colour, "hatch": look.hatch, "edgecolor": "white", "linewidth": 0.5}
        axes.bar(xs, _floats(line["y"]), width=0.9 * width, **style, label=label)
    axes.set_xticks(range(len(names)), [str(name) for name in names])
    axes.grid(visible=False, axis="x")


def _rows(axes: Any, plot: Plot, ink: str) -> None:
    (line,) = plot.series.values()
    values, rows = _floats(line["y"]), range(len(line["y"]))
    looks = [plot.styles.get(name, numbered_look(0)) for name in line["x"]]
    axes.barh(rows, values, height=0.7, color=[look.colour for look in looks])
    known = [row for row in rows if line["low"][row] != line["high"][row]]  # of one seed there is no spread
    low, high = (_floats(line[key])[known] for key in ("low", "high"))
    spreads = [values[known] - low, high - values[known]]
    axes.errorbar(values[known], known, xerr=spreads, fmt="none", ecolor=ink, elinewidth=1, capsize=2)
    _name_rows(axes, line["x"])


def _points(axes: Any, plot: Plot, ink: str) -> None:
    names, in_rows = _values(plot, "x"), _in_rows(plot)
    places = range(len(names)) if in_rows else names
    # Points with the same x stand side by side.
    total = Counter(x for line in plot.series.values() for x in line["x"])
    step = min(0.6 / max(total.values()), 0.025 * max(10 if in_rows else 1, max(places) - min(places)))
    drawn: Counter[Any] = Counter()
    for label, line in plot.series.items():
        look = plot.look(label)
        xs = []
        for x in line["x"]:
            xs.append((names.index(x) if in_rows else x) + step * (drawn[x] - (total[x] - 1) / 2))
            drawn[x] += 1
        values, low, high = (_floats(line[key]) for key in ("y", "low", "high"))
        points = (values, xs) if in_rows else (xs, values)
        axes.plot(*points, color=look.colour, linestyle="none", marker=look.marker, label=label)
        (axes.hlines if in_rows else axes.vlines)(xs, low, high, color=look.colour, linewidth=1.2)
    if in_rows:
        _name_rows(axes, names)
    else:
        _whole_numbers(axes)


def _name_rows(axes: Any, names: list[str]) -> None:
    axes.set_yticks(
        range(len(names)), [textwrap.fill(name, _ROW_WIDTH, break_on_hyphens=False) for name in names], fontsize=9
    )
    axes.set_ylim(len(names) - 0.5, -0.5)


def _num_lines(text: str, width: int) -> int:
    return max(1, len(textwrap.wrap(text, width, break_on_hyphens=False)))


def _whole_numbers(axes: Any) -> None:
    """Put ticks at whole numbers only, with room for a tick where all x are the same."""
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    low, high = axes.get_xlim()
    if high - low < 1:
        axes.set_xlim((low + high - 1) / 2, (low + high + 1) / 2)


def _values(plot: Plot, key: str) -> list[Any]:
    """The distinct values of all series, in order of their first use."""
    return list(dict.fromkeys(value for line in plot.series.values() for value in line[key]))


def _in_rows(plot: Plot) -> bool:
    """Whether the figure has points in named rows."""
    return plot.kind == "points" and any(isinstance(name, str) for name in _values(plot, "x"))


def _timeline(axes: Any, plot: Plot, ink: str) -> None:
    heights = (0.7, 0.7, 0.7, 0.15)
    for number, (label, line) in enumerate(plot.series.items()):
        axes.barh(
            line["y"], line["width"], left=line["x"], height=heights[number % len(heights)], label=label,
            color=COLOURS[number % len(COLOURS)], hatch=("", "//", "xx", "")[number % 4], edgecolor="white", linewidth=0.3,
        )  # fmt: skip
    axes.set_yticks(sorted(_values(plot, "y")))
    axes.invert_yaxis()


def _floats(values: list[float | None]) -> np.ndarray[Any, Any]:
    """The values, with nan for None."""
    return np.array(values, dtype=float)


def svg(plot: Plot) -> str:
    """The figure as SVG, in the colour of the text around it. The same numbers give the same SVG."""
    out = io.StringIO()
    with mpl.rc_context(_PLAIN_TEXT | {"svg.fonttype": "none", "svg.hashsalt": "dtrp", "font.family": "sans-serif"}):
        canvas: Any = FigureCanvasSVG(draw(plot))
        canvas.print_svg(out, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    # Without the ids that other figures in the page have too.
    text = re.sub(r"<metadata>.*?</metadata>|(?<=<g) id=\"[^\"]*\"", "", text, flags=re.S)
    return re.sub(r'(<svg[^>]*?) width="[^"]*"|(<svg[^>]*?) height="[^"]*"', lambda m: m[1] or m[2], text, count=2)


def on_white(picture: str) -> str:
    """An SVG from `svg` for a separate file: dark text on white."""
    return picture.replace("currentColor", "#111111").replace("<svg ", '<svg style="background:white" ', 1)


def png(plot: Plot) -> bytes:
    """The figure as PNG on white, sharp enough for print."""
    out = io.BytesIO()
    with mpl.rc_context(_PLAIN_TEXT):
        figure = draw(plot, "#111111", "white")
        figure.set_dpi(220)
        canvas: Any = FigureCanvasAgg(figure)
        canvas.print_png(out)
    return out.getvalue()
