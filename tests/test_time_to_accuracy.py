"""`benchmarks/time_to_accuracy`: its runs train what a plain loop trains, and it simulates what `dtrp.simulate` does."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmark_programs import ROOT, benchmark
from torch.nn.functional import cross_entropy

import dtrp
from dtrp.data import batches, load_data
from dtrp.models import get_model
from dtrp.planning import LayerProfile, Profile
from dtrp.train import lr_factor

PROGRAM = ROOT / "benchmarks" / "time_to_accuracy" / "run.py"
TINY = {"data": "random", "image-size": 8, "model": "mlp", "limit-train": 64, "limit-test": 40, "batch": 16, "epochs": 2,
        "copies": 8, "warmup": 3, "dtype": "float64"}  # fmt: skip
SYNCHRONOUS = ("torch GPipe", "torch 1F1B", "torch InterleavedZeroBubble", "bp-zb")
CUTS = {"torch InterleavedZeroBubble": [2, 3, 4]}


@pytest.fixture(scope="module")
def run() -> Any:
    return benchmark("time_to_accuracy")


def plain_loop() -> tuple[list[float], list[float]]:
    """Losses and test accuracies of every update of the tiny setting."""
    data = load_data("random", image_size=8).limit(64, 40)
    torch.manual_seed(0)
    model = get_model("mlp", 3, data.num_classes, image_size=8).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor("cosine", 3, 8))
    losses, accuracies = [], []
    test = batches(
        data.test_x, data.test_y, 40, dataset=data, seed=0, epoch=0, augment=False, shuffle=False, dtype=torch.float64
    )
    ((test_x, test_y),) = test
    for epoch in range(2):
        of_epoch = batches(
            data.train_x, data.train_y, 16, dataset=data, seed=0, epoch=epoch, augment=data.augment, dtype=torch.float64
        )
        for x, y in of_epoch:
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
            accuracies.append((model(test_x).argmax(1) == test_y).double().mean().item())
    return losses, accuracies


def measured(out: Path, *words: str) -> list[dict[str, Any]]:
    setting = [word for name, value in TINY.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, PROGRAM, "real", "--seeds", "0", "--out", out, *setting, *words],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (out / "real.jsonl").read_text().splitlines()]


def with_cuts(out: Path, run: Any, links: tuple[str, ...]) -> None:
    """As if the contenders had been tuned: no time goes by in trials."""
    setting = run.parsed(["real", *(word for name, value in TINY.items() for word in (f"--{name}", str(value)))])
    recorded = {entry.name: getattr(setting, entry.name) for entry in dataclasses.fields(run.Setting)}
    rows = [
        {"link": link, "contender": name, "num_microbatches": 4 if name in SYNCHRONOUS else 1, "cuts": CUTS.get(name, [3]),
         "setting": recorded}
        for link in links for name in run.CONTENDERS
    ]  # fmt: skip
    (out / "tuned.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.full
def test_who_is_synchronous_has_the_losses_of_a_plain_loop_and_no_run_is_repeated(tmp_path: Path, run: Any) -> None:
    with_cuts(tmp_path, run, ("loopback",))
    rows = {row["contender"]: row for row in measured(tmp_path, "--links", "loopback")}
    losses, accuracies = plain_loop()
    assert list(rows) == list(run.CONTENDERS)
    for name in ("one worker", "DistributedDataParallel", *SYNCHRONOUS):
        assert rows[name]["train_loss"] == pytest.approx(losses, rel=1e-12), name
        assert rows[name]["test_accuracy"] == pytest.approx(accuracies), name
        assert rows[name]["delay"] == 0
    for name, row in rows.items():
        assert row["updates"] == [1, 2, 3, 4, 5, 6, 7, 8], name
        assert row["times_s"] == sorted(row["times_s"]), name
        assert row["ranks"] == (1 if name == "one worker" else 2), name
        assert row["train_loss"][0] == pytest.approx(losses[0], rel=1e-12), name  # before any delay
    for name in ("dtrp", "spectrain", "dtrp-1f1b"):
        assert rows[name]["delay"] == 1
        assert rows[name]["train_loss"] != pytest.approx(losses, rel=1e-6), name
    assert len(measured(tmp_path, "--links", "loopback")) == len(rows)


@pytest.mark.full
def test_tuning_and_a_slow_link(tmp_path: Path, run: Any) -> None:
    names = ("torch 1F1B", "dtrp")
    rows = measured(tmp_path, "--contenders", *names, "--microbatches", "1", "2", "--latency-ms", "5")
    links = ["loopback"] if run.tun.why_not() else ["loopback", "slow"]
    assert [(row["link"], row["contender"]) for row in rows] == [(link, name) for link in links for name in names]
    tuned = [json.loads(line) for line in (tmp_path / "tuned.jsonl").read_text().splitlines()]
    assert [list(row["tried_ms"]) for row in tuned] == [["2"], ["1", "2"]] * len(links)
    for row in rows[2:]:
        # 1F1B waits for a message there and back in each of the 8 updates; dtrp does not have to.
        assert row["latency_ms"] == 5
        assert row["contender"] == "dtrp" or row["total_s"] > 8 * 0.010


def test_the_parts_of_a_mini_batch_are_those_of_the_data(run: Any) -> None:
    data = dataclasses.replace(load_data("random", image_size=8).limit(40, 8), augment=True)
    setting = run.Setting(data="random", image_size=8, batch=16, epochs=2)
    halves = [run.training.shares(data, setting, 5, slice(8 * half, 8 * half + 8)) for half in (0, 1)]
    expected = [
        pair for epoch in (0, 1)
        for pair in list(batches(data.train_x, data.train_y, 16, dataset=data, seed=5, epoch=epoch, augment=True))[:2]
    ]  # fmt: skip
    found = list(zip(*halves, strict=True))
    assert len(found) == len(expected) == 4  # the 8 images that are left over in each epoch are left out
    for parts, (x, y) in zip(found, expected, strict=True):
        assert torch.equal(torch.cat([part[0] for part in parts]), x)
        assert torch.equal(torch.cat([part[1] for part in parts]), y)


def orders_of(method: str, num_stages: int, num_microbatches: int) -> dict[int, list[Any]]:
    """The actions of a mini-batch of a method that flushes, in torch's words."""
    kinds = {"F": "FORWARD", "B": "FULL_BACKWARD"}
    rows = dtrp.Schedule.build(method, num_stages, 1, num_microbatches).stages
    return {
        stage: [
            SimpleNamespace(stage_index=stage, microbatch_index=a.index, computation_type=SimpleNamespace(name=kinds[a.kind]))
            for a in row
            if a.kind != "U"
        ]
        for stage, row in enumerate(rows)
    }  # fmt: skip


@pytest.mark.parametrize(("method", "latency"), [("bp", 0.0), ("bp", 0.7), ("gpipe", 0.0), ("gpipe", 3.0)])
def test_orders_with_messages_take_the_time_that_simulate_says(run: Any, method: str, latency: float) -> None:
    forward, backward, update = [1.0, 1.5, 0.5], [2.0, 2.5, 1.75], [0.25, 0.5, 0.125]
    orders = run.simulated.orders
    stages = [orders.Stage(f, b / 2, b / 2, u, 3.0) for f, b, u in zip(forward, backward, update, strict=True)]
    took = orders.minibatch_s(orders_of(method, 3, 6), lambda index: index, stages, orders.Link(latency, 8.0))
    expected = dtrp.simulate(
        method, num_stages=3, num_minibatches=8, num_microbatches=6, forward_s=forward, backward_s=backward, update_s=update,
        latency_s=latency, message_bytes=3.0, bandwidth_bytes_s=8.0,
    ).minibatch_s  # fmt: skip
    assert took == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["InterleavedZeroBubble", "ZBVZeroBubble"])
def test_zero_bubbles_without_messages_take_the_time_of_their_orders(run: Any, name: str) -> None:
    orders = run.simulated.orders
    actions, host = orders.torch_orders(name, 4, 8)
    took = orders.minibatch_s(
        actions, host, [orders.Stage(0.5, 0.5, 0.5, 0.0, 1.0)] * 8, orders.Link(0.0, float("inf"))
    )
    import torch_schedules  # beside the benchmark that has been loaded

    seconds = {"FORWARD": 0.5, "BACKWARD_INPUT": 0.5, "BACKWARD_WEIGHT": 0.5, "FULL_BACKWARD": 1.0}
    assert took == pytest.approx(torch_schedules.minibatch_s(actions, seconds))
    assert took >= 8 * 2 * 1.5  # its work


def layers(samples: int, number: int = 16) -> Profile:
    """Layers that are alike, whose times go with the samples."""
    size = 1000 * samples
    layer = LayerProfile("layer", 1e-3 * samples, 1e-3 * samples, 2e-3 * samples, 0.0, 0, size, size, True, True,
                         4000, 4000, 0, 4000, True)  # fmt: skip
    return Profile(samples, (layer,) * number, 0.0, 0.0)


def test_curves_over_simulated_time(run: Any) -> None:
    curves = [
        {"method": method, "prediction": None if method == "bp" else "linear", "stages": 4, "num_microbatches": 4,
         "seed": seed, "batch_size": 16, "limit_train": 160, "test_accuracy": [0.5, 0.72, reached]}
        for method, reached in (("bp", 0.76), ("dtrp", 0.74), ("spectrain", 0.75)) for seed in (0, 1)
    ]  # fmt: skip
    rows = list(run.simulated.entries(curves, {samples: layers(samples) for samples in (16, 8, 4, 2)}, (0.7, 0.75)))
    assert {row["link"] for row in rows} == set(run.simulated.LINKS)
    by_link = {link: [row for row in rows if row["link"] == link] for link in run.simulated.LINKS}
    for found in by_link.values():
        baseline, pipeline, dtrp_row, spectrain = found
        assert (baseline["fastest"], pipeline["fastest_pipeline"]) == (True, True)
        assert baseline["minibatch_ms"] == min(ms for ms, _ in baseline["synchronous_ms"].values())
        assert (dtrp_row["contender"], spectrain["contender"]) == ("dtrp", "spectrain")
        assert dtrp_row["epochs_to"] == {"0.7": [2, 2], "0.75": [None, None]}
        assert baseline["epochs_to"]["0.75"] == spectrain["epochs_to"]["0.75"] == [3, 3]
        for row in found:
            expected = 3 * 10 * row["minibatch_ms"] / 1e3
            assert row["seconds_to"]["0.75"] == [
                None if n is None else pytest.approx(expected) for n in row["epochs_to"]["0.75"]
            ]
    # 4 layers a stage, 16 samples: spectrain's slot is the work of a stage, dtrp's a forward more; a fast link costs nothing.
    baseline, pipeline, dtrp_row, spectrain = by_link["5 us, 100 Gb/s"]
    assert spectrain["minibatch_ms"] == pytest.approx(4 * 16 * 3, rel=1e-3)
    assert dtrp_row["minibatch_ms"] == pytest.approx(4 * 16 * 4, rel=1e-3)
    # A network this small adds up its gradients in no time: data parallelism needs no more than its share of the work.
    assert baseline["contender"] == "DistributedDataParallel"
    assert baseline["minibatch_ms"] == pytest.approx(16 * 16 * 3 / 4, rel=1e-3)
    # Of the pipelines a zero bubble with two stages a worker is the fastest; it still waits to fill and to drain.
    assert pipeline["contender"] in ("torch InterleavedZeroBubble", "torch ZBVZeroBubble")
    assert spectrain["minibatch_ms"] < pipeline["minibatch_ms"] < pipeline["synchronous_ms"]["bp-zb"][0]


def test_profiles_are_measured_once_and_read_back(run: Any, tmp_path: Path) -> None:
    setting = run.Setting(data="random", image_size=8, model="mlp", batch=4)
    for _ in range(2):
        run.simulated.profile(setting, tmp_path / "profile.jsonl", repeats=2)
    found = run.simulated.profiles(tmp_path / "profile.jsonl", "mlp", 4)
    assert sorted(found) == [2, 4]
    assert len((tmp_path / "profile.jsonl").read_text().splitlines()) == 2
    assert found[4].layers[1].output_bytes == 4 * 256 * 4
    assert isinstance(found[4], Profile)
