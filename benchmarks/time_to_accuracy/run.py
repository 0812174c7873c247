"""How long until a network has learned something: wall-clock to a test accuracy.

    python benchmarks/time_to_accuracy/run.py all --data-dir DIR         # everything below, in this order
    python benchmarks/time_to_accuracy/run.py real --data-dir DIR        # K = 2 on two cores, two links, three seeds
    python benchmarks/time_to_accuracy/run.py profile --data-dir DIR     # the times of the layers, for what follows
    python benchmarks/time_to_accuracy/run.py simulated                  # K = 4 and 8: stored curves over simulated mini-batches

A run that is through has a line in results/ and is not repeated: break it off, and start it again. The slow link takes root on
Linux and /dev/net/tun; elsewhere it is left out, with a word.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "throughput")]

import simulated  # noqa: E402
import training  # noqa: E402
import tun  # noqa: E402
import tuning  # noqa: E402
from contenders import Contender  # noqa: E402
from ranks import launch  # noqa: E402
from training import Setting  # noqa: E402

RANKS = 2
LINKS = ("loopback", "slow")
ALONE = Contender("plain")
DDP = Contender("ddp")
PIPELINES = [
    *(Contender("torch", name, 2) for name in ("GPipe", "1F1B", "InterleavedZeroBubble")),
    *(Contender("dtrp", name, 2) for name in ("bp-zb", "dtrp", "spectrain", "dtrp-1f1b", "dtrp-split")),
]
CONTENDERS = {contender.name: contender for contender in (ALONE, DDP, *PIPELINES)}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def real(options: argparse.Namespace, setting: Setting) -> None:
    """Every contender with every seed, in turns; one worker does not depend on the link and runs once a seed."""
    links = list(options.links)
    if "slow" in links and (reason := tun.why_not()) is not None:
        print(f"the slow link is left out: {reason}")
        links.remove("slow")
    for link in links:
        tune(options, setting, link)
    for seed, link, name in itertools.product(options.seeds, links, options.contenders):
        if name == ALONE.name and link != links[0]:
            continue
        contender, cuts = chosen(options, setting, link, CONTENDERS[name])
        if any(is_row_of(row, link, contender, seed, setting) for row in read(options.out / "real.jsonl")):
            continue
        print(f"{link}: {name}, A={contender.num_microbatches}, seed {seed}", flush=True)
        work = training.Run(link, contender, cuts, seed, setting, options.out / "real.jsonl", latency_ms(options, link))
        on_link(options, link, 1 if contender == ALONE else RANKS, training.work, work)


def is_row_of(row: dict[str, Any], link: str, contender: Contender, seed: int, setting: Setting) -> bool:
    """Whether a run is through. One worker's counts for every link."""
    same_link = row["link"] == link or row["contender"] == ALONE.name
    same = (row["contender"], row["seed"], row["setting"]) == (contender.name, seed, setting.recorded())
    return same_link and same


def latency_ms(options: argparse.Namespace, link: str) -> float:
    return float(options.latency_ms) if link == "slow" else 0.0


def on_link(options: argparse.Namespace, link: str, num_ranks: int, function: Any, argument: Any) -> None:
    """Run a function in ranks that a link joins."""
    if link == "loopback" or num_ranks == 1:
        launch(function, num_ranks, argument)
        return
    with tun.slow_link(latency_ms(options, link) / 1e3) as slow:
        launch(function, num_ranks, argument, slow, address=tun.ADDRESSES[0])


def tune(options: argparse.Namespace, setting: Setting, link: str) -> None:
    """Cuts and micro-batches of the pipelines that have none yet on this link."""
    rows = read(options.out / "tuned.jsonl")
    missing = []
    for contender in PIPELINES:
        if contender.name in options.contenders and tuning.tuned(rows, link, contender, setting) is None:
            known = tuning.tuned(rows, LINKS[0], contender, setting)
            missing.append((contender, tuple(known["cuts"]) if known else ()))
    if missing:
        work = tuning.Tuning(link, tuple(missing), tuple(options.microbatches), setting, options.out / "tuned.jsonl")
        on_link(options, link, RANKS, tuning.work, work)


def chosen(
    options: argparse.Namespace, setting: Setting, link: str, contender: Contender
) -> tuple[Contender, tuple[int, ...]]:
    """With its best number of micro-batches, and its cuts."""
    if contender in (ALONE, DDP):
        return contender, ()
    row = tuning.tuned(read(options.out / "tuned.jsonl"), link, contender, setting)
    assert row is not None
    return dataclasses.replace(contender, num_microbatches=row["num_microbatches"]), tuple(row["cuts"])


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["all", "real", "profile", "simulated"])
    parser.add_argument("--links", nargs="+", choices=LINKS, default=list(LINKS))
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS), metavar="NAME",
                        help=f"some of: {', '.join(CONTENDERS)}")  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--microbatches", nargs="+", type=int, default=[1, 2, 4, 8], help="numbers to try, A")
    parser.add_argument("--latency-ms", type=float, default=10.0, help="of the slow link, one way")
    parser.add_argument("--curves", type=Path, default=HERE.parent / "accuracy" / "results" / "length.jsonl",
                        help="accuracies by epoch, for the simulated part")  # fmt: skip
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the raw files")
    setting = parser.add_argument_group("what is trained")
    for entry in dataclasses.fields(Setting):
        number = next((kind for kind in (int, float) if str(entry.type).startswith(kind.__name__)), str)
        setting.add_argument(f"--{entry.name.replace('_', '-')}", type=number, default=entry.default)
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    options = parsed(words)
    setting = Setting(**{entry.name: getattr(options, entry.name) for entry in dataclasses.fields(Setting)})
    options.out.mkdir(parents=True, exist_ok=True)
    if os.getloadavg()[0] > 0.5 and options.part != "simulated":
        print(f"the machine is busy (load {os.getloadavg()[0]:.1f}): what follows is not to be relied on")
    if options.part in ("all", "real"):
        real(options, setting)
    if options.part in ("all", "profile"):
        simulated.profile(setting, options.out / "profile.jsonl")
    if options.part in ("all", "simulated"):
        simulated.write(options.out, options.curves)


if __name__ == "__main__":
    main()
