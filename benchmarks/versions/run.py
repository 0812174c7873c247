"""A fixed selection of the tests on the torch of the present interpreter.

    PYTHONPATH=. PYTHON benchmarks/versions/run.py            # or with the tests to run instead of the selection

A line is appended to ``results/versions.jsonl``: the versions, how many tests passed, failed and were skipped, and the names
of those that failed, each with its error.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

import torch

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SELECTION = ("tests/splitting", "tests/pipelining", "tests/engine/test_loss_weights.py")
# Warnings are errors in the tests; this one is about what older versions of torch do themselves when they save.
IGNORED = ("ignore:TypedStorage is deprecated:UserWarning",)


def run(selection: list[str]) -> dict[str, object]:
    """Run the tests in a process of their own, and count."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-q", "-p", "no:cacheprovider", "--show-capture=no", "--tb=line", f"--junitxml={report}"]
        ignored = [option for rule in IGNORED for option in ("-W", rule)]
        started = time.time()
        subprocess.run([sys.executable, "-m", "pytest", *options, *ignored, *selection], cwd=ROOT, check=False)
        cases = list(ElementTree.parse(report).iter("testcase"))
    failed = {}
    for case in cases:
        problem = next((case.find(kind) for kind in ("failure", "error") if case.find(kind) is not None), None)
        if problem is not None:
            failed[f"{case.get('classname', '')}::{case.get('name', '')}"] = (problem.get("message") or "").split("\n")[
                0
            ][:200]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "tests": selection,
        "passed": len(cases) - len(failed) - skipped,
        "failed": len(failed),
        "skipped": skipped,
        "failures": failed,
        "elapsed_s": round(time.time() - started, 1),
    }


if __name__ == "__main__":
    row = run(sys.argv[1:] or list(SELECTION))
    path = HERE / "results" / "versions.jsonl"
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row, indent=2))
