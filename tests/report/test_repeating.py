"""The commands on the page of a report: they make the same runs again, those that failed included."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from run_folders import write_run

from dtrp.cli import run
from dtrp.train import TrainConfig
from dtrp.train.comparison import Cell, Comparison, grid

pytest.importorskip("matplotlib")

from dtrp.report import collect
from dtrp.report.repeating import parse_cell, repeating_commands

BASE = TrainConfig(data="digits", model="mlp", epochs=1, limit_train=100, lr=0.1, nesterov=True)


def written(folder: Path, base: TrainConfig, cells: Sequence[Cell], *, not_run: int = 0) -> None:
    """The folder of a comparison, of which the last cells have failed, or are begun."""
    comparison = Comparison(base, cells, str(folder))
    comparison.run(lambda config: None, lambda line: None)
    for number, cell in enumerate(reversed(cells)):
        if number >= not_run:
            words = {"prediction": cell.prediction} if cell.prediction else {}
            write_run(folder / cell.name, cell.method, cell.seed, stages=cell.stages,
                      **{"num-microbatches": cell.num_microbatches, **words})  # fmt: skip
        elif number % 2:
            (folder / f"{cell.name}.failed").write_text("no luck\n")
        else:
            write_run(folder / cell.name, cell.method, cell.seed, stages=cell.stages, finished=False, epochs=0)


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        ((["bp", "fdg", "dtrp"], [2, 4], ["1", "K"], [0, 1, 2]), {}),
        ((["bp", "dtrp"], [2, 4], ["K"], [0, 1]), {"workers": 1, "prediction_error_every": 0}),
        ((["bp", "dtrp"], [2, 4], ["auto"], [0]), {"microbatch_samples": 2, "prediction_error_every": "auto"}),
        ((["bp", "dtrp"], [2, 4], ["1", "4"], [0]), {"microbatch_samples": 3, "prediction_error_every": 7}),
        ((["dtrp", "spectrain"], [2], ["1"], [0, 1], ["linear", "rollout"]), {}),
        ((["bp", "dtrp"], [2], ["1"], [0, 1], ["linear", "rollout"]), {}),
    ],
)
@pytest.mark.parametrize("once", [False, True])
def test_one_command_repeats_a_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: Any, settings: dict[str, Any], once: bool
) -> None:
    cells = grid(*arguments, once=once)
    base = dataclasses.replace(BASE, **settings)
    written(tmp_path / "grid", base, cells, not_run=len(cells) // 3)
    (command,) = repeating_commands(collect([str(tmp_path / "grid")]))
    words = shlex.split(command)
    assert words[:2] == ["dtrp", "compare"]
    assert words[-2:] == ["--out", "again/grid"]
    seen: list[Comparison] = []
    monkeypatch.setattr(Comparison, "run", lambda self, work, say: seen.append(self) or [])
    # To the folder itself, which would refuse other settings.
    assert run([*words[1:-1], str(tmp_path / "grid")]) == 0
    assert set(seen[0].cells) == set(cells)


def test_what_is_no_grid_takes_several_commands(tmp_path: Path) -> None:
    cells = [*grid(["bp", "dtrp"], [2], ["1"], [0, 1]), *grid(["dtrp"], [4], ["1"], [0])]
    written(tmp_path / "grid", BASE, cells)
    shared = (
        "--num-microbatches 1 --seeds {} --one-process --model mlp --epochs 1 --nesterov --limit-train 100 --lr 0.1 "
        "--prediction-error-every 0 --out again/grid"
    )
    assert repeating_commands(collect([str(tmp_path / "grid")])) == [
        f"dtrp compare --methods bp --stages 2 {shared.format(2)}",
        f"dtrp compare --methods dtrp --stages 2 {shared.format(2)}",
        f"dtrp compare --methods dtrp --stages 4 {shared.format(1)}",
    ]


def test_a_run_alone_is_repeated_by_its_own_command(tmp_path: Path) -> None:
    """A run that is in no comparison, one of a comparison that is shown alone, and one of an unreadable comparison."""
    cells = grid(["bp"], [2], ["1"], [0, 1])
    written(tmp_path / "grid", BASE, cells)
    write_run(tmp_path / "alone", "bp")
    write_run(tmp_path / "grid" / "copied", "dtrp")
    found = repeating_commands(
        collect([str(tmp_path / name) for name in ("alone", "grid/bp-K2-A1-seed1", "grid/copied")])
    )
    assert [command.split()[:2] + command.split()[-1:] for command in found] == [
        ["dtrp", "train", f"again/{name}"] for name in ("bp-K2-A1-seed1", "alone", "copied")
    ]
    (tmp_path / "grid" / "compare.yaml").write_text("[")
    found = repeating_commands(collect([str(tmp_path / "grid")]))
    assert [command.split()[1] for command in found] == ["train"] * 3


def test_names_of_cells() -> None:
    for cell in grid(["bp", "dtrp-1f1b", "spectrain-split"], [2, 16], ["1", "K"], [0, 11], ["linear", "rollout"]):
        assert parse_cell(cell.name) == cell
    assert parse_cell(Cell("dtrp-split", 2, 1, 0).name) == Cell("dtrp-split", 2, 1, 0)
    for name in ("mine", "bp-K2-A1", "bq-K2-A1-seed0", "bp-linear-K2-A1-seed0"):
        assert parse_cell(name) is None
