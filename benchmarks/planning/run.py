"""Plans and simulations held against runs.

    python benchmarks/planning/run.py simulator   # sleeping stages: the simulator beside the distributed engine
    python benchmarks/planning/run.py cuts        # planned cuts beside cuts of equal layers, predicted and measured
    python benchmarks/planning/run.py keep        # kept graphs beside recomputation, and their memory
    python benchmarks/planning/run.py batch       # batch compensation: throughput against the mini-batch
    python benchmarks/planning/run.py accuracy --data-dir DIR    # what compensation does to the accuracy on CIFAR-10
    python benchmarks/planning/run.py figures     # of batch compensation, from the lines that are there

Each part but the last prints a table and appends raw results to results/<part>.jsonl.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "throughput"))  # how contenders take turns

import measure  # noqa: E402
import torch  # noqa: E402
from ranks import launch  # noqa: E402
from turns import check, environment, table  # noqa: E402

import dtrp  # noqa: E402
from dtrp.models import get_model  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True, metavar="PART")
    for name, rounds in (("simulator", 2), ("cuts", 5), ("keep", 5), ("batch", 3), ("accuracy", 0)):
        part = parts.add_parser(name, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        part.add_argument("--out", type=Path, default=HERE / "results" / f"{name}.jsonl")
        if rounds:
            part.add_argument("--rounds", type=int, default=rounds, help="turns of every configuration")
        if name == "simulator":
            part.add_argument("--stages", type=int, nargs="+", default=[2, 4, 8])
        if name == "cuts":
            part.add_argument("--models", nargs="+", default=["resnet18", "resnet56", "vgg16"])
            part.add_argument("--methods", nargs="+", default=["dtrp"])
            part.add_argument("--batch", type=int, default=32)
        if name in ("keep", "batch"):
            part.add_argument("--model", default="resnet20")
            part.add_argument("--workers", type=int, default=4 if name == "batch" else 2, help="K")
        if name == "batch":
            part.add_argument("--base", type=int, default=16, help="mini-batch to start from")
            part.add_argument("--microbatches", type=int, help="of the compensated plan, A; else the plan finds it")
            part.add_argument("--device", help="of all stages, as cuda; else the CPU")
            part.add_argument("--least", type=float, default=1.2, help="times the base's samples/s that are aimed at")
        if name == "accuracy":
            part.add_argument("--data-dir", required=True, help="where cifar-10-batches-py lies")
            part.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
            part.add_argument("--limit-train", type=int, default=20_000)
            part.add_argument("--epochs", type=int, default=5)
            part.add_argument("--lr", type=float, default=0.01, help="of the base mini-batch of 16")
    parts.add_parser("figures")
    options = parser.parse_args()
    if options.part == "figures":
        figures()
        return
    if os.getloadavg()[0] > 0.5:
        print(f"the machine is busy (load {os.getloadavg()[0]:.1f}): times are not to be relied on")
    torch.set_num_threads(1)
    {"simulator": simulator, "cuts": cuts, "keep": keep, "batch": batch, "accuracy": accuracy}[options.part](options)


def write(options: argparse.Namespace, records: list[dict[str, Any]]) -> None:
    options.out.parent.mkdir(parents=True, exist_ok=True)
    shared = {"part": options.part, "run": time.strftime("%Y-%m-%dT%H:%M:%S"), **environment()}
    with open(options.out, "a") as file:
        for record in records:
            file.write(json.dumps({**shared, **record}) + "\n")


def measured(world_size: int, jobs: list[measure.Job], rounds: int) -> list[measure.Outcome]:
    """Take the jobs in turns on as many ranks; what came of each."""
    with tempfile.TemporaryDirectory(prefix="dtrp-") as folder:
        file = Path(folder) / "outcomes.json"
        launch(measure.run, world_size, jobs, rounds, file)
        return [measure.Outcome(**outcome) for outcome in json.loads(file.read_text())]


def simulator(options: argparse.Namespace) -> None:
    rows, lines, records = [], [], []
    for num_stages in options.stages:
        jobs = measure.sleeping_jobs(num_stages)
        for job, outcome in zip(jobs, measured(num_stages, jobs, options.rounds), strict=True):
            simulation = dtrp.simulate(
                job.method,
                num_stages=num_stages,
                num_minibatches=12 * num_stages + 20,
                num_microbatches=job.num_microbatches,
                forward_s=job.forward_s,
                backward_s=job.backward_s,
                latency_s=job.latency_s,
            )
            off = outcome.median_s / simulation.minibatch_s - 1
            rows.append(
                [f"{job.method} {job.label}", str(num_stages), str(job.num_microbatches), f"{1e3 * job.latency_s:.0f}",
                 f"{1e3 * simulation.minibatch_s:.1f}", f"{1e3 * outcome.median_s:.1f}", f"{off:+.1%}"]
            )  # fmt: skip
            lines.append(
                check(
                    f"K={num_stages} {job.method} {job.label}, {job.latency_s * 1e3:.0f} ms: off by",
                    abs(off),
                    most=0.05,
                )
            )
            records.append(
                {"stages": num_stages, "method": job.method, "stage_times": job.label, "num_microbatches": job.num_microbatches,
                 "forward_ms": [1e3 * s for s in job.forward_s], "backward_ms": [1e3 * s for s in job.backward_s],
                 "latency_ms": 1e3 * job.latency_s, "simulated_ms": 1e3 * simulation.minibatch_s,
                 "rounds_ms": [1e3 * s for s in outcome.rounds_s], "off": off}
            )  # fmt: skip
    print(table(["method, stages", "K", "A", "hop ms", "simulated ms", "measured ms", "off"], rows))
    print("\n".join(lines))
    write(options, records)


def cuts(options: argparse.Namespace) -> None:
    rows, lines, records = [], [], []
    for model in options.models:
        for method in options.methods:
            plan = measure.planned(model, options.batch, method=method)
            even = plan.alternatives[-1]
            jobs = [
                measure.model_job(model, plan, cuts, options.batch) for cuts in (tuple(plan.cuts), tuple(even.cuts))
            ]
            planned, equal = measured(2, jobs, options.rounds)
            predicted_gain = even.minibatch_s / plan.minibatch_s
            gain = equal.median_s / planned.median_s
            off = plan.minibatch_s / planned.median_s - 1
            rows.append(
                [f"{model} {method}", str(list(plan.cuts)), str(list(even.cuts)), f"{1e3 * plan.minibatch_s:.0f}",
                 f"{1e3 * planned.median_s:.0f}", f"{off:+.1%}", f"{predicted_gain:.2f}", f"{gain:.2f}"]
            )  # fmt: skip
            lines.append(check(f"{model} {method}: predicted time off by", abs(off), most=0.10))
            least = 1.1 if predicted_gain >= 1.15 else 0.97
            lines.append(check(f"{model} {method}: planned cuts, times equal cuts' speed", gain, least=least))
            records.append(
                {"model": model, "method": method, "batch": options.batch, "cuts": plan.cuts, "equal_cuts": even.cuts,
                 "order": plan.options, "keep": plan.keep,
                 "predicted_ms": 1e3 * plan.minibatch_s, "predicted_equal_ms": 1e3 * even.minibatch_s,
                 "slots_ms": [1e3 * stage.slot_s for stage in plan.stages], "one_worker_predicted_ms": 1e3 * plan.one_worker_s,
                 "rounds_ms": [1e3 * s for s in planned.rounds_s], "equal_rounds_ms": [1e3 * s for s in equal.rounds_s],
                 "busy": planned.busy}
            )  # fmt: skip
    header = ["model", "planned", "equal", "predicted ms", "measured ms", "off", "predicted gain", "gain"]
    print(table(header, rows))
    print("\n".join(lines))
    write(options, records)


def keep(options: argparse.Namespace) -> None:
    """A generous limit, a tight one, and recomputation, beside fdg and spectrain; the same cuts."""
    batch = 64
    plan = measure.planned(options.model, batch, method="spectrain", workers=options.workers)
    cuts = tuple(plan.cuts)
    jobs = [
        measure.model_job(options.model, plan, cuts, batch, method=method, keep=keep, limit=limit, label=label)
        for label, method, keep, limit in (
            ("fdg", "fdg", None, None),
            ("spectrain", "spectrain", None, None),
            ("dtrp, recomputing", "dtrp", "input", None),
            ("dtrp, generous limit", "dtrp", "auto", 10**10),
            ("dtrp, 100 MB", "dtrp", "auto", 10**8),
        )
    ]
    outcomes = measured(options.workers, jobs, options.rounds)
    rows = [
        [
            job.label,
            f"{1e3 * outcome.median_s:.0f}",
            *(f"{size / 1e6:.1f}" for size in outcome.memory),
            ",".join(outcome.keeps),
        ]
        for job, outcome in zip(jobs, outcomes, strict=True)
    ]
    print(table(["method", "ms", *(f"MB, {k}" for k in range(options.workers)), "keeps"], rows))
    fastest = min(outcomes[0].median_s, outcomes[1].median_s)
    print(check("generous limit, time over the method that keeps its graph", outcomes[3].median_s / fastest, most=1.05))
    print(check("largest stage under 100 MB, MB", max(outcomes[4].memory) / 1e6, most=100))
    write(
        options,
        [
            {"model": options.model, "batch": batch, "cuts": cuts, "method": job.method, "label": job.label,
             "limit_bytes": job.limit, "rounds_ms": [1e3 * s for s in outcome.rounds_s], "memory": outcome.memory,
             "keeps": outcome.keeps}
            for job, outcome in zip(jobs, outcomes, strict=True)
        ],
    )  # fmt: skip


def batch(options: argparse.Namespace) -> None:
    """The plan of the base mini-batch, larger ones with its cuts, and the compensated plan: what recomputation frees of fdg's
    memory goes into a larger mini-batch and into graphs that are kept."""
    model, size, workers, device = options.model, options.base, options.workers, options.device
    planned = functools.partial(measure.planned, model, size, workers=workers, device=device)
    job = functools.partial(measure.model_job, model, device=device)
    base = planned(method="dtrp")
    base.save(options.out.with_name("base.json"))
    plan = planned(method="dtrp", compensate=True, num_microbatches=options.microbatches)
    plan.save(options.out.with_name("compensated.json"))
    jobs = [job(base, tuple(base.cuts), size * n, label=f"dtrp {size * n}") for n in (1, 2, 4)]
    jobs.append(job(plan, tuple(plan.cuts), plan.batch_size, label=f"compensated {plan.batch_size}"))
    fdg = planned(method="fdg", choose_lead=False)
    jobs.append(job(fdg, tuple(fdg.cuts), size, method="fdg", label=f"fdg {size}"))
    outcomes = measured(workers, jobs, options.rounds)
    rates = [job.batch / outcome.median_s for job, outcome in zip(jobs, outcomes, strict=True)]
    rows = [
        [job.label, str(job.num_microbatches), ",".join(outcome.keeps), f"{rate:.0f}",
         *(f"{size / 1e6:.1f}" for size in outcome.memory), *(f"{share:.0%}" for share in outcome.busy)]
        for job, outcome, rate in zip(jobs, outcomes, rates, strict=True)
    ]  # fmt: skip
    headings = [*(f"MB, {k}" for k in range(workers)), *(f"busy {k}" for k in range(workers))]
    print(table(["mini-batch", "A", "keeps", "samples/s", *headings], rows))
    print(check("samples/s over the base's", rates[-2] / rates[0], least=options.least))
    limit = max(outcomes[-1].memory) / 1e6
    most = max(outcomes[-2].memory) / 1e6
    print(check("largest stage, MB; fdg's at the base mini-batch", most, most=round(limit, 2)))
    write(
        options,
        [
            {"model": model, "workers": workers, "device": device or "cpu", "label": job.label, "batch": job.batch,
             "cuts": job.cuts, "num_microbatches": job.num_microbatches, "keeps": outcome.keeps, "options": job.options,
             "samples_per_s": rate, "memory": outcome.memory, "busy": outcome.busy,
             "rounds_ms": [1e3 * s for s in outcome.rounds_s]}
            for job, outcome, rate in zip(jobs, outcomes, rates, strict=True)
        ],
    )  # fmt: skip


def accuracy(options: argparse.Namespace) -> None:
    """``dtrp train`` by the two plans that ``batch`` has written."""
    described = dtrp.planning.plan_file.describe_model(get_model("resnet20"))
    done = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    for seed in options.seeds:
        for label in ("base", "compensated"):
            path = HERE / "results" / f"{label}.json"
            plan = dtrp.Plan.load(path)
            assert plan.model["fingerprint"] == described["fingerprint"], "run the part 'batch' first"
            run = {"label": label, "seed": seed, "plan": json.loads(path.read_text()), "lr": options.lr,
                   "limit_train": options.limit_train, "epochs": options.epochs}  # fmt: skip
            if any(run.items() <= row.items() for row in done):
                continue
            command = [
                sys.executable, "-m", "dtrp", "train", "--data", "cifar10", "--data-dir", options.data_dir, "--model", "resnet20",
                "--lr", str(options.lr), "--epochs", str(options.epochs), "--limit-train", str(options.limit_train),
                "--threads", "1", "--seed", str(seed), "--plan", str(path),
            ]  # fmt: skip
            with tempfile.TemporaryDirectory(prefix="dtrp-") as folder:
                out = Path(folder) / "run"
                subprocess.run([*command, "--out", str(out)], check=True)
                metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            record = {**run, "test_accuracy": [m["test_accuracy"] for m in metrics]}
            done.append(record)
            write(options, [record])
    for label in ("base", "compensated"):
        values = [row["test_accuracy"][-1] for row in done if row["label"] == label]
        print(f"{label}: {', '.join(f'{value:.2%}' for value in values)}, mean {sum(values) / len(values):.2%}")


def figures() -> None:
    """Throughput against the mini-batch, and what each worker does of the time before and after compensation."""
    from dtrp.report.figures import Plot, on_white, svg
    from dtrp.report.plots import add_point

    rows = [json.loads(line) for line in (HERE / "results" / "batch.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["run"] == rows[-1]["run"]]
    rates: dict[str, Any] = {}
    shares: dict[str, Any] = {}
    for row in rows:
        kind = row["label"].rsplit(" ", 1)[0]
        add_point(rates, kind, row["batch"], [1e3 * row["batch"] / ms for ms in row["rounds_ms"]])
        if kind == "compensated" or row["batch"] == rows[0]["batch"]:
            places = [f"worker {k}" for k in range(row["workers"])]
            shares[row["label"]] = {"x": places, "y": [100 * share for share in row["busy"]]}
    title = f"{rows[0]['model']}, K={rows[0]['workers']}"
    for plot in (
        Plot("batch-throughput", title, "mini-batch (samples)", "samples/s", rates, "points"),
        Plot("batch-utilization", title, "", "share of the time at work (%)", shares, "bars"),
    ):
        (HERE / "results" / f"{plot.name}.svg").write_text(on_white(svg(plot)))


if __name__ == "__main__":
    main()
