"""Runs of ``dtrp train`` whose workers are killed again and again, against the same run left alone.

    python benchmarks/restarts/run.py workers --data-dir DIR      # kill -9 of a random worker, every fourth time of all; 20 times
    python benchmarks/restarts/run.py saving --data-dir DIR       # of a random worker in the middle of a save, 10 times
    python benchmarks/restarts/run.py turns --data-dir DIR        # both in turns, 20 times in all
    python benchmarks/restarts/run.py launcher --data-dir DIR     # of the launcher; then the same command again
    python benchmarks/restarts/run.py elastic --data-dir DIR      # 4 workers, then 2, then 3

Results are appended to ``results/<part>.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dtrp.train import environment

HERE = Path(__file__).parent
TIMES = ("samples_per_s", "elapsed_s")
_WAIT_S = 600.0  # for a run that was broken off to save again


def children(pid: int) -> list[int]:
    """The living ones of a process."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == pid and state != "Z":
            found.append(int(path.parent.name))
    return sorted(found)


def runs(pid: int) -> bool:
    """Whether a process does anything; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill(*pids: int) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def saves(out: Path) -> list[Path]:
    """Whole ones, the oldest first."""
    return sorted(path for path in out.glob("saves/update-*") if (path / "manifest.json").exists())


def newest(out: Path) -> float:
    """When the last save was made; 0 where there is none."""
    while True:
        try:
            return max((path.stat().st_mtime for path in saves(out)), default=0.0)
        except FileNotFoundError:  # it has been let go of meanwhile
            continue


def wait_for(what: Callable[[], Any], process: subprocess.Popen[Any], timeout_s: float = _WAIT_S) -> Any:
    """What ``what`` returns, when it is something; None if the process ends before.

    Raises:
        TimeoutError: it does not come.
    """
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        if found := what():
            return found
        if process.poll() is not None:
            return None
        time.sleep(0.005)
    raise TimeoutError(f"nothing for {timeout_s:g} s")


@contextmanager
def started(command: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """``python -m dtrp`` with its output; nothing of it is left after the context."""
    whole = [sys.executable, "-m", "dtrp", *command]
    process = subprocess.Popen(whole, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    try:
        yield process
    finally:
        below = children(process.pid)
        kill(process.pid, *below, *(pid for child in below for pid in children(child)))
        process.communicate()


class Reader:
    """Reads a process's output as it comes, so that its pipes do not fill."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.out, self.err = list[str](), list[str]()
        streams = ((process.stdout, self.out), (process.stderr, self.err))
        self._threads = [threading.Thread(target=lambda s=s, to=to: to.extend(s), daemon=True) for s, to in streams]
        for thread in self._threads:
            thread.start()

    def finish(self) -> tuple[str, str]:
        for thread in self._threads:
            thread.join(30)
        return "".join(self.out), "".join(self.err)


def killed_often(
    command: list[str], out: Path, kills: int, *, aim: str, seed: int = 0, most_s: float = 1e9
) -> dict[str, Any]:
    """Run a command with ``--workers``, ``--max-restarts`` and ``--save-every``, and kill workers until it has been enough.

    Args:
        command: of dtrp.
        out: its ``--out``.
        kills: how many.
        aim: ``workers``: at a random time; ``saving``: while a save is being written; ``turns``: one after the other. Every fourth
            kill is of all workers, the launcher living, the others of a random one.
        seed: of what is random.
        most_s: no more kills after so long.

    Returns:
        How it ended, and of each kill the update of the last save, and the seconds until the next.
    """
    draw = random.Random(seed)
    done: list[dict[str, Any]] = []
    with started(command) as process:
        reader = Reader(process)
        start = time.monotonic()
        while len(done) < kills and time.monotonic() < start + most_s:
            last = time.time() if done else 0.0
            began = time.monotonic()
            if wait_for(lambda last=last: newest(out) > last, process) is None:  # type: ignore[misc]
                break
            if done:
                done[-1]["until_saved_s"] = round(time.monotonic() - began, 2)
            if aim == "saving" or (aim == "turns" and len(done) % 2):
                wait_for(lambda: list(out.glob("saves/.update-*.new")), process)
            else:
                time.sleep(draw.uniform(0.0, 2.0))
            workers = children(process.pid)
            if not workers:
                break
            victims = workers if len(done) % 4 == 3 else [draw.choice(workers)]
            kill(*victims)
            half = [path.name for path in out.glob("saves/.update-*.new")]
            done.append({"after": saves(out)[-1].name, "victims": len(victims), "while_saving": bool(half)})
        process.wait()
        said, error = reader.finish()
    going_on = re.findall(r"going on after update (\d+)", said)
    return {
        "kills": done,
        "code": process.returncode,
        "error": error,
        "went_on_after": [int(n) for n in going_on],
        "restarts": re.findall(r"^(.*); restart (\d+ of \d+)$", said, re.M),
    }


def lines_of(out: Path) -> list[dict[str, Any]]:
    """The metrics of a run, but for times."""
    read = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in read]


def same(out: Path, whole: Path) -> dict[str, bool]:
    """Whether two runs ended with the same weights, and the same losses over the samples of every epoch."""
    a, b = (torch.load(each / "model.pt") for each in (out, whole))
    return {
        "weights_equal": a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a),
        "metrics_equal": lines_of(out) == lines_of(whole),
        "finished": (out / "summary.json").is_file(),
    }


def launcher_killed(command: list[str], out: Path) -> dict[str, Any]:
    """Kill the launcher of a command, see its workers go, and give the same command again."""
    with started(command) as process:
        reader = Reader(process)
        wait_for(lambda: saves(out), process)
        workers = children(process.pid)
        kill(process.pid)
        began = time.monotonic()
        while any(runs(pid) for pid in workers) and time.monotonic() < began + 60:
            time.sleep(0.05)
        left = [pid for pid in workers if runs(pid)]
        kill(*left)
        gone_s = round(time.monotonic() - began, 2)
        reader.finish()
    done = subprocess.run([sys.executable, "-m", "dtrp", *command], capture_output=True, text=True, check=False)
    went_on = re.findall(r"going on after update (\d+)", done.stdout)
    return {"workers": len(workers), "orphans": len(left), "gone_s": gone_s, "code": done.returncode,
            "went_on_after": [int(n) for n in went_on], "error": done.stderr}  # fmt: skip


def fewer_and_more(command: list[str], out: Path, numbers: list[int]) -> dict[str, Any]:
    """Run a command with ``--workers MIN:MAX`` on ``numbers[0]`` workers, kill some or start others, as ``numbers`` say.

    The next number is brought about when a save has been made with the one before. A worker goes with its launcher.
    """
    steps: list[dict[str, Any]] = []
    extra: list[subprocess.Popen[bytes]] = []
    began = time.monotonic()
    with started(command) as process:
        reader = Reader(process)

        def stages(since: float) -> int:
            """Of the last save, if it was made since then."""
            try:
                last = saves(out)[-1]
                manifest = json.loads((last / "manifest.json").read_text())
                return int(manifest["num_stages"]) if last.stat().st_mtime > since else 0
            except (OSError, IndexError):
                return 0

        try:
            launchers: list[int] = []
            since = 0.0
            for number in numbers:
                now = launchers
                for launcher in now[number:]:
                    kill(launcher, *children(launcher))
                launchers = now[:number]
                if now and number > len(now):
                    line = next(line for line in reader.out if "another worker joins with: " in line)
                    join = shlex.split(line.partition("with: ")[2])
                    for _ in range(number - len(now)):
                        extra.append(subprocess.Popen(join, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
                        launchers.append(extra[-1].pid)
                if wait_for(lambda n=number, since=since: stages(since) == n, process) is None:  # type: ignore[misc]
                    break
                steps.append(
                    {"workers": number, "saved": saves(out)[-1].name, "elapsed_s": round(time.monotonic() - began, 1)}
                )
                launchers = launchers or children(process.pid)
                since = time.time()
            process.wait()
        finally:
            for each in extra:
                kill(each.pid, *children(each.pid))
                each.wait()
        said, error = reader.finish()
    going_on = re.findall(r"going on after update (\d+)", said)
    return {"steps": steps, "code": process.returncode, "error": error, "went_on_after": [int(n) for n in going_on]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["workers", "saving", "turns", "launcher", "elastic"])
    parser.add_argument("--data-dir", required=True, help="holds cifar-10-batches-py")
    parser.add_argument("--kills", type=int, help="20; 10 for saving")
    parser.add_argument("--workers", type=int, default=3, help="K")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--limit-train", type=int, default=5000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--save-every", default="5")
    parser.add_argument("--most", type=float, default=1e9, help="seconds, after which there are no more kills")
    options = parser.parse_args()
    kills = options.kills or (10 if options.part == "saving" else 20)
    base = ["train", "--data", "cifar10", "--data-dir", options.data_dir, "--model", options.model, "--num-microbatches", "2",
            "--limit-train", str(options.limit_train), "--limit-test", "1000", "--epochs", str(options.epochs),
            "--save-every", options.save_every]  # fmt: skip
    workers = ["--workers", str(options.workers)]
    with tempfile.TemporaryDirectory() as folder:
        whole, out = Path(folder) / "whole", Path(folder) / "run"

        def undisturbed(*more: str) -> float:
            began = time.monotonic()
            command = [sys.executable, "-m", "dtrp", *base, *more, "--quiet", "--out", str(whole)]
            subprocess.run(command, check=True)
            return round(time.monotonic() - began, 1)

        shown = ["DIR" if word == options.data_dir else word for word in base]
        entry: dict[str, Any] = {"part": options.part, "command": [*shown, *workers]}
        if options.part == "elastic":
            entry["bp_s"] = undisturbed("--method", "bp", "--stages", "4", "--threads", "1")
            entry["command"] = [*shown, "--workers", "2:4"]
            command = [*base, "--workers", "2:4"]
            entry |= fewer_and_more([*command, "--out", str(out)], out, [4, 2, 3])
            entry |= {
                "accuracy": lines_of(out)[-1]["test_accuracy"],
                "bp_accuracy": lines_of(whole)[-1]["test_accuracy"],
            }
        else:
            entry["undisturbed_s"] = undisturbed(*workers)
            began = time.monotonic()
            if options.part == "launcher":
                entry |= launcher_killed([*base, *workers, "--quiet", "--out", str(out)], out)
            else:
                command = [*base, *workers, "--max-restarts", str(kills + 5), "--quiet", "--out", str(out)]
                entry |= killed_often(command, out, kills, aim=options.part, most_s=options.most)
            entry |= {"elapsed_s": round(time.monotonic() - began, 1), **same(out, whole)}
    entry["environment"] = environment()
    (HERE / "results").mkdir(exist_ok=True)
    with (HERE / "results" / f"{options.part}.jsonl").open("a") as file:
        file.write(json.dumps(entry) + "\n")
    print(json.dumps(entry, indent=1))


if __name__ == "__main__":
    main()
