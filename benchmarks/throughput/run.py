"""How fast the stages of a pipeline train, in processes of their own.

    python benchmarks/throughput/run.py sleeping     # the order of work alone: dtrp's methods beside torch's schedules
    python benchmarks/throughput/run.py compute      # ResNets on two cores, each contender at its own best cut
    python benchmarks/throughput/run.py split        # the same of backwards in two parts, and the zero bubbles
    python benchmarks/throughput/run.py links        # what latency costs
    python benchmarks/throughput/run.py tun          # the same on a real delayed link; as root on Linux

Contenders take turns within one run, and ratios are of medians over its rounds. Each part prints its table and
appends a line for each configuration to results/<part>.jsonl.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import compute
import sleeping
import tun
from ranks import launch

from dtrp.planning import measure_link


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True, metavar="PART")
    for name, contenders, rounds, minibatches in (
        ("sleeping", sleeping.contenders(2), 5, 20),
        ("split", sleeping.contenders_in_parts(2), 5, 20),
        ("links", sleeping.contenders_on_links(2), 5, 20),
        ("tun", tun.contenders(), 5, 20),
        ("compute", compute.contenders([2]), 5, 12),
    ):
        part = parts.add_parser(name, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        if name in ("sleeping", "split", "links"):
            default = [4] if name == "links" else [2, 4, 8]
            part.add_argument("--stages", type=int, nargs="+", default=default, help="numbers of stages, K")
        part.add_argument("--rounds", type=int, default=rounds, help="turns of every contender")
        part.add_argument("--minibatches", type=int, default=minibatches, help="timed in a turn")
        names = [contender.name for contender in contenders]
        part.add_argument("--only", nargs="+", default=[], choices=names, help="leave the others out")
        part.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / f"{name}.jsonl")
        if name == "compute":
            part.add_argument("--models", nargs="+", default=["resnet20", "resnet56"])
            part.add_argument("--batch", type=int, default=128)
            part.add_argument("--microbatches", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers to try, A")
            part.add_argument("--channels-last", action="store_true", help="networks in that memory format")
            part.add_argument("--trial", type=int, default=6, help="mini-batches timed for a candidate cut")
            part.add_argument(
                "--known-cuts", action="store_true", help="those that were found best before, as --out has them"
            )
    options = parser.parse_args()
    run = {"run": time.strftime("%Y-%m-%dT%H:%M:%S"), "load_before": os.getloadavg()[0]}
    if os.getloadavg()[0] > 0.5:
        print(f"the machine is busy (load {os.getloadavg()[0]:.1f}): what follows is not to be relied on")
    if options.part == "compute":
        for model in options.models:
            launch(
                compute.compute,
                2,
                compute.Options(
                    model=model,
                    batch=options.batch,
                    rounds=options.rounds,
                    minibatches=options.minibatches,
                    trial=options.trial,
                    microbatches=tuple(options.microbatches),
                    only=tuple(options.only),
                    known_cuts=options.known_cuts,
                    channels_last=options.channels_last,
                    out=options.out,
                    run=run,
                ),
            )
        return
    link_s = measure_link().latency_s if options.part == "split" else 0.0
    settings = sleeping.Options(options.rounds, options.minibatches, tuple(options.only), options.out, run, link_s)
    if options.part == "tun":
        tun.run(settings)
        return
    for num_stages in options.stages:
        launch(getattr(sleeping, options.part), num_stages, settings)


if __name__ == "__main__":
    main()
