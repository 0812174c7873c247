"""The grids of runs under `benchmarks/`: what runs, in which order, and at which rate."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from benchmark_programs import benchmark
from idx_files import write_idx


@pytest.fixture
def datasets(tmp_path: Path) -> Any:
    module = benchmark("datasets")
    module.RUNS, module.TUNING = tmp_path / "runs.jsonl", tmp_path / "tuning.jsonl"
    return module


def test_each_run_once_and_what_is_checked_first_comes_first(datasets: Any) -> None:
    cells = list(datasets.cells())
    assert len(cells) == len(set(cells)) == 3 * 3 * (9 + 3 * 3)
    assert [(data, cell.method) for data, _, cell in cells[:8]] == [
        (data, method) for data in ("fashion-mnist", "mnist") for method in ("bp", "dtrp-1f1b", "spectrain", "dtrp")
    ]
    assert Counter(model for _, model, _ in cells) == {"resnet14-8": 81, "mlp": 27, "vgg11-16": 27, "wrn16-2": 27}
    assert {cell.prediction for _, _, cell in cells if cell.method in ("bp", "fr", "fdg", "ddg", "dgl")} == {None}


@pytest.mark.parametrize(
    ("accuracies", "tried", "best"),
    [
        ((0.1, 0.8, 0.9, 0.7, 0.1), (0.03, 0.1, 0.3), 0.1),
        ((0.1, 0.7, 0.8, 0.9, 0.5), (0.03, 0.1, 0.3, 1.0), 0.3),
        ((0.1, 0.7, 0.8, 0.85, 0.9), (0.03, 0.1, 0.3, 1.0), 1.0),
        ((0.8, 0.9, 0.8, 0.7, 0.1), (0.03, 0.1, 0.3, 0.01), 0.03),
    ],
)
def test_the_rate_is_that_of_the_best_accuracy_of_bp_and_has_worse_ones_on_either_side(
    accuracies: tuple[float, ...], tried: tuple[float, ...], best: float, datasets: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracy = dict(zip(datasets.RATES, accuracies, strict=True))
    ran = []

    def run(data: str, model: str, cell: Any, rate: float, path: Path, data_dir: str, runs: Path | None) -> None:
        ran.append((cell.method, cell.seed, rate))
        with path.open("a") as file:
            file.write(
                json.dumps({"data": data, "model": model, "lr": rate, "test_accuracy": [0.95, accuracy[rate]]}) + "\n"
            )

    monkeypatch.setattr(datasets, "run", run)
    assert datasets.chosen_rate("mnist", "mlp", "", None) == best
    assert ran == [("bp", 0, rate) for rate in tried]
    assert datasets.chosen_rate("mnist", "mlp", "", None) == best
    assert len(ran) == len(tried)  # and none is run again


def test_another_split_is_told_from_the_published_one(datasets: Any, tmp_path: Path) -> None:
    folder = write_idx(tmp_path / "mnist")
    assert datasets.split_of("mnist", str(folder)) == "own"
    head = bytes([0, 0, 8, 1, 0, 0, 0, 20])
    (folder / "t10k-labels-idx1-ubyte").write_bytes(head + bytes([7, 2, 1, 0, 4, 1, 4, 9, 5, 9]) + bytes(10))
    assert datasets.split_of("mnist", str(tmp_path)) == "published"
