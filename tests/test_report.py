"""`dtrp report`: the page holds what the raw files hold, and needs nothing beside it."""

from __future__ import annotations

import html.parser
import json
import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from browser import needs_chromium, open_page

from dtrp import list_methods
from dtrp.cli import run

pytest.importorskip("matplotlib")

from dtrp.report import collect, write_report
from dtrp.report.figures import Plot, draw, png, svg
from dtrp.report.page import make_plots


def stage(k: int, delays: dict[str, int], errors: list[list[float]]) -> dict[str, Any]:
    memory = {
        "weights": 1000 * (k + 1),
        "predicted": 0,
        "optimizer": 2000,
        "gradients": 0,
        "stash": 0,
        "stash_peak": 10,
    }
    busy = {"elapsed": 10.0, "busy": 4.0 + k, "wait_forward": 1.0, "outside": 5.0 - k}
    return {"stage": k, "parameters": 10, "memory": memory, "activations_peak": 500, "keep": "graph", "busy": busy,
            "layers": ["a"], "delays": delays, "prediction_errors": errors}  # fmt: skip


def write_run(folder: Path, method: str = "dtrp", seed: int = 0, *, accuracy: float = 0.5, finished: bool = True,
              **config: Any) -> None:  # fmt: skip
    folder.mkdir(parents=True)
    settings = {
        "data": "digits",
        "model": "mlp",
        "method": method,
        "stages": 2,
        "num-microbatches": 1,
        "seed": seed,
        **config,
    }
    (folder / "config").write_text(yaml.safe_dump(settings))
    lines = [
        {"epoch": e, "update": 4 * e, "train_loss": 2.0 / e, "test_loss": 2.1 / e, "test_accuracy": accuracy * e / 3,
         "samples_per_s": 100.0, "elapsed_s": float(e)}
        for e in (1, 2, 3)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        errors = [[4.0, 1, 0.5, 1.0], [8.0, 1, 0.3, 1.0]] if method.startswith("dtrp") else []
        summary = {
            "config": settings, "epochs": 3, "updates": 12, "test_accuracy": lines[-1]["test_accuracy"], "test_loss": 0.7,
            "minibatch_s": 0.02 + 0.01 * seed, "environment": {"torch": "x"},
            "stages": [stage(0, {"0": 1, "1": 9}, errors), stage(1, {"0": 10}, [])],
        }  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(summary))


class Page(html.parser.HTMLParser):
    """What stands in a page: the embedded data, the table, the figures' texts, and every address."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = path.read_text()
        self.addresses: list[str] = []
        self.rows: list[list[str]] = []
        self.figures: dict[str, str] = {}
        self._in: list[str] = []
        self.feed(self.text)
        embedded = re.search(r'<script type="application/json" id="data">(.*?)</script>', self.text, re.S)
        assert embedded is not None
        self.data = json.loads(embedded[1])
        for name, picture in re.findall(r'<figure id="([^"]+)".*?(<svg.*?</svg>)', self.text, re.S):
            self.figures[name] = picture

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in.append(tag)
        self.addresses += [str(v) for k, v in attrs if k in ("src", "href", "xlink:href", "srcset") and v]
        if tag == "tr":
            self.rows.append([])

    def handle_data(self, data: str) -> None:
        if self._in and self._in[-1] in ("td", "th"):
            self.rows[-1].append(data)

    def handle_endtag(self, tag: str) -> None:
        while self._in and self._in.pop() != tag:
            pass


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
    assert plots["memory"]["dtrp"]["y"] == [pytest.approx(0.0035), pytest.approx(0.0045)]
    assert plots["time"]["median over epochs"] == {"x": ["bp", "dtrp"], "y": [pytest.approx(30.0)] * 2}
    assert plots["utilization"]["bp"]["y"] == [pytest.approx(40.0), pytest.approx(50.0)]
    assert plots["delay"]["dtrp"] == {"x": [0, 1], "y": [10.0, 90.0]}
    assert plots["prediction-error"] == {"dtrp": {"x": [4, 8], "y": [0.5, pytest.approx(0.3)]}}
    assert set(page.figures) == set(plots), "a picture for each"
    header, bp, dtrp_ = page.rows
    assert header[:2] == ["accuracy, %", "test loss"], "what matters first, on a phone too"
    assert "70.00 ± 10.00" in bp
    assert "50.00 ± 0.00" in dtrp_
    assert "0.40 ± 0.00" in dtrp_


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
    out = tmp_path / "report.html"
    for name, message in (
        ("empty", "holds no run"),
        ("none", "is no folder"),
        ("failed", "no run has been finished; the first failure: bp-K2-A1-seed0: no luck"),
        ("broken", "is no whole run"),
    ):
        assert run(["report", str(tmp_path / name), "--out", str(out)]) == 2
        assert message in capsys.readouterr().err
    assert not out.exists()
    assert run(["report", "--out", str(out)]) == 2


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
    again = re.search(r"dtrp train --config (\S+) --out", page.text)
    assert again is not None
    assert (tmp_path / again[1]).is_file()


@needs_chromium
@pytest.mark.parametrize("width", [390, 1400])
def test_it_opens_in_a_browser(tmp_path: Path, width: int) -> None:
    for method in ("bp", "dtrp"):
        write_run(tmp_path / "grid" / method, method)
    out = tmp_path / "report.html"
    write_report([str(tmp_path / "grid")], str(out))
    assert 'id="results"' in open_page(out, width, tmp_path)
