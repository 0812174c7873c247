"""dtrp next to backpropagation on CIFAR-10, by the command line as a user would type it.

python benchmarks/real_data/run.py --data-dir FOLDER        # FOLDER holds cifar-10-batches-py; about 20 minutes

dtrp train --data cifar10 --model resnet20 --method {bp,dtrp} --stages 4 --num-microbatches 4 --epochs 1 --seed S
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import dtrp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cifar10.jsonl")
    options = parser.parse_args()
    for seed in options.seeds:
        for method in ("bp", "dtrp"):
            with tempfile.TemporaryDirectory() as folder:
                arguments = ["train", "--data", "cifar10", "--data-dir", options.data_dir, "--model", "resnet20",
                             "--method", method, "--stages", "4", "--num-microbatches", "4", "--epochs", "1",
                             "--seed", str(seed), "--threads", str(options.threads), "--out", f"{folder}/run"]  # fmt: skip
                subprocess.run([sys.executable, "-m", "dtrp", *arguments], check=True)
                record = json.loads(Path(folder, "run", "metrics.jsonl").read_text())
            record |= {
                "method": method,
                "seed": seed,
                "arguments": [a for a in arguments if not a.startswith(("/", "."))],
                "torch": torch.__version__,
                "python": platform.python_version(),
                "dtrp": dtrp.__version__,
            }
            options.out.parent.mkdir(parents=True, exist_ok=True)
            with open(options.out, "a") as file:
                file.write(json.dumps(record) + "\n")
            print(method, seed, record["test_accuracy"])


if __name__ == "__main__":
    main()
