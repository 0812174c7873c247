"""``import dtrp`` and ``--help`` do without torch; names come when they are used."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = ("dtrp", "dtrp.data", "dtrp.models", "dtrp.train")
WITHOUT_TORCH = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ImportError("torch is blocked")
sys.meta_path.insert(0, Block())
from dtrp.cli import cli, run
for command in ["", *cli.commands]:
    assert run([*command.split(), "--help"]) == 0, command
assert run(["methods"]) == 0
from dtrp.data import list_data
from dtrp.methods import list_methods
from dtrp.models import list_models
from dtrp.train import TrainConfig
print(list_data()[0], list_methods()[0], list_models()[0], TrainConfig().data)
"""


def test_help_and_names_need_no_torch() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "digits bp resnet20 digits"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_there_and_known_to_type_checkers(package: str) -> None:
    module = importlib.import_module(package)
    tree = ast.parse(Path(str(module.__file__)).read_text())
    checked = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    mirrored = {
        alias.name: "." * node.level + str(node.module)
        for node in ast.walk(checked)
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
    }
    lazy = next(node for node in tree.body if isinstance(node, ast.Assign) and "lazy_names" in ast.unparse(node.value))
    assert isinstance(lazy.value, ast.Call)
    assert mirrored == ast.literal_eval(lazy.value.args[1])
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        _ = module.nothing
