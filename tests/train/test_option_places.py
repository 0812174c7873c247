"""An option of ``dtrp train`` has each of the places that CONTRIBUTING.md lists."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path
from typing import get_args, get_type_hints

from dtrp.cli import cli
from dtrp.train.build import make_method
from dtrp.train.config import TrainConfig, option_name
from dtrp.train.config_checks import check_settings

ROOT = Path(__file__).parents[2]
ACTING = (
    "train/build.py",
    "train/trainer.py",
    "train/from_plan.py",
    "train/run_folder.py",
    "train/config.py",
    "cli/running.py",
)


def is_number(config: type[TrainConfig], field: str) -> bool:
    hint = get_type_hints(config)[field]
    return bool({int, float} & set(get_args(hint) or (hint,)))


def is_checked(config: TrainConfig, field: str) -> bool:
    """Whether -1 is refused, by name, before anything is made."""
    try:
        check_settings(config)
        make_method(config)
    except ValueError as error:
        return option_name(field) in str(error) or f"{field}=" in str(error)
    return False


def acting_fields() -> set[str]:
    """The settings that something reads: ``config.field``, ``self.field`` in a property, or a name in a table of settings."""
    fields = set()
    for path in ACTING:
        for node in ast.walk(ast.parse((ROOT / "dtrp" / path).read_text())):
            owner = ast.unparse(node.value) if isinstance(node, ast.Attribute) else ""
            if isinstance(node, ast.Attribute) and (
                owner in ("config", "self.config", "settings") or (owner == "self" and path == "train/config.py")
            ):
                fields.add(node.attr)
            if isinstance(node, ast.Tuple) and path in ("train/build.py", "train/trainer.py"):
                fields |= {str(item.value) for item in node.elts if isinstance(item, ast.Constant)}
    return fields


def missing_places(config: type[TrainConfig]) -> list[str]:
    options = {param.name for param in cli.commands["train"].params}
    acting = acting_fields()
    missing = []
    for field in (field.name for field in dataclasses.fields(config)):
        if field not in options:
            missing.append(f"{field}: its help in dtrp/cli/options.py")
        if is_number(config, field) and not is_checked(config(**{field: -1}), field):
            missing.append(f"{field}: its range in dtrp/train/config_checks.py")
        if field not in acting:
            missing.append(f"{field}: what it does, in dtrp/train/build.py or dtrp/train/trainer.py")
    return missing


def test_every_option_has_all_its_places() -> None:
    assert missing_places(TrainConfig) == []


def test_an_option_without_its_places_is_found() -> None:
    @dataclasses.dataclass(frozen=True)
    class Longer(TrainConfig):
        label_smoothing: float = 0.0

    assert missing_places(Longer) == [
        "label_smoothing: its help in dtrp/cli/options.py",
        "label_smoothing: its range in dtrp/train/config_checks.py",
        "label_smoothing: what it does, in dtrp/train/build.py or dtrp/train/trainer.py",
    ]


def test_the_places_are_listed() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    found = re.search(r"\*\*A new option of `dtrp train`\*\*.*?\n\n(.*?)\n\n", text, re.S)
    assert found is not None
    files = set(re.findall(r"`(dtrp/[\w/]+\.py)`", found[1]))
    assert {
        "dtrp/train/config.py",
        "dtrp/cli/options.py",
        "dtrp/train/config_checks.py",
        "dtrp/train/build.py",
    } <= files
    assert len(found[1].splitlines()) <= 4, "four places"
    assert all((ROOT / path).is_file() for path in files)
