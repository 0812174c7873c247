"""States of a pipeline, however it came to them: what is saved there loads; those of several versions are told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import pipeline, with_aux
from launching import Server, run_ranks
from ways import CHAINS, METHODS, bare, batch, of_pipelines, spread

import dtrp

CELLS = [(method, parts) for method in METHODS for parts in (1, 3)]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("method", "parts"), CELLS)
def test_whatever_is_saved_loads(tmp_path: Path, method: str, parts: int) -> None:
    found = of_pipelines(method, parts, tmp_path, num_stages=3)
    for i, chain in enumerate([(), *spread(CELLS.index((method, parts)), 8)]):
        found.check(chain, portable=i % 4 == 3)


@pytest.mark.full
@pytest.mark.parametrize(("method", "parts"), CELLS)
def test_whatever_is_saved_by_any_chain_loads(tmp_path: Path, method: str, parts: int) -> None:
    found = of_pipelines(method, parts, tmp_path, num_stages=3)
    for chain in CHAINS:
        for portable in (False, True):
            found.check(chain, portable=portable)


@pytest.mark.full
@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", ["Pipeline", "ScheduleDTRP"])
def test_whatever_is_saved_on_ranks_loads(server: Server, tmp_path: Path, kind: str) -> None:
    cells = [cell for n, cell in enumerate(CELLS) if (n + n // 2) % 2 == (kind == "Pipeline")]  # every method, both A
    outcomes = run_ranks(server, tmp_path, 2, "save_in_every_way", kind, cells, timeout_s=240)
    assert [outcome.out for outcome in outcomes] == ["5 cells\n"] * 2, outcomes


# -- several versions ---------------------------------------------------------------------------------------------


def asked(pipe: dtrp.Pipeline, folder: Path) -> list[Callable[[], Any]]:
    """What takes the stages for one model."""
    return [
        pipe.state_dict,
        pipe.model_state_dict,
        pipe.model_state_dict_on_first,
        lambda: pipe.save_model(folder / "model.pt"),
    ]


@pytest.mark.parametrize("ask", range(4))
def test_stages_of_several_versions_are_told_once(tmp_path: Path, ask: int) -> None:
    pipe = pipeline(bare(), num_stages=3)
    asked(pipe, tmp_path)[ask]()
    for n in range(4):
        pipe.step(*batch(n))
    with pytest.warns(
        UserWarning, match=r"stage 0 has made 0 updates and stage 2 has made 4, .* call flush\(\)"
    ) as told:
        asked(pipe, tmp_path)[ask]()
    assert [warning.filename for warning in told] == [__file__]
    for again in asked(pipe, tmp_path):
        again()


@pytest.mark.parametrize(("method", "num_stages"), [("bp", 3), ("gpipe", 3), ("dgl", 3), ("dtrp", 1), ("dtrp", 3)])
def test_stages_of_one_version_are_not_told(tmp_path: Path, method: str, num_stages: int) -> None:
    pipe = pipeline(bare(), num_stages=num_stages, method=method, num_microbatches=2, **with_aux(method, 3))
    for n in range(4):
        pipe.step(*batch(n))
    pipe.save(tmp_path / "exact")
    pipe.save(tmp_path / "portable", portable=True)
    for ask in asked(pipe, tmp_path):
        ask()
