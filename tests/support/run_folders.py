"""Folders of runs, written and not trained, and what stands in a report of them."""

from __future__ import annotations

import html.parser
import json
import re
from pathlib import Path
from typing import Any

import torch
import yaml

TIMES = ("samples_per_s", "elapsed_s")


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a run, without its times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def check_same(folder: Path, whole: Path) -> None:
    """A finished run has the weights and the metrics of another one, to the bit."""
    a, b = (torch.load(each / "model.pt") for each in (folder, whole))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert metrics(folder) == metrics(whole)
    assert (folder / "summary.json").is_file()


def stage(k: int, delays: dict[str, int], errors: list[list[float]]) -> dict[str, Any]:
    memory = {
        "weights": 1000 * (k + 1),
        "predicted": 0,
        "optimizer": 2000,
        "gradients": 0,
        "gradients_peak": 700,
        "stash": 0,
        "stash_peak": 10,
    }
    busy = {"elapsed": 10.0, "busy": 4.0 + k, "wait_forward": 1.0, "outside": 5.0 - k}
    return {"stage": k, "parameters": 10, "memory": memory, "activations_peak": 500, "keep": "graph", "busy": busy,
            "layers": ["a"], "delays": delays, "prediction_errors": errors}  # fmt: skip


def write_run(folder: Path, method: str = "dtrp", seed: int = 0, *, accuracy: float = 0.5, finished: bool = True,
              epochs: int = 3, **config: Any) -> None:  # fmt: skip
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
        for e in range(1, epochs + 1)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        errors = [[4.0, 1, 0.5, 1.0], [8.0, 1, 0.3, 1.0]] if method.startswith("dtrp") else []
        stages = settings["stages"] if isinstance(settings["stages"], int) else 2
        summary = {
            "config": settings, "epochs": 3, "updates": 12, "test_accuracy": lines[-1]["test_accuracy"], "test_loss": 0.7,
            "minibatch_s": 0.02 + 0.01 * seed, "environment": {"torch": "x"},
            "stages": [stage(0, {"0": 1, "1": 9}, errors), *(stage(k, {"0": 10}, []) for k in range(1, stages))],
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
