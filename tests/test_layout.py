"""Where things live: who imports whom, how large packages and functions are, and where torch's private names stand."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from source_tree import (
    between_packages,
    circles,
    imports,
    long_definitions,
    modules,
    package_of,
    private_names_of_torch,
    reachable,
)

TESTS = Path(__file__).parent

# Who may import whom; an arrow admits everything further along it.
ARROWS = {
    "cli": ["report"],
    "report": ["train", "schedule_grid"],
    "train": ["pipeline", "pipelining", "data", "models", "atomic_file"],
    "pipelining": ["base_pipeline", "planning", "splitting"],
    "pipeline": ["base_pipeline", "planning", "splitting"],
    "base_pipeline": ["saving"],
    "saving": ["engine", "atomic_file"],
    "planning": ["engine", "splitting", "atomic_file"],
    "engine": ["comm"],
    "comm": ["stage", "launch", "measure"],
    "splitting": ["stage"],
    "stage": ["measure", "predict", "methods", "errors", "tensors"],
    "measure": ["methods", "schedule", "tensors", "atomic_file"],
    "launch": ["errors"],
    "errors": ["schedule"],
    "predict": ["methods", "optim"],
    "optim": ["tensors"],
    "methods": ["schedule"],
    "schedule_grid": ["methods"],
    "data": ["tensors", "lazy", "atomic_file"],
    "models": ["tensors", "lazy"],
    "dtrp": ["lazy"],
    "__main__": ["cli"],
}
LEAVES = {"typing", "validation", "dtrp"}  # which anybody may import: aliases, checks of numbers, and the version


def test_no_imports_go_in_a_circle() -> None:
    graph = imports()
    assert circles(graph) == []
    assert circles({package: targets - {"dtrp"} for package, targets in between_packages(graph).items()}) == []


def test_imports_follow_the_arrows() -> None:
    against = {
        f"{package} -> {target}"
        for package, targets in between_packages(imports()).items()
        for target in targets - LEAVES - reachable(ARROWS, package)
    }
    assert against == set()


def test_packages_are_small_and_no_file_name_comes_twice() -> None:
    files = [path for path in modules().values() if path.name != "__init__.py"]
    assert {str(folder): n for folder, n in Counter(path.parent for path in files).items() if n > 12} == {}
    assert {name: n for name, n in Counter(path.name for path in files).items() if n > 1} == {}


def test_private_names_of_torch_stand_in_one_module() -> None:
    holders = {name for name, path in modules().items() if private_names_of_torch(path)}
    assert holders == {"dtrp.tensors.torch_private"}


def test_no_function_is_longer_than_a_screen() -> None:
    assert [text for path in modules().values() for text in long_definitions(path, most=60)] == []


def test_a_root_module_stands_for_itself() -> None:
    assert [package_of(name) for name in ("dtrp", "dtrp.pipeline", "dtrp.stage.stash")] == ["dtrp", "pipeline", "stage"]


def test_tests_lie_in_a_folder_a_package_and_import_no_other() -> None:
    packages = {path.parent.name for path in modules().values()} | {"documents", "support"}
    folders = {path.parent.name for path in TESTS.rglob("test_*.py")} - {"tests"}
    assert folders <= packages
    importing = {
        path.name for path in TESTS.rglob("*.py") if re.search(r"(?m)^\s*(from|import) test_", path.read_text())
    }
    assert importing == set()
