"""The second part: stored curves of accuracy over simulated mini-batches, for links that no machine here has.

The layers' times are measured on one core (`profile`), for every size of micro-batch. From them come the time of a
mini-batch by each decoupled method, with the leads that the curves were trained with, and by every synchronous
schedule, each at its own best number of micro-batches: the fastest of them is the baseline, and its curve is bp's.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import orders
import torch
from orders import Link, Stage
from torch.nn.functional import cross_entropy
from training import Setting
from turns import environment

import dtrp
from dtrp.methods import Method
from dtrp.planning import LayerProfile, Profile, Profiler, balance

# Seconds one way, and bytes a second.
LINKS = {
    "5 us, 100 Gb/s": Link(5e-6, 100e9 / 8),
    "50 us, 25 Gb/s": Link(50e-6, 25e9 / 8),
    "10 ms, 1 Gb/s": Link(10e-3, 1e9 / 8),
}
LEVELS = (0.70, 0.75)
LEAST_SAMPLES = 2  # of a micro-batch: batch norm needs two
SYNCHRONOUS = ("gpipe", "bp", "bp-zb")  # 1F1B is bp
ZERO_BUBBLES = ("InterleavedZeroBubble", "ZBVZeroBubble")
WHOLE = {"DistributedDataParallel", "one worker"}  # who has the whole network in every worker
PREDICTION = "linear"  # that of the curves
NOT_PROFILED = ("dgl",)  # its auxiliary networks are not in the profile
WEIGHT_SHARE = 0.5  # of a backward: what can wait


def profile(setting: Setting, path: Path, repeats: int = 15) -> None:
    """Measure the layers at every size of micro-batch, and add a line for each that has none."""
    known = [(row["model"], row["batch"], row["samples"]) for row in read(path)]
    data = setting.load()
    model = setting.new_model(data, 0)
    size = data.sample_shape
    example = torch.randn(setting.batch, *size), torch.randint(data.num_classes, (setting.batch,))
    torch.set_num_threads(1)

    def sgd(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, setting.lr, setting.momentum, weight_decay=setting.weight_decay)

    profiler = Profiler(model, example, cross_entropy, optimizer=sgd, predict="linear", repeats=repeats)
    for samples in sizes(setting.batch):
        if (setting.model, setting.batch, samples) in known:
            continue
        load = os.getloadavg()[0]
        found = profiler.at(samples)
        row = {
            "model": setting.model,
            "batch": setting.batch,
            "samples": samples,
            "layers": [dataclasses.asdict(layer) for layer in found.layers],
            **{name: getattr(found, name) for name in ("update_s", "predict_s", "spread")},
            "at": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "load_before": load,
            **environment(),
        }
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def sizes(batch: int) -> list[int]:
    """Of micro-batches: the whole mini-batch, a half, a quarter, ..."""
    return [batch >> n for n in range(batch.bit_length()) if batch >> n >= LEAST_SAMPLES and batch % (1 << n) == 0]


def profiles(path: Path, model: str, batch: int) -> dict[int, Profile]:
    """By the samples of a micro-batch."""
    return {
        row["samples"]: Profile(
            row["samples"], tuple(LayerProfile(**layer) for layer in row["layers"]), row["update_s"], row["predict_s"]
        )
        for row in read(path)
        if (row["model"], row["batch"]) == (model, batch)
    }


def bounds(profile: Profile, num_stages: int, method: Method | None = None) -> list[tuple[int, int]]:
    """First layer and one past the last of each stage, the slowest as fast as can be; who recomputes has two forwards."""
    again = [layer.forward_s + layer.backward_s for layer in profile.layers]
    last = None
    if method is not None and method.recomputes(num_stages, 0):
        last = again if not method.recomputes(num_stages, num_stages - 1) else None
        again = [both + layer.nograd_forward_s for both, layer in zip(again, profile.layers, strict=True)]
    cuts = balance(again, num_stages, last_costs=last)
    return list(itertools.pairwise([0, *cuts, len(profile.layers)]))


def slot_s(method: Method | str, profile: Profile, num_stages: int, num_microbatches: int, link: Link,
           cuts: Sequence[int] | None = None) -> float:  # fmt: skip
    """Seconds of a mini-batch by a method with a stage a worker."""
    row = dtrp.get_method(method) if isinstance(method, str) else method
    ends = [0, *cuts, len(profile.layers)] if cuts is not None else None
    parts = bounds(profile, num_stages, row) if ends is None else list(itertools.pairwise(ends))
    stages = [profile.stage(*part) for part in parts]
    return dtrp.simulate(
        row, num_stages=num_stages, num_minibatches=20 + 8 * num_stages, num_microbatches=num_microbatches,
        forward_s=[stage.forward_s for stage in stages], backward_s=[stage.backward_s for stage in stages],
        nograd_forward_s=[stage.nograd_forward_s for stage in stages], update_s=[stage.update_s for stage in stages],
        predict_s=[stage.predict_s for stage in stages], latency_s=link.latency_s, bandwidth_bytes_s=link.bandwidth_bytes_s,
        message_bytes=[stage.sizes.output for stage in stages[:-1]], weight_share=WEIGHT_SHARE,
    ).minibatch_s  # fmt: skip


def zero_bubble_s(name: str, profile: Profile, num_ranks: int, num_microbatches: int, link: Link) -> float:
    """Seconds of a mini-batch by a schedule of torch's with two stages a rank."""
    stages = []
    for part in bounds(profile, 2 * num_ranks):
        stage = profile.stage(*part)
        weight_s = WEIGHT_SHARE * stage.backward_s
        stages.append(Stage(stage.forward_s, stage.backward_s - weight_s, weight_s, stage.update_s, stage.sizes.output))
    order, host = orders.torch_orders(name, num_ranks, num_microbatches)
    return orders.minibatch_s(order, host, stages, link)


def data_parallel_s(profile: Profile, num_ranks: int, link: Link) -> float:
    """Seconds of a mini-batch where each worker has the whole network and a part of the samples.

    A ring adds up the gradients: 2 (K - 1) messages one after the other, of 1/K of the weights each. It is taken to cost
    nothing while the backward runs, but for the latencies and the part of the bytes that takes longer than the backward.
    """
    whole = profile.whole
    rounds = 2 * (num_ranks - 1)
    wire_s = rounds / num_ranks * whole.sizes.trained / link.bandwidth_bytes_s
    return whole.forward_s + max(whole.backward_s, wire_s) + rounds * link.latency_s + whole.update_s


def synchronous(known: dict[int, Profile], batch: int, num_stages: int, link: Link) -> dict[str, tuple[float, int]]:
    """By schedule, its time at its best number of micro-batches, and that number."""
    found: dict[str, tuple[float, int]] = {}

    def offer(name: str, seconds: float, num_microbatches: int) -> None:
        found[name] = min(found.get(name, (math.inf, 0)), (seconds, num_microbatches))

    for samples, measured in known.items():
        a = batch // samples
        for method in SYNCHRONOUS:
            offer(method, slot_s(method, measured, num_stages, a, link), a)
        for name in ZERO_BUBBLES if a % num_stages == 0 and 2 * num_stages <= len(measured.layers) else ():
            if name == "InterleavedZeroBubble" or a >= 2 * num_stages:
                offer(f"torch {name}", zero_bubble_s(name, measured, num_stages, a, link), a)
    if batch % num_stages == 0 and batch // num_stages in known:
        offer("DistributedDataParallel", data_parallel_s(known[batch // num_stages], num_stages, link), 1)
    offer("one worker", data_parallel_s(known[batch], 1, link), 1)
    return found


def reached(accuracies: Sequence[float], level: float) -> int | None:
    """The number of epochs after which a level was first reached."""
    return next((epoch for epoch, accuracy in enumerate(accuracies, 1) if accuracy >= level), None)


def entries(
    curves: Sequence[dict[str, Any]], known: dict[int, Profile], levels: Sequence[float]
) -> Iterator[dict[str, Any]]:
    """A row for each method that has curves, behind those of the fastest synchronous ones, at each K, A and link."""
    curves = [row for row in curves if row["prediction"] in (None, PREDICTION) and row["method"] not in NOT_PROFILED]
    cells = sorted({(row["stages"], row["num_microbatches"]) for row in curves if row["method"] != "bp"})
    for (num_stages, a), (name, link) in itertools.product(cells, LINKS.items()):
        batch = curves[0]["batch_size"]
        updates = math.ceil((curves[0]["limit_train"] or 50000) / batch)
        schedules = synchronous(known, batch, num_stages, link)
        fastest = [
            min(names, key=lambda schedule: schedules[schedule]) for names in (schedules, set(schedules) - WHOLE)
        ]
        times = {schedule: schedules[schedule] for schedule in fastest}
        runs = {
            schedule: [row for row in curves if (row["method"], row["num_microbatches"]) == ("bp", a)]
            for schedule in times
        }
        for row in curves:
            if row["method"] != "bp" and (row["stages"], row["num_microbatches"]) == (num_stages, a):
                runs.setdefault(row["method"], []).append(row)
        for method in runs.keys() - times.keys():
            times[method] = slot_s(method, known[batch // a], num_stages, a, link), a
        for method, found in runs.items():
            seconds, microbatches = times[method]
            epochs = {str(level): [reached(row["test_accuracy"], level) for row in found] for level in levels}
            yield {
                "link": name,
                "stages": num_stages,
                "curves_num_microbatches": a,
                "contender": method,
                "fastest": method == fastest[0],
                "fastest_pipeline": method == fastest[1],
                "num_microbatches": microbatches,
                "minibatch_ms": 1e3 * seconds,
                "updates_an_epoch": updates,
                "seeds": [row["seed"] for row in found],
                "epochs_to": epochs,
                "seconds_to": {
                    level: [None if n is None else n * updates * seconds for n in counts]
                    for level, counts in epochs.items()
                },
                "final_accuracy": [row["test_accuracy"][-1] for row in found],
                "synchronous_ms": {schedule: [1e3 * s, count] for schedule, (s, count) in schedules.items()},
            }


def against_ranks(rows: Sequence[dict[str, Any]], known: dict[int, Profile]) -> Iterator[dict[str, Any]]:
    """What is simulated beside what the runs of the real part took, with their cuts and micro-batches, on the plain link."""
    for row in rows:
        a, setting = row["num_microbatches"], row["setting"]
        if (
            row["contender"] not in dtrp.list_methods()
            or row["link"] != "loopback"
            or setting["batch"] // a not in known
        ):
            continue
        measured = known[setting["batch"] // a]
        simulated = slot_s(row["contender"], measured, row["ranks"], a, Link(50e-6, 2e9), row["cuts"])
        took = (row["times_s"][-1] - row["times_s"][0]) / (row["updates"][-1] - row["updates"][0])
        yield {
            **{name: row[name] for name in ("contender", "num_microbatches", "cuts", "seed")},
            "simulated_ms": 1e3 * simulated, "real_ms": 1e3 * took,
        }  # fmt: skip


def write(folder: Path, curves: Path, levels: Sequence[float] = LEVELS) -> None:
    """Write the rows of this part anew, from the raw files that are there."""
    stored = read(curves)
    if not stored:
        print(f"no curves: {curves} is not there yet (benchmarks/accuracy/run.py length)")
        return
    known = profiles(folder / "profile.jsonl", stored[0]["model"], stored[0]["batch_size"])
    if not known:
        print(f"no times of layers: run.py profile --model {stored[0]['model']} --batch {stored[0]['batch_size']}")
        return
    found = list(entries(stored, known, levels))
    (folder / "simulated.jsonl").write_text("".join(json.dumps({"curves": curves.name, **row}) + "\n" for row in found))
    errors = list(against_ranks(read(folder / "real.jsonl"), known))
    (folder / "against_ranks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in errors))
    for row in found:
        seconds = {
            level: [None if s is None else round(s) for s in values] for level, values in row["seconds_to"].items()
        }
        print(f"K={row['stages']} A={row['curves_num_microbatches']} {row['link']}: {row['contender']} "
              f"{row['minibatch_ms']:.1f} ms, {seconds}")  # fmt: skip
