"""`dtrp report`: the page holds what the raw files hold, and needs nothing beside it."""

from __future__ import annotations

import itertools
import json
import math
import re
import shlex
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import yaml
from browser import CHROMIUM, needs_chromium, open_page
from run_folders import Page, write_run

from dtrp import Schedule, get_method, list_methods
from dtrp.cli import run

pytest.importorskip("matplotlib")

from dtrp.report import collect, write_report
from dtrp.report.figures import Plot, draw, on_white, png, svg
from dtrp.report.plots import SECTIONS, make_plots


@pytest.fixture
def made(tmp_path: Path) -> Callable[[list[Path]], Page]:
    def make(folders: list[Path]) -> Page:
        out = tmp_path / "report.html"
        write_report([str(folder) for folder in folders], str(out))
        return Page(out)

    return make


def test_the_page_holds_what_the_files_hold(tmp_path: Path, made: Callable[[list[Path]], Page]) -> None:
    grid = tmp_path / "grid"
    for seed in range(3):
        write_run(grid / f"bp-K2-A1-seed{seed}", "bp", seed, accuracy=0.6 + 0.1 * seed)
        write_run(grid / f"dtrp-K2-A1-seed{seed}", "dtrp", seed, accuracy=0.5)
    page = made([grid])
    by_folder = {r["folder"]: r for r in page.data["runs"]}
    assert len(by_folder) == 6
    for folder in grid.iterdir():
        own = by_folder[folder.name]
        assert own["metrics"] == [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert own["summary"] == json.loads((folder / "summary.json").read_text())
        assert own["config"] == yaml.safe_load((folder / "config").read_text())
    plots = {plot["name"]: plot["series"] for plot in page.data["plots"]}
    accuracies = [100 * (0.6 + 0.1 * seed) for seed in range(3)]
    line = plots["accuracy"]["bp"]
    assert line["x"] == [1, 2, 3]
    assert line["y"][-1] == pytest.approx(statistics.fmean(accuracies))
    assert line["high"][-1] - line["y"][-1] == pytest.approx(statistics.stdev(accuracies))
    assert plots["memory"]["dtrp"]["y"] == [pytest.approx(0.0042), pytest.approx(0.0052)]
    times = plots["time"]["median over epochs"]
    assert (times["x"], times["y"]) == (["bp", "dtrp"], [pytest.approx(30.0)] * 2)
    assert plots["utilization"]["bp"]["y"] == [pytest.approx(40.0), pytest.approx(50.0)]
    assert plots["delay"]["dtrp"] == {"x": [0, 1], "y": [10.0, 90.0]}
    assert plots["prediction-error"] == {"dtrp": {"x": [4, 8], "y": [0.5, pytest.approx(0.3)]}}
    assert set(page.figures) == set(plots), "a picture for each"
    header, bp, dtrp_ = page.rows
    assert header[:2] == ["accuracy, %", "test loss"], "what matters first, on a phone too"
    assert "70.00 ± 10.00" in bp
    assert "50.00 ± 0.00" in dtrp_
    assert "0.40 ± 0.00" in dtrp_
    assert dtrp_[header.index("distance of weights, %") + 1] == "40.000 ± 0.000"


def test_the_page_needs_nothing_beside_it(tmp_path: Path, made: Callable[[list[Path]], Page]) -> None:
    write_run(tmp_path / "run")
    page = made([tmp_path / "run"])
    assert all(address.startswith(("#", "data:")) for address in page.addresses), page.addresses
    assert "@import" not in page.text
    assert not re.search(r"url\((?!#)", page.text)
    assert '<meta name="viewport"' in page.text
    assert "prefers-color-scheme" in page.text or "color-scheme: light dark" in page.text
    assert "currentColor" in page.figures["accuracy"]
    assert "stage 0 | F0" in page.text, "the schedule"


def test_the_same_runs_make_the_same_page(tmp_path: Path, made: Callable[[list[Path]], Page]) -> None:
    write_run(tmp_path / "run")
    assert made([tmp_path / "run"]).text == made([tmp_path / "run"]).text


@pytest.mark.parametrize("count", [1, len(list_methods())])
def test_one_method_or_all(tmp_path: Path, made: Callable[[list[Path]], Page], count: int) -> None:
    for name in list_methods()[:count]:
        write_run(tmp_path / "grid" / name, name)
    page = made([tmp_path / "grid"])
    assert len(page.rows) == count + 1
    assert len(page.data["plots"][0]["series"]) == count


def raw(grid: Path) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """Summaries by method and K, each with its metrics, as they lie on the disk."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for folder in sorted(grid.iterdir()):
        config = yaml.safe_load((folder / "config").read_text())
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        own = {**json.loads((folder / "summary.json").read_text()), "metrics": lines}
        found.setdefault((config["method"], config["stages"]), []).append(own)
    return found


def peak(stage: dict[str, Any]) -> float:
    memory = stage["memory"]
    held = memory["weights"] + memory["optimizer"] + memory["gradients_peak"] + memory["predicted"]
    return float(held + stage["activations_peak"]) / 1e6


def test_every_figure_shows_what_the_files_hold(tmp_path: Path, made: Callable[[list[Path]], Page]) -> None:
    """All of them, from the page, against the files read anew; what is drawn is what the page holds."""
    grid, methods = tmp_path / "grid", ("bp", "fdg", "dtrp", "dtrp-1f1b")
    for stages, method, seed in itertools.product((2, 3), methods, range(2)):
        write_run(
            grid / f"{method}-{stages}-{seed}", method, seed, accuracy=0.3 + 0.1 * seed + 0.01 * stages, stages=stages
        )
    trace = {"traceEvents": [
        {"name": "thread_name", "ph": "M", "pid": 0, "tid": 4, "args": {"name": "stage 1"}},
        {"name": "thread_name", "ph": "M", "pid": 7, "tid": 4, "args": {"name": "stage 1"}},
        {"name": "F0", "cat": "F", "ph": "X", "pid": 7, "tid": 4, "ts": 2e3, "dur": 1e3},  # of another replica
        *({"name": f"{kind}0", "cat": kind, "ph": "X", "pid": 0, "tid": 4, "ts": ts, "dur": 500.0 + ts}
          for kind, ts in (("F", 0.0), ("B", 1e3), ("F", 2e3), ("U", 3e3), ("wait", 4e3))),
    ]}  # fmt: skip
    (grid / "dtrp-2-0" / "trace.json").write_text(json.dumps(trace))
    page, files = made([grid]), raw(grid)
    plots = {plot["name"]: plot["series"] for plot in page.data["plots"]}
    checked = {"time", "memory-by-stages", "timeline-dtrp-K-2", "frontier"}
    for stages in (2, 3):
        runs = {method: files[method, stages] for method in methods}
        for name, factor, key in (
            ("accuracy", 100, "test_accuracy"), ("test-loss", 1, "test_loss"), ("train-loss", 1, "train_loss"),
        ):  # fmt: skip
            series = plots[f"{name}-K{stages}-A1"]
            assert series.keys() == runs.keys()
            for method, own in runs.items():
                each = [[factor * line[key] for line in run["metrics"]] for run in own]
                assert series[method]["x"] == [1, 2, 3]
                assert series[method]["y"] == pytest.approx(
                    [statistics.fmean(values) for values in zip(*each, strict=True)]
                )
                spread = [statistics.stdev(values) for values in zip(*each, strict=True)]
                for side, sign in (("low", -1), ("high", 1)):
                    bound = [y + sign * s for y, s in zip(series[method]["y"], spread, strict=True)]
                    assert series[method][side] == pytest.approx(bound)
            checked.add(f"{name}-K{stages}-A1")
        for method, own in runs.items():
            assert plots[f"memory-K{stages}-A1"][method]["y"] == pytest.approx([peak(s) for s in own[0]["stages"]])
            busy = [100 * s["busy"]["busy"] / s["busy"]["elapsed"] for s in own[0]["stages"]]
            assert plots[f"utilization-K{stages}-A1"][method]["y"] == pytest.approx(busy)
            counts = {int(d): n for d, n in own[0]["stages"][0]["delays"].items()}
            shares = {d: 100 * n / sum(counts.values()) for d, n in counts.items()}
            delay = plots[f"delay-K{stages}-A1"][method]
            assert dict(zip(delay["x"], delay["y"], strict=True)) == pytest.approx(shares)
            errors = own[0]["stages"][0]["prediction_errors"]
            for name, values in (
                ("delay-over-time", [delay for _, delay, _, _ in errors]),
                ("prediction-error", [read / stale for _, _, read, stale in errors]),
            ):
                series = plots[f"{name}-K{stages}-A1"]
                assert (method in series) == bool(errors)
                if errors:
                    assert series[method]["x"] == [minibatch for minibatch, *_ in errors]
                    assert series[method]["y"] == pytest.approx(values)
        checked |= {f"{name}-K{stages}-A1"
                    for name in ("memory", "utilization", "delay", "delay-over-time", "prediction-error")}  # fmt: skip
    times = plots["time"]["median over epochs"]
    shown = {label: (times["y"][i], times["high"][i]) for i, label in enumerate(times["x"])}
    for (method, stages), own in files.items():
        values = [1e3 * run["minibatch_s"] for run in own]
        mean = statistics.fmean(values)
        assert shown[f"{method} K={stages}"] == pytest.approx((mean, mean + statistics.stdev(values)))
    for method in methods:
        line = plots["memory-by-stages"][method]
        largest = [max(peak(s) for s in files[method, stages][0]["stages"]) for stages in (2, 3)]
        assert (line["x"], line["y"]) == ([2, 3], pytest.approx(largest))
        frontier = plots["frontier"][method]
        ends = [[100 * run["test_accuracy"] for run in files[method, stages]] for stages in (2, 3)]
        assert frontier["x"] == [
            max(int(d) for d in files[method, stages][0]["stages"][0]["delays"]) for stages in (2, 3)
        ]
        for key, sign in (("y", 0), ("low", -1), ("high", 1)):
            expected = [statistics.fmean(own) + sign * statistics.stdev(own) for own in ends]
            assert frontier[key] == pytest.approx(expected)
    # From the span in the middle on, in milliseconds from it.
    assert plots["timeline-dtrp-K-2"] == {
        "forward": {"x": [0.0], "y": [1], "width": [2.5]},
        "update": {"x": [1.0], "y": [1], "width": [3.5]},
        "waits for a message": {"x": [2.0], "y": [1], "width": [4.5]},
    }
    assert checked == set(plots) == set(page.figures), "a figure that nothing here looks at"
    for plot in make_plots(collect([str(grid)])):
        assert plots[plot.name] == plot.series
        check_drawn(plot)


def check_drawn(plot: Plot) -> None:
    axes = draw(plot).axes[0]
    if plot.kind == "lines":
        for line, own in zip(axes.lines, plot.series.values(), strict=True):
            assert (list(line.get_xdata()), list(line.get_ydata())) == (own["x"], own["y"])
        return
    if plot.kind == "points":
        for line, bands, own in zip(axes.lines, axes.collections, plot.series.values(), strict=True):
            assert [round(x) for x in line.get_xdata()] == own["x"]
            assert list(line.get_ydata()) == own["y"]
            assert [tuple(ends[:, 1]) for ends in bands.get_segments()] == list(
                zip(own["low"], own["high"], strict=True)
            )
        return
    bars = [patch for container in axes.containers for patch in getattr(container, "patches", [])]
    if plot.kind == "bars":
        assert [bar.get_height() for bar in bars] == [y for own in plot.series.values() for y in own["y"]]
    elif plot.kind == "rows":
        assert [bar.get_width() for bar in bars] == [y for own in plot.series.values() for y in own["y"]]
        assert [text.get_text() for text in axes.get_yticklabels()] == plot.series["median over epochs"]["x"]
    else:
        drawn = [(bar.get_x(), bar.get_y() + bar.get_height() / 2, bar.get_width()) for bar in bars]
        expected = [one for own in plot.series.values() for one in zip(own["x"], own["y"], own["width"], strict=True)]
        assert drawn == [pytest.approx(one) for one in expected]


def test_many_groups_have_figures_by_stages_and_microbatches_on_one_scale(tmp_path: Path) -> None:
    methods = list_methods()
    for method, stages in itertools.product(methods, (2, 4)):
        if (method, stages) != ("bp", 4) and (method, stages) != ("gpipe", 4):
            write_run(tmp_path / "grid" / f"{method}-{stages}", method, accuracy=0.1 * stages, stages=stages)
    plots = {plot.name: plot for plot in make_plots(collect([str(tmp_path / "grid")]))}
    two, four = plots["accuracy-K2-A1"], plots["accuracy-K4-A1"]
    assert list(two.series) == methods
    assert list(four.series) == ["bp K=2", *(method for method in methods if method not in ("bp", "gpipe"))]
    assert two.limits == four.limits
    assert all(two.look(method) == four.look(method) for method in four.series if method in two.series)
    assert len({two.look(method) for method in methods}) == len(methods)
    assert {plot.section for plot in plots.values()} < set(SECTIONS)


def test_runs_of_other_settings_are_other_groups(tmp_path: Path, made: Callable[[list[Path]], Page]) -> None:
    write_run(tmp_path / "a", seed=0, lr=0.1, trace=True)
    write_run(tmp_path / "b", seed=1, lr=0.1)
    write_run(tmp_path / "c", seed=0, lr=0.2)
    write_run(tmp_path / "d", seed=0, workers=2)
    page = made([tmp_path / name for name in "abcd"])
    seeds = {row[0]: row[-1] for row in page.rows[1:]}
    assert seeds == {"dtrp lr=0.1 workers=default": "0, 1", "dtrp lr=0.2 workers=default": "0",
                     "dtrp lr=default workers=yes": "0"}  # fmt: skip


def test_the_command_on_the_page_repeats_the_run(
    tmp_path: Path, made: Callable[[list[Path]], Page], monkeypatch: pytest.MonkeyPatch
) -> None:
    train = ["train", "--model", "mlp", "--limit-train", "100", "--limit-test", "50", "--epochs", "2", "--threads", "1",
             "--cuts", "1,3", "--no-augment", "--nesterov", "--lr", "0.05", "--prediction", "linear", "--seed", "3"]  # fmt: skip
    assert run([*train, "--out", str(tmp_path / "run")]) == 0
    page = made([tmp_path / "run"])
    found = re.search(r'<pre class="lines" id="commands">(.*?)\n</pre>', page.text, re.S)
    assert found is not None
    monkeypatch.chdir(tmp_path)
    assert run(shlex.split(found[1])[1:]) == 0

    def metrics(folder: Path) -> list[tuple[float, ...]]:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [(line["train_loss"], line["test_loss"], line["test_accuracy"]) for line in lines]

    assert metrics(tmp_path / "again" / "run") == metrics(tmp_path / "run")


def test_how_much_more_training_than_bp(tmp_path: Path, made: Callable[[list[Path]], Page]) -> None:
    """Against bp with the same other settings, finished; by the mean over seeds."""
    for lr, method, epochs, finished in (
        (0.1, "bp", 3, True), (0.1, "dtrp", 6, True), (0.1, "fdg", 2, False),
        (0.2, "bp", 3, False), (0.2, "dtrp", 3, True),
    ):  # fmt: skip
        write_run(tmp_path / "grid" / f"{method}-{lr}", method, lr=lr, epochs=epochs, finished=finished,
                  accuracy=0.5 if method == "bp" else 0.4)  # fmt: skip
    header, *rows = made([tmp_path / "grid"]).rows
    places = [1 + header.index(f"samples to bp's {name}, over bp's") for name in ("accuracy", "loss")]
    # bp comes to 0.5 and 0.7 at epoch 3, dtrp to 0.4 / 3 times as much in each epoch.
    assert {row[0]: [row[place] for place in places] for row in rows} == {
        "bp lr=0.1": ["1", "1"], "dtrp lr=0.1": ["1.25", "1.00"], "fdg lr=0.1": ["not yet", "not yet"],
        "bp lr=0.2": ["-", "-"], "dtrp lr=0.2": ["-", "-"],
    }  # fmt: skip


def test_failed_and_unfinished_cells_and_numbers_that_are_none(
    tmp_path: Path, made: Callable[[list[Path]], Page]
) -> None:
    grid = tmp_path / "grid"
    write_run(grid / "bp-K2-A1-seed0", "bp", accuracy=math.nan)
    write_run(grid / "dtrp-K2-A1-seed0", "dtrp", finished=False)
    (grid / "fdg-K2-A1-seed0.failed").write_text("it <b>broke</b>\n\nTraceback ...")
    page = made([grid])
    assert "it &lt;b&gt;broke&lt;/b&gt;" in page.text
    assert "Not finished: dtrp-K2-A1-seed0" in page.text
    assert "not a number" in page.text
    assert page.data["runs"][0]["metrics"][0]["test_accuracy"] is None
    assert page.data["plots"][0]["series"]["bp"]["y"] == [None] * 3


def test_unfinished_seeds_are_left_out_where_others_are_finished(
    tmp_path: Path, made: Callable[[list[Path]], Page]
) -> None:
    grid = tmp_path / "grid"
    write_run(grid / "bp-K2-A1-seed0", "bp", 0, accuracy=0.6)
    write_run(grid / "bp-K2-A1-seed1", "bp", 1, accuracy=0.3, finished=False, epochs=1)
    write_run(grid / "dtrp-K2-A1-seed0", "dtrp", 0, accuracy=0.6, finished=False, epochs=3)
    write_run(grid / "dtrp-K2-A1-seed1", "dtrp", 1, accuracy=0.3, finished=False, epochs=2)
    page = made([grid])
    _, bp, dtrp_ = page.rows
    assert (bp[1], bp[-2:]) == ("60.00", ["3", "0"])
    assert (dtrp_[1], dtrp_[-2:]) == ("30.00 ± 14.14", ["2", "0, 1"]), "the last epoch that both have"
    curves = page.data["plots"][0]["series"]
    assert curves["bp"]["x"] == [1, 2, 3]
    assert curves["bp"]["y"] == [pytest.approx(20 * e) for e in (1, 2, 3)]
    assert curves["dtrp"]["x"] == [1, 2]
    assert len(page.data["runs"]) == 4


def test_cells_that_have_only_begun_are_named(tmp_path: Path, made: Callable[[list[Path]], Page]) -> None:
    grid = tmp_path / "grid"
    write_run(grid / "bp-K2-A1-seed0", "bp")
    for name in ("dtrp-K2-A1-seed0", "fdg-K2-A1-seed0", ".dtr-K2-A1-seed0.x1y2"):
        write_run(grid / name, "dtrp", finished=False, epochs=0)
    (grid / "fdg-K2-A1-seed0.failed").touch()
    (grid / "bp-K2-A1-seed0.failed").write_text("of a start that was killed when it had just done better\n")
    page = made([grid])
    assert "Not finished: dtrp-K2-A1-seed0." in page.text
    assert page.data["failed"] == [["fdg-K2-A1-seed0", "its note is empty"]]
    assert [run["folder"] for run in page.data["runs"]] == ["bp-K2-A1-seed0"]


def test_the_grids_are_those_of_the_runs(tmp_path: Path, made: Callable[[list[Path]], Page]) -> None:
    write_run(tmp_path / "a", ahead=1.5, order="forward-first", stages=3)
    write_run(tmp_path / "b", seed=1, ahead=1.5, order="forward-first", stages=3)
    write_run(tmp_path / "c", stages=3)
    grids = re.findall(
        r'(?:<p class="small">With ([^<]*):</p>\n)?<pre class="grid">(.*?)</pre>',
        made([tmp_path / n for n in "abc"]).text,
        re.S,
    )
    other = get_method("dtrp", ahead=1.5, backward_first=False)
    assert grids == [
        ("--ahead 1.5 --order forward-first", str(Schedule.build(other, 3, 6))),
        ("", str(Schedule.build("dtrp", 3, 6))),
    ]


def test_every_grid_is_on_the_page(tmp_path: Path, made: Callable[[list[Path]], Page]) -> None:
    for method in list_methods():
        write_run(tmp_path / "grid" / method, method)
    page = made([tmp_path / "grid"])
    assert re.findall(r'<pre class="grid">([\w-]+): stages 2', page.text) == list_methods()
    assert " more</summary>" not in page.text
    write_run(tmp_path / "grid" / "another", stages=3)
    page = made([tmp_path / "grid"])
    assert page.text.count('<pre class="grid">') == len(list_methods()) + 1
    assert "<summary>1 more</summary>" in page.text


@pytest.mark.parametrize("finished", [False, True])
def test_as_many_stages_as_workers(tmp_path: Path, made: Callable[[list[Path]], Page], finished: bool) -> None:
    write_run(tmp_path / "run", stages="auto", workers="2:4", finished=finished)
    write_run(tmp_path / "three", stages=3)
    page = made([tmp_path / "run", tmp_path / "three"])
    assert {row[0].split()[1] for row in page.rows[1:]} == {"K=2" if finished else "K=?", "K=3"}
    assert page.text.count('<pre class="grid">') == 1 + finished


def test_names_are_no_markup(tmp_path: Path, made: Callable[[list[Path]], Page]) -> None:
    write_run(tmp_path / "run", data="</script><script>alert(1)</script>")
    page = made([tmp_path / "run"])
    assert "<script>alert" not in page.text
    assert page.data["runs"][0]["config"]["data"] == "</script><script>alert(1)</script>"


def test_folders_that_hold_no_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "failed").mkdir()
    (tmp_path / "failed" / "bp-K2-A1-seed0.failed").write_text("no luck\n")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "metrics.jsonl").write_text("{")
    write_run(tmp_path / "begun" / "bp-K2-A1-seed0", "bp", finished=False, epochs=0)
    out = tmp_path / "report.html"
    for name, message in (
        ("empty", "holds no run"),
        ("none", "is no folder"),
        ("failed", "no run has been finished; the first failure: bp-K2-A1-seed0: no luck"),
        ("broken", "is no whole run"),
        ("begun", "no run has been finished; bp-K2-A1-seed0 has no epoch yet"),
        ("begun/bp-K2-A1-seed0", "it has no settings, or no epoch yet"),
    ):
        assert run(["report", str(tmp_path / name), "--out", str(out)]) == 2
        assert message in capsys.readouterr().err
    assert not out.exists()
    assert run(["report", "--out", str(out)]) == 2


def test_a_folder_of_folders_and_one_given_twice(tmp_path: Path, made: Callable[[list[Path]], Page]) -> None:
    write_run(tmp_path / "runs" / "grid" / "bp-K2-A1-seed0", "bp")
    (tmp_path / "runs" / "grid" / "fdg-K2-A1-seed0.failed").write_text("no luck\n")
    write_run(tmp_path / "runs" / "one")
    page = made(
        [tmp_path / "runs", tmp_path / "runs" / "grid", tmp_path / "runs" / "one", tmp_path / "runs" / "one" / "." / ""]
    )
    assert [(row[0], row[-1]) for row in page.rows[1:]] == [("bp", "0"), ("dtrp", "0")]
    assert page.data["failed"] == [["fdg-K2-A1-seed0", "no luck"]]


@pytest.mark.parametrize("damage", ["half a line", "no epoch's line", "no settings", "settings", "summary"])
def test_a_run_that_cannot_be_read_loses_nothing_of_the_others(
    tmp_path: Path, made: Callable[[list[Path]], Page], damage: str
) -> None:
    for name in ("bp", "dtrp"):
        write_run(tmp_path / "grid" / name, name)
    broken = tmp_path / "grid" / "dtrp"
    if "line" in damage:
        with open(broken / "metrics.jsonl", "a") as file:
            file.write('{"epoch": 4, "upd' if damage == "half a line" else '{"epoch": 4}\n')
    elif damage == "summary":
        (broken / "summary.json").write_text('{"stages": [{"stage": 0, "delays": {"0": 1}, "memory": {}}]}')
    else:
        (broken / "config").write_text("" if damage == "no settings" else "method: dtrp\nseed: soon\n")
    page = made([tmp_path / "grid"])
    assert [row[0] for row in page.rows[1:]] == ["bp"]
    ((name, why),) = page.data["failed"]
    assert name == "dtrp"
    assert "is no whole run" in why


def test_where_it_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "a run & <its> 'name'")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    report = ["report", "a run & <its> 'name'", "--out"]
    assert run([*report, "deep/in/a folder/report.html"]) == 0
    page = Page(tmp_path / "deep" / "in" / "a folder" / "report.html")
    assert page.data["runs"][0]["folder"] == "a run & <its> 'name'"
    monkeypatch.setattr(
        "dtrp.report.page.make_plots", lambda collection: pytest.fail("it is known before there is work")
    )
    capsys.readouterr()
    for out in ("file/report.html", "folder"):
        assert run([*report, out]) == 2
        assert f"{out}' is a directory" in (error := capsys.readouterr().err) or f"{out} cannot be written (" in error
    assert not list(tmp_path.glob(".*"))


def test_figures_as_files(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    figures = tmp_path / "figures"
    write_report([str(tmp_path / "run")], str(tmp_path / "report.html"), str(figures))
    names = {plot.name for plot in make_plots(collect([str(tmp_path / "run")]))}
    assert {path.name for path in figures.iterdir()} == {f"{name}.{kind}" for name in names for kind in ("svg", "png")}
    assert (figures / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert (figures / "accuracy.svg").read_text().startswith("<svg")
    assert not list(tmp_path.glob(".*")), "nothing temporary is left"


def test_lines_differ_without_colour() -> None:
    series = {f"line {i}": {"x": [1, 2], "y": [i, i + 1.0]} for i in range(12)}
    axes = draw(Plot("p", "t", "x", "y", series)).axes[0]
    looks = {(str(line.get_linestyle()), str(line.get_marker()), line._dash_pattern[1] is None) for line in axes.lines}
    assert len({line.get_marker() for line in axes.lines}) == 12
    assert len(looks) == 12
    assert svg(Plot("p", "t", "x", "y", series)) == svg(Plot("p", "t", "x", "y", series))
    assert png(Plot("p", "t", "x", "y", series, "bars"))


def test_two_lines_of_one_colour_differ_in_dash_too() -> None:
    looks = [Plot("p", "t", "", "y", {}, looks=tuple(list_methods())).look(method) for method in list_methods()]
    for a, b in itertools.combinations(looks, 2):
        assert a.marker != b.marker
        assert a.hatch != b.hatch
        assert a.colour != b.colour or a.dash != b.dash


def test_a_single_epoch_is_a_whole_number_with_its_spread() -> None:
    series = {name: {"x": [1], "y": [y], "low": [y - 1], "high": [y + 1]} for name, y in (("bp", 50.0), ("dtrp", 40.0))}
    for kind in ("lines", "points"):
        axes = draw(Plot("p", "t", "epoch", "y", series, kind)).axes[0]
        low, high = axes.get_xlim()
        assert [x for x in axes.get_xticks() if low <= x <= high] == [1]
        spans = [
            tuple(ends[:, 1])
            for lines in axes.collections
            if hasattr(lines, "get_segments")
            for ends in lines.get_segments()
        ]
        assert spans == [(49.0, 51.0), (39.0, 41.0)]


def test_epochs_without_a_number_are_named_and_have_their_place(tmp_path: Path) -> None:
    write_run(tmp_path / "run", epochs=5)
    metrics = tmp_path / "run" / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    for line in lines[:4]:
        line["test_accuracy"] = math.nan
    lines[1]["test_loss"] = math.inf
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    plots = {plot.name: plot for plot in make_plots(collect([str(tmp_path / "run")]))}
    assert plots["accuracy"].note == "Not finite, and so not drawn: dtrp (epochs 1, 2, 3 and 1 more)."
    assert plots["test-loss"].note == "Not finite, and so not drawn: dtrp (epoch 2)."
    assert plots["train-loss"].note == ""
    low, high = draw(plots["accuracy"]).axes[0].get_xlim()
    assert low < 1 < 5 < high


def test_ticks_are_whole_numbers_and_no_differences() -> None:
    picture = svg(Plot("p", "loss", "epoch", "", {"bp": {"x": [1, 2], "y": [2.3021, 2.3024]}}))
    ticks = [float(text) for text in re.findall(r"<text[^>]*>(2\.[\d]+)</text>", picture)]
    assert len(ticks) >= 3
    assert all(2.302 <= tick <= 2.3025 for tick in ticks)


def test_a_name_with_dollars_is_no_formula() -> None:
    plot = Plot("p", "a $^ b$", "", "y", {"$x_1$": {"x": [1, 2], "y": [1.0, 2.0]}, "b": {"x": [1, 2], "y": [1.0, 2.0]}})
    assert "a $^ b$" in svg(plot)
    assert ">$x_1$<" in svg(plot)
    assert png(plot)


def test_bars_differ_without_colour() -> None:
    series = {f"method {i}": {"x": ["stage 0", "stage 1"], "y": [i + 1.0, 2.0]} for i in range(12)}
    axes = draw(Plot("p", "t", "", "y", series, "bars")).axes[0]
    assert len({frozenset(container.patches[0].get_hatch() or "") for container in axes.containers}) == 12


def test_points_in_rows_or_over_numbers() -> None:
    bands = {"y": [60.0, 55.0], "low": [59.0, 55.0], "high": [61.0, 55.0]}
    rows = Plot(
        "p",
        "t",
        "accuracy",
        "",
        {"A=1": {"x": ["bp", "dtrp"], **bands}, "A=4": {"x": ["dtrp", "bp"], **bands}},
        "points",
    )
    axes = draw(rows).axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["bp", "dtrp"]
    assert [list(line.get_xdata()) for line in axes.lines] == [[60.0, 55.0]] * 2
    assert [[round(y) for y in line.get_ydata()] for line in axes.lines] == [[0, 1], [1, 0]]
    assert [tuple(ends[:, 0]) for ends in axes.collections[0].get_segments()] == [(59.0, 61.0), (55.0, 55.0)]
    check_drawn(
        Plot("p", "t", "delay", "accuracy", {"bp": {"x": [0, 0], **bands}, "dtrp": {"x": [5, 2], **bands}}, "points")
    )
    assert on_white(svg(rows)).startswith('<svg style="background:white" ')
    assert "currentColor" not in on_white(svg(rows))


def test_a_run_that_was_trained(tmp_path: Path, made: Callable[[list[Path]], Page]) -> None:
    train = ["train", "--data", "digits", "--model", "mlp", "--limit-train", "100", "--limit-test", "50", "--epochs", "2",
             "--threads", "1", "--stages", "3", "--prediction-error-every", "1", "--trace",
             "--out", str(tmp_path / "run")]  # fmt: skip
    assert run(train) == 0
    page = made([tmp_path / "run"])
    assert {"accuracy", "test-loss", "train-loss", "memory", "time", "utilization", "delay", "timeline-dtrp"} <= set(
        page.figures
    )
    (timeline,) = (plot["series"] for plot in page.data["plots"] if plot["name"] == "timeline-dtrp")
    events = json.loads((tmp_path / "run" / "trace.json").read_text())["traceEvents"]
    durations = {round(e["dur"] / 1e3, 9) for e in events if e.get("cat") == "F"}
    assert {round(width, 9) for width in timeline["forward"]["width"]} <= durations
    assert set(timeline["forward"]["y"]) == {0, 1, 2}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of all methods at two numbers of stages, with a cell that failed."""
    folder = tmp_path_factory.mktemp("large")
    for stages, method in itertools.product((2, 4), list_methods()):
        write_run(folder / "grid" / f"{method}-{stages}", method, stages=stages)
    (folder / "grid" / "fdg-K8-A1-seed0.failed").write_text("no luck\n")
    write_report([str(folder / "grid")], str(folder / "report.html"))
    return folder / "report.html"


@needs_chromium
@pytest.mark.parametrize("width", [390, 1280])
def test_it_opens_in_a_browser(large: Path, tmp_path: Path, width: int) -> None:
    assert 'id="results"' in open_page(large, width, tmp_path)


@needs_chromium
@pytest.mark.parametrize("accuracy", [0.5, math.nan])
def test_a_page_of_one_method_opens(tmp_path: Path, accuracy: float) -> None:
    write_run(tmp_path / "run", accuracy=accuracy)
    write_report([str(tmp_path / "run")], str(tmp_path / "report.html"))
    shown = open_page(tmp_path / "report.html", 390, tmp_path)
    assert ("not a number" in shown) == math.isnan(accuracy)


@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
def test_it_is_dark_where_the_screen_is(large: Path, tmp_path: Path, dark: bool) -> None:
    shot = tmp_path / "shot.png"
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
               f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--screenshot={shot}", large.as_uri()]  # fmt: skip
    subprocess.run(command, capture_output=True, timeout=240, check=True)
    grey = PIL.Image.open(shot).convert("L")
    corner = grey.getpixel((2, 2))
    assert isinstance(corner, int)
    assert (corner < 60) == dark
    darkest, lightest = grey.getextrema()
    assert darkest < 60
    assert lightest > 200, "the ink is the other way round"


@pytest.mark.parametrize("workers", [False, pytest.param(True, marks=pytest.mark.full)])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # torch's launcher leaves logs open
def test_traces_are_what_perfetto_reads(tmp_path: Path, workers: bool) -> None:
    """The Chrome trace format: complete events (X) in named processes and threads, nested or apart within a thread."""
    train = ["train", "--model", "mlp", "--limit-train", "200", "--limit-test", "50", "--epochs", "1", "--threads", "1",
             "--num-microbatches", "2", "--workers" if workers else "--stages", "3", "--trace"]  # fmt: skip
    assert run([*train, "--out", str(tmp_path / "run")]) == 0
    trace = json.loads((tmp_path / "run" / "trace.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    assert trace["displayTimeUnit"] in ("ms", "ns")
    names: dict[str, set[tuple[int, ...]]] = {"process_name": set(), "thread_name": set()}
    lanes: dict[tuple[int, int], list[tuple[float, float, str]]] = {}
    for event in trace["traceEvents"]:
        assert event["ph"] in ("M", "X")
        assert isinstance(event["pid"], int)
        if event["ph"] == "M":
            place = (event["pid"],) if event["name"] == "process_name" else (event["pid"], event["tid"])
            assert place not in names[event["name"]], "named once"
            assert event["args"]["name"]
            names[event["name"]].add(place)
        else:
            assert event["name"]
            assert event["cat"]
            assert event["ts"] >= 0
            assert event["dur"] >= 0
            lanes.setdefault((event["pid"], event["tid"]), []).append(
                (event["ts"], event["ts"] + event["dur"], event["name"])
            )
    assert names["thread_name"] == set(lanes)
    assert names["process_name"] == {(pid,) for pid, _ in lanes}
    assert len(names["process_name"]) == (3 if workers else 1)
    for spans in lanes.values():
        open_until: list[float] = []
        for begin, end, name in sorted(spans, key=lambda span: (span[0], -span[1])):
            while open_until and open_until[-1] <= begin:
                open_until.pop()
            assert not open_until or end <= open_until[-1], f"{name} ends after the one that it began in"
            open_until.append(end)
