"""The first paragraph of a report: what was compared, and a verdict that is right whatever was run."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from run_folders import write_run

pytest.importorskip("matplotlib")

from dtrp.report import Collection, collect
from dtrp.report.opening import method_lines, verdict, what_was_compared
from dtrp.report.page import render


def written(folder: Path, runs: dict[str, list[float]], **config: Any) -> Collection:
    """A collection of finished runs: for each ``"method K A"`` the accuracy of each seed."""
    for name, accuracies in runs.items():
        method, stages, parts = name.split()
        for seed, accuracy in enumerate(accuracies):
            settings = {"stages": int(stages), "num-microbatches": int(parts), **config}
            write_run(folder / f"{method}-K{stages}-A{parts}-seed{seed}", method, seed, accuracy=accuracy, **settings)
    return collect([str(folder)])


BP = {"bp 2 1": [0.60, 0.62]}  # 61 +- 1.41 %; of a difference to another such, the spread is 2 points


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ({**BP, "dtrp 2 1": [0.50, 0.52]},
         "in test accuracy, dtrp ends lower than bp by more than the spread over seeds (10.00 points lower)."),
        ({**BP, "dtrp 2 1": [0.70, 0.72]},
         "in test accuracy, dtrp ends higher than bp by more than the spread over seeds (10.00 points higher)."),
        ({**BP, "dtrp 2 1": [0.585, 0.605]},
         "in test accuracy, dtrp cannot be told from bp, as the difference is within the spread over seeds (1.50 points lower)."),
        ({**BP, "dtrp 2 1": [0.62, 0.60]}, "in test accuracy, dtrp ends exactly as bp."),
        ({**BP, "dtrp 2 1": [0.50]},
         "in test accuracy, that dtrp differs from bp may be chance, as one seed has no spread (11.00 points lower)."),
        ({"bp 2 1": [0.60], "dtrp 2 1": [0.50], "fdg 2 1": [0.61]},
         "in test accuracy, that fdg and dtrp differ from bp may be chance, as one seed has no spread "
         "(fdg: 1.00 points higher; dtrp: 10.00 points lower)."),
        ({**BP, "fdg 2 1": [0.50, 0.52], "dtrp 2 1": [0.60, 0.61], "gpipe 2 1": [0.60, 0.62], "dgl 2 1": [0.1, math.nan]},
         "in test accuracy, dgl diverged; fdg ends lower than bp by more than the spread over seeds (10.00 points lower); "
         "dtrp cannot be told from bp, as the difference is within the spread over seeds (0.50 points lower); "
         "gpipe ends exactly as bp."),
        ({**BP, "bp 4 1": [0.60, 0.62], "dtrp 2 1": [0.60, 0.61], "dtrp 4 1": [0.50, 0.52]},
         "in test accuracy, dtrp ends lower than bp by more than the spread over seeds "
         "(10.00 points lower at K=4, in 1 of 2 settings)."),
        ({**BP, "bp 4 1": [0.60, 0.62], "dtrp 2 1": [0.50, 0.52], "dtrp 4 1": [0.20, 0.80]},
         "in test accuracy, dtrp ends lower than bp by more than the spread over seeds "
         "(10.00 points lower at K=2, in 1 of 2 settings, and 11.00 points lower at K=4, which is within the spread)."),
        ({**BP, "bp 4 1": [0.60, 0.62], "dtrp 2 1": [0.70, 0.72], "dtrp 4 1": [0.50, 0.52]},
         "in test accuracy, dtrp ends lower or higher than bp, by setting, by more than the spread over seeds "
         "(10.00 points lower at K=4 and 10.00 points higher at K=2)."),
        ({**BP, "dtrp 2 1": [0.60, 0.61], "dtrp 4 1": [0.50, 0.52]},  # bp comes to the same at every K
         "in test accuracy, dtrp ends lower than bp by more than the spread over seeds "
         "(10.00 points lower at K=4, in 1 of 2 settings)."),
        ({**BP, "dtrp 2 4": [0.60, 0.61]},
         "without a finished run of bp with the same settings, what the methods lose against backpropagation is not known; the "
         "highest test accuracy is that of bp A=1, 61.00 ± 1.41 %, 0.50 points from the next, dtrp A=4, which is within the "
         "spread over seeds."),
        ({"fdg 2 1": [0.60, 0.62], "dtrp 2 1": [0.70, 0.72]},
         "without a finished run of bp with the same settings, what the methods lose against backpropagation is not known; the "
         "highest test accuracy is that of dtrp, 71.00 ± 1.41 %, 10.00 points from the next, fdg, which is more than the spread "
         "over seeds."),
        ({"fdg 2 1": [0.60], "dtrp 2 1": [0.70]},
         "without a finished run of bp with the same settings, what the methods lose against backpropagation is not known; the "
         "highest test accuracy is that of dtrp, 70.00 %, 10.00 points from the next, fdg, and with one seed it is not known "
         "whether that is more than chance."),
        ({"bp 2 1": [math.nan, 0.5], "dtrp 2 1": [0.5, 0.5]},
         "as bp diverged, what the methods lose against backpropagation is not known; dtrp ends at a test accuracy of "
         "50.00 ± 0.00 %."),
        ({**BP, "dtrp 2 1": [math.nan, 0.5]}, "in test accuracy, dtrp diverged."),
        ({"fdg 2 1": [0.60, 0.62], "dtrp 2 1": [math.nan, 0.5]},
         "without a finished run of bp with the same settings, what the methods lose against backpropagation is not known; fdg "
         "ends at a test accuracy of 61.00 ± 1.41 %; dtrp diverged."),
        ({"bp 2 1": [math.nan], "dtrp 2 1": [math.nan]},
         "every run diverged: the test accuracy or the loss is not a number."),
        ({"dtrp 2 1": [0.5, 0.6]},
         "dtrp alone was trained, so there is nothing to compare it with; it ends at a test accuracy of 55.00 ± 7.07 %."),
        ({**BP, "bp 4 1": [0.5, 0.6]},
         "bp alone was trained, so there is no method to compare with it; it ends at a test accuracy of 61.00 ± 1.41 % at K=2, "
         "55.00 ± 7.07 % at K=4."),
    ],
)  # fmt: skip
def test_the_verdict(tmp_path: Path, runs: dict[str, list[float]], expected: str) -> None:
    assert verdict(written(tmp_path / "grid", runs)).replace("\N{NO-BREAK SPACE}", " ") == expected


def test_the_verdict_of_many_methods_names_the_largest_difference(tmp_path: Path) -> None:
    low = {f"{method} 2 1": [0.3 + 0.01 * i, 0.3 + 0.01 * i] for i, method in enumerate(("ddg", "fr", "fdg", "dtr"))}
    near = {f"{method} 2 1": [0.60, 0.63 + 0.001 * i] for i, method in enumerate(("gpipe", "adl", "dtrp", "bp-zb"))}
    assert verdict(written(tmp_path / "grid", {**BP, **low, **near})) == (
        "in test accuracy, ddg, fr, fdg and dtr end lower than bp by more than the spread over seeds (the most, ddg: 31.00 points "
        "lower); gpipe, adl, dtrp and bp-zb cannot be told from bp, as the difference is within the spread over seeds (the most, "
        "bp-zb: 0.65 points higher)."
    )
    mixed = {f"{method} {k} 1": [0.5 if k == 2 else 0.7] * 2 for method in ("ddg", "fr", "fdg", "dtr") for k in (2, 4)}
    assert verdict(written(tmp_path / "mixed", {**BP, **mixed})) == (
        "in test accuracy, ddg, fr, fdg and dtr end lower or higher than bp, by setting, by more than the spread over seeds "
        "(the most, ddg: 11.00 points lower at K=2 and 9.00 points higher at K=4)."
    )


def test_the_verdict_where_runs_are_missing(tmp_path: Path) -> None:
    grid = tmp_path / "grid"
    write_run(grid / "dtrp-K2-A1-seed0", "dtrp", finished=False)
    assert verdict(collect([str(grid)])) == "none yet, as no run is finished."
    write_run(grid / "bp-K2-A1-seed0", "bp", finished=False)
    write_run(grid / "fdg-K2-A1-seed0", "fdg", accuracy=0.5)
    (grid / "fr-K2-A1-seed0.failed").write_text("no luck\n")
    write_run(grid / "spectrain-linear-K2-A1-seed0", "spectrain", finished=False, epochs=0)
    assert verdict(collect([str(grid)])) == (
        "fdg alone was trained, so there is nothing to compare it with; it ends at a test accuracy of 50.00 %; "
        "of bp, dtrp, fr and spectrain no run is finished."
    )
    assert [line.text[-20:] for line in method_lines(collect([str(grid)])) if line.method != "fdg"] == [
        "No run is finished."[-20:].rjust(20)
    ] * 2


def test_the_verdict_on_text_is_by_its_loss(tmp_path: Path) -> None:
    collection = written(tmp_path / "grid", {"bp 2 1": [0.2, 0.3], "dtrp 2 1": [0.5, 0.6]}, data="text", model="gpt")
    assert verdict(collection) == "in test loss, dtrp ends exactly as bp."
    for seed, loss in enumerate((0.6999, 0.8)):
        metrics = tmp_path / "grid" / f"dtrp-K2-A1-seed{seed}" / "metrics.jsonl"
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        lines[-1]["test_loss"] = loss
        metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert verdict(collect([str(tmp_path / "grid")])) == (
        "in test loss, dtrp cannot be told from bp, as the difference is within the spread over seeds (0.050 higher)."
    )


def test_the_verdict_by_a_metric_of_the_users(tmp_path: Path) -> None:
    """What is better is not said of a difference; of several methods without bp the lowest is the best where it is set so."""
    runs = {"bp 2 1": [2.0, 3.0], "fdg 2 1": [12.0, 13.0]}
    found = written(tmp_path / "grid", runs, metric=["mine.py:mistakes"], best="lowest")
    assert verdict(found) == (
        "in test mistakes, fdg ends higher than bp by more than the spread over seeds (10 higher)."
    )
    runs = {"dtrp 2 1": [2.0, 3.0], "fdg 2 1": [12.0, 13.0]}
    found = written(tmp_path / "other", runs, metric=["mine.py:mistakes"], best="lowest")
    assert "the lowest test mistakes is that of dtrp, 2.50 ± 0.71, 10 from the next, fdg" in verdict(found)


def test_what_was_compared(tmp_path: Path) -> None:
    collection = written(tmp_path / "grid", {"bp 2 2": [0.5, 0.6], "dtrp 2 2": [0.5, 0.6], "dtrp 4 4": [0.5]}, epochs=2)
    for run in collection.runs:
        (run.folder / "summary.json").write_text(
            json.dumps({**(run.summary or {}), "ended": f"2026-11-{30 if run.cell.seed else 29}T23:59:59+02:00"})
        )
    assert what_was_compared(collect([str(tmp_path / "grid")])) == (
        "Compared: bp and dtrp, training mlp on digits, with 2 and 4 stages (K), as many micro-batches (A) as stages, for 2 "
        "epochs, 1 and 2 seeds each, a process for each stage; ended from 29 November 2026 to 30 November 2026."
    )
    alone = written(tmp_path / "alone", {"dtrp 2 1": [0.5]}, epochs=1)
    assert re.fullmatch(
        r"One method: dtrp, training mlp on digits, with 2 stages \(K\), 1 micro-batch \(A\), for 1 epoch, 1 seed, a process "
        r"for each stage; ended on \d+ \w+ \d{4}\.",
        what_was_compared(alone),
    )


def test_what_a_program_of_the_users_trained(tmp_path: Path) -> None:
    collection = written(tmp_path / "grid", {"dtrp 2 1": [0.5]}, model="own", data="own", program="python mine.py")
    assert what_was_compared(collection).startswith(
        "One method: dtrp, training the program's model on the program's data, with"
    )


def test_predictions_are_told_apart(tmp_path: Path) -> None:
    written(tmp_path / "grid", {**BP})
    for seed, accuracy in enumerate((0.50, 0.52)):
        for prediction, more in (("linear", 0.10), ("rollout", 0.0)):
            write_run(
                tmp_path / "grid" / f"{prediction}{seed}", "dtrp", seed, accuracy=accuracy + more, prediction=prediction
            )
    collection = collect([str(tmp_path / "grid")])
    assert verdict(collection) == (
        "in test accuracy, dtrp ends lower than bp by more than the spread over seeds "
        "(10.00 points lower with rollout, in 1 of 2 settings)."
    )
    assert "61.00 ± 1.41 %" not in method_lines(collection)[1].text.split(" with linear")[1]


def test_a_line_for_each_method(tmp_path: Path) -> None:
    collection = written(tmp_path / "grid", {**BP, "dtrp 2 1": [0.50, 0.52], "fdg 2 1": [0.60, 0.62]})
    lines = {line.method: line.text for line in method_lines(collection)}
    assert list(lines) == ["bp", "fdg", "dtrp"]
    assert lines["dtrp"] == (
        "Decoupled training with re-computation and weight prediction, the method this library is named for. Test accuracy "
        "51.00 ± 1.41 % (10.00 points lower than bp). Its largest stage holds 0.0052 MB at most (bp 0.0052). A mini-batch takes "
        "25.0 ± 7.1 ms."
    )
    assert "Test accuracy 61.00 ± 1.41 %. Its largest stage holds 0.0052 MB at most. A" in lines["bp"]
    assert "61.00 ± 1.41 % (that of bp)." in lines["fdg"]
    many = written(tmp_path / "many", {f"dtrp {k} 1": [0.1 * k] for k in range(2, 6)})
    assert "Test accuracy 20.00 % to 50.00 % in 4 settings. Its" in method_lines(many)[0].text


def test_the_opening_stands_on_the_page(tmp_path: Path) -> None:
    text = render(written(tmp_path / "grid", {**BP, "dtrp 2 1": [0.50, 0.52]}), [])
    assert '<p id="compared">Compared: bp and dtrp, training mlp on digits' in text
    assert 'class="verdict">In test accuracy, dtrp ends lower than bp' in text
    assert text.count('<li><svg viewBox="0 0 10 10"') == 2
