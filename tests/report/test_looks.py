"""A method's colour is the same in every report; what figures draw of bands, and of times of one process."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
from run_folders import Page, write_run

from dtrp import list_methods

pytest.importorskip("matplotlib")

from dtrp.report import collect
from dtrp.report.figures import Plot, draw
from dtrp.report.looks import METHOD_COLOURS, method_look
from dtrp.report.page import render
from dtrp.report.plots import make_plots


def plots_of(folder: Path) -> dict[str, Plot]:
    return {plot.name: plot for plot in make_plots(collect([str(folder)]))}


def page_of(folder: Path) -> str:
    """The page of a report, whose figures are empty, as they take long to draw."""
    collection = collect([str(folder)])
    return render(collection, [(plot, "<svg></svg>") for plot in make_plots(collection)])


def test_every_method_has_a_colour_of_its_own() -> None:
    assert set(METHOD_COLOURS) == set(list_methods())
    assert len(set(METHOD_COLOURS.values())) == len(METHOD_COLOURS)


def test_a_method_has_the_same_colour_in_every_report(tmp_path: Path) -> None:
    write_run(tmp_path / "a" / "dtrp", "dtrp")
    for method in ("bp", "fdg", "dtrp", "of-another-version"):
        for stages in (2, 4):
            write_run(tmp_path / "b" / f"{method}-{stages}", method, stages=stages)
    alone = plots_of(tmp_path / "a")["accuracy"].look("dtrp")
    for name, plot in plots_of(tmp_path / "b").items():
        labels = plot.series["median over epochs"]["x"] if name.startswith("time") else plot.series
        for label in labels:
            assert plot.look(label).colour == method_look(label.split()[0]).colour, (name, label)
        for label in labels:
            if label.startswith("dtrp "):
                assert plot.look(label).colour == alone.colour
        looks = [plot.look(label) for label in labels]
        assert len(set(looks)) == len(looks), "variants of a method differ in dash, marker and hatching"
    bars = draw(plots_of(tmp_path / "b")["time"]).axes[0].patches
    assert len({bar.get_facecolor() for bar in bars}) == 4


def test_bands_end_where_values_do(tmp_path: Path) -> None:
    ends = (0.1, 0.9, 0.99)
    for seed, accuracy in enumerate(ends):
        write_run(tmp_path / "grid" / f"dtrp-{seed}", "dtrp", seed, accuracy=accuracy)
    plots = plots_of(tmp_path / "grid")
    for name in ("accuracy", "test-loss", "train-loss"):
        assert min(plots[name].series["dtrp"]["low"]) >= 0
    line = plots["accuracy"].series["dtrp"]
    assert max(line["high"]) == 100.0
    assert line["low"][-1] == pytest.approx(100 * (statistics.fmean(ends) - statistics.stdev(ends)))
    for seed, score in enumerate((-0.1, 0.4)):  # a score that may be negative
        write_run(tmp_path / "other" / f"dtrp-{seed}", "dtrp", seed, accuracy=score, metric=["mine.py:r2"])
    assert plots_of(tmp_path / "other")["accuracy"].series["dtrp"]["low"][-1] < -0.1


def in_one_process(folder: Path) -> None:
    """Make a run one of a single process, in which no stage waits."""
    summary = json.loads((folder / "summary.json").read_text())
    for stage in summary["stages"]:
        stage["busy"]["wait_forward"] = 0.0
    (folder / "summary.json").write_text(json.dumps(summary))


@pytest.mark.parametrize("alone", [(), ("bp",), ("bp", "dtrp")])
def test_times_of_one_process_are_marked(tmp_path: Path, alone: tuple[str, ...]) -> None:
    for method in ("bp", "dtrp"):
        write_run(tmp_path / "grid" / method, method)
        if method in alone:
            in_one_process(tmp_path / "grid" / method)
    titles = {plot.title: plot for plot in plots_of(tmp_path / "grid").values()}
    for title, count in (
        ("Time of a mini-batch", 2 - len(alone)), ("Time of a mini-batch, in one process", len(alone)),
        ("Share of the time at work", 2 - len(alone)), ("Share of the time at work, in one process", len(alone)),
    ):  # fmt: skip
        assert (title in titles) == (count > 0)
        if count:
            series = titles[title].series
            assert len(series.get("median over epochs", {"x": series})["x"]) == count
    (tmp_path / "report.html").write_text(page_of(tmp_path / "grid"))
    page = Page(tmp_path / "report.html")
    header, bp, dtrp_ = page.rows
    assert ("ms a mini-batch, one process" in header) == (len(alone) == 2)
    assert ("(one process)" in " ".join(bp)) == (len(alone) == 1)
    assert "(one process)" not in " ".join(dtrp_)
    assert ("A mini-batch takes" in page.text) == (len(alone) < 2)


def test_a_time_of_one_seed_has_no_line(tmp_path: Path) -> None:
    write_run(tmp_path / "grid" / "bp", "bp")
    write_run(tmp_path / "grid" / "dtrp-0", "dtrp")
    (container,) = (c for c in draw(plots_of(tmp_path / "grid")["time"]).axes[0].containers if hasattr(c, "has_xerr"))
    assert not any(len(lines.get_segments()) for lines in container[2])


def test_figures_leave_no_hole(tmp_path: Path) -> None:
    """The figures of a section fill whole rows of six columns on a wide screen."""
    spans = {"": [3], " threes": [2], " odd": [2, 2, 2, 3], " alone": [6]}

    def width(kind: str, place: int) -> int:
        return spans[kind][min(place, len(spans[kind]) - 1)]

    for count in (1, 2, 4):
        settings: dict[str, Any] = {"trace": True} if count == 4 else {}
        for stages in range(2, 2 + count):
            for method in ("bp", "dtrp", "fdg") if count > 1 else ("dtrp",):
                write_run(tmp_path / str(count) / f"{method}-{stages}", method, stages=stages, **settings)
        text = page_of(tmp_path / str(count))
        sections = re.findall(r'<div class="figures([^"]*)">(.*?)</div>', text, re.S)
        assert sections
        for kind, inside in sections:
            figures = inside.count("<figure ")
            free = 6
            for place in range(figures):
                free = (free - width(kind, place)) % 6
            assert free == 0, (kind, figures)
