"""Starts the ranks of a test as processes of their own, and leaves none behind.

Importing torch takes seconds, so one process, the server, does it once and forks: each rank is a whole interpreter that
runs `rank_programs.main`, with the environment of a bare launch (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), a
session of its own, its output in files, and an ordinary end. `start_torchrun` starts torchrun itself instead.

    python launching.py     the server: a JSON request a line on stdin, an answer a line on stdout
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
RANK_PROGRAMS = TESTS / "rank_programs.py"

# What the bindings of triton, which comes with torch 2.15, say where an interpreter ends and some of their names are still held.
_LEAKS = re.compile(
    r"^(?:nanobind: .*| - leaked \w+ \".*\"| - \.\.\. skipped remainder|See https://nanobind\S*)\n?", re.M
)


@dataclass(frozen=True)
class Outcome:
    """How a rank ended; a negative ``returncode`` is the signal that ended it."""

    returncode: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        """What the user reads first: the error that ended the process, but for what native threads warn of after it."""
        return re.sub(r"(?ms)^\[W\d+ .*?(^$|\Z)", "", self.err).strip().rpartition("\n")[2]


class Server:
    """The process that forks the ranks."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
            environment.pop(name, None)
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


class Ranks:
    """The processes of one launch, by rank.

    Args:
        folder: of their output and of the files they make, `ready0` and so on among them.
    """

    def __init__(self, server: Server, folder: Path, pids: list[int]) -> None:
        self.folder, self.pids = folder, pids
        self._server = server
        self._returncodes: dict[int, int] = {}

    def await_ready(self, timeout_s: float = 30.0) -> None:
        """Until each rank has called `rank_programs.ready`, or has ended."""
        deadline = time.monotonic() + timeout_s
        while not all((self.folder / f"ready{rank}").exists() for rank in range(len(self.pids))):
            assert time.monotonic() < deadline, f"not ready after {timeout_s} s: {self.logs()}"
            assert None in self._poll(), f"ended before they were ready: {self.logs()}"
            time.sleep(0.01)

    def kill(self, number: signal.Signals, *ranks: int) -> None:
        for rank in ranks or range(len(self.pids)):
            os.kill(self.pids[rank], number)

    def wait(self, timeout_s: float) -> list[Outcome]:
        """How all of them ended, which they must within ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        while None in (codes := self._poll()):
            assert time.monotonic() < deadline, f"still running after {timeout_s} s: {codes}\n{self.logs()}"
            time.sleep(0.01)
        assert not self.left(), "a rank has left processes behind"
        return [
            Outcome(code or 0, self._read(f"out{rank}"), _LEAKS.sub("", self._read(f"err{rank}")))
            for rank, code in enumerate(codes)
        ]

    def await_end(self, timeout_s: float, *ranks: int) -> None:
        """Until these have ended."""
        deadline = time.monotonic() + timeout_s
        while any(code is None for rank, code in enumerate(self._poll()) if rank in ranks):
            assert time.monotonic() < deadline, f"still running after {timeout_s} s: {self.logs()}"
            time.sleep(0.01)

    def left(self) -> list[int]:
        """The ranks of whose process groups something remains."""
        return [rank for rank, pid in enumerate(self.pids) if _group_exists(pid)]

    def logs(self) -> str:
        tails = [self._read(f"out{rank}")[-300:] + self._read(f"err{rank}")[-3000:] for rank in range(len(self.pids))]
        return "\n".join(f"-- rank {rank}:\n{tail}" for rank, tail in enumerate(tails))

    def end(self) -> None:
        """Kill what is left."""
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while None in self._poll() and time.monotonic() < deadline:
            time.sleep(0.01)

    def _poll(self) -> list[int | None]:
        for pid in self.pids:
            if pid not in self._returncodes and (code := self._server.ask({"poll": pid})) is not None:
                self._returncodes[pid] = code
        return [self._returncodes.get(pid) for pid in self.pids]

    def _read(self, name: str) -> str:
        path = self.folder / name
        return path.read_text() if path.exists() else ""


@contextlib.contextmanager
def start_ranks(
    server: Server, folder: Path, num_ranks: int, program: str, *arguments: Any, **environment: str
) -> Iterator[Ranks]:
    """``num_ranks`` processes of ``rank_programs.PROGRAMS[program](folder, *arguments)``; none is left after it.

    ``arguments`` must survive JSON; ``environment`` adds to the variables of a bare launch.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    ranks = Ranks(server, folder, [])
    try:
        for rank in range(num_ranks):
            bare = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
            variables = {name: str(value) for name, value in bare.items()}
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **environment}
            request = {
                "program": program,
                "arguments": [str(folder), *arguments],
                "environment": variables,
                "out": str(folder / f"out{rank}"),
                "err": str(folder / f"err{rank}"),
            }
            ranks.pids.append(server.ask(request))
        yield ranks
    finally:
        ranks.end()


def run_ranks(
    server: Server,
    folder: Path,
    num_ranks: int,
    program: str,
    *arguments: Any,
    timeout_s: float = 60.0,
    **environment: str,
) -> list[Outcome]:
    """`start_ranks`, and how they ended."""
    with start_ranks(server, folder, num_ranks, program, *arguments, **environment) as ranks:
        return ranks.wait(timeout_s)


def complaints(err: str) -> list[str]:
    """The lines of stderr that tell of something wrong; a build of torch may print lines of other kinds."""
    return [
        line for line in err.splitlines() if re.search(r"Traceback|Error|Warning.*dtrp|dtrp.*Warning|^dtrp: ", line)
    ]


def shared_folder(folder: Path) -> Path:
    """The folder that all workers of pytest-xdist have in common, from one worker's own."""
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


def results_of_cases(
    server: Server, folder: Path, num_ranks: int, program: str, names: Sequence[str], **environment: str
) -> dict[str, list[Any]]:
    """What ``program`` came to for each of ``names`` on each rank, launched by whoever asks first for this ``folder``."""
    import torch

    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f"{folder.name}.pt")
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            torch.save(_launch_cases(server, folder, num_ranks, program, names, **environment), path)
    results: dict[str, list[Any]] = torch.load(path, weights_only=False)
    return results


def of_ranks(found: list[Any]) -> list[dict[str, Any]]:
    """What a case came to on the ranks that took part; fails with what they said where it failed."""
    texts = [result for result in found if isinstance(result, str)]
    assert not texts, "\n\n".join(texts)
    return [result for result in found if result]


def _launch_cases(
    server: Server, folder: Path, num_ranks: int, program: str, names: Sequence[str], **environment: str
) -> dict[str, list[Any]]:
    """The results of cases by rank, a text in place of what failed; what came after that has a launch of its own."""
    import torch

    done: dict[str, list[Any]] = {}
    while rest := [name for name in names if name not in done]:
        where = folder / str(len(done))
        with start_ranks(server, where, num_ranks, program, *rest, **environment) as ranks:
            try:
                outcomes = ranks.wait(240)
            except AssertionError as error:
                done[rest[0]] = [str(error)]
                return done | {name: ["an earlier case did not end"] for name in rest[1:]}
        written = [torch.load(path, weights_only=False) for path in sorted(where.glob("results*.pt"))]
        for name in rest:
            found = [results[name] for results in written if name in results]
            if len(found) < num_ranks or any(isinstance(result, str) for result in found):
                done[name] = [result for result in found if isinstance(result, str)] or [ranks.logs()]
                break
            done[name] = found
        else:
            assert all(outcome.returncode == 0 for outcome in outcomes), ranks.logs()
            assert not any(complaints(outcome.err) for outcome in outcomes), ranks.logs()
    return done


class Torchrun:
    """torchrun and its workers, whose logs it redirects into ``folder``."""

    def __init__(self, folder: Path, num_ranks: int, script: Path, *arguments: str) -> None:
        self.folder, self.num_ranks = folder, num_ranks
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks)]
        command += ["--master-port", str(free_port()), "--redirects", "3", "--log-dir", str(folder / "logs")]
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "agent").open("w") as log:
            self.agent = subprocess.Popen(
                [*command, str(script), *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

    def await_ready(self, timeout_s: float = 90.0) -> list[int]:
        """The workers' process ids, once each has called `rank_programs.ready`."""
        deadline = time.monotonic() + timeout_s
        while None in (pids := self._pids()):
            assert time.monotonic() < deadline, f"not ready after {timeout_s} s: {self.logs()}"
            assert self.agent.poll() is None, f"ended before they were ready: {self.logs()}"
            time.sleep(0.05)
        return [pid for pid in pids if pid is not None]

    def wait(self, timeout_s: float) -> int:
        """The agent's exit status."""
        return self.agent.wait(timeout_s)

    def read(self, rank: int, stream: str = "stderr") -> str:
        """A worker's log."""
        return "".join(path.read_text() for path in sorted(self.folder.glob(f"logs/*/attempt_0/{rank}/{stream}.log")))

    def logs(self) -> str:
        workers = "\n".join(f"-- rank {rank}:\n{self.read(rank)[-3000:]}" for rank in range(self.num_ranks))
        return f"-- agent:\n{(self.folder / 'agent').read_text()[-3000:]}\n{workers}"

    def end(self) -> None:
        """Kill what is left."""
        for pid in [self.agent.pid, *(pid for pid in self._pids() if pid is not None)]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(os.getpgid(pid), signal.SIGKILL)
        self.agent.wait()

    def _pids(self) -> list[int | None]:
        paths = [self.folder / f"ready{rank}" for rank in range(self.num_ranks)]
        return [int(path.read_text()) if path.exists() else None for path in paths]


@contextlib.contextmanager
def start_torchrun(folder: Path, num_ranks: int, script: Path, *arguments: str) -> Iterator[Torchrun]:
    """torchrun with a script of its own; no process is left after it."""
    torchrun = Torchrun(folder, num_ranks, script, *arguments)
    try:
        yield torchrun
    finally:
        torchrun.end()


def runs(pid: int) -> bool:
    """Whether a process, not necessarily a child, does anything: a zombie does not."""
    try:
        return re.search(r"^State:\s+Z", Path(f"/proc/{pid}/status").read_text(), re.M) is None
    except (FileNotFoundError, ProcessLookupError):
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _group_exists(pid: int) -> bool:
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True


# -- in the server ------------------------------------------------------------------------------------------


def _serve() -> dict[str, Any]:
    """Answer requests; returns the request in the process that is to carry it out."""
    living: set[int] = set()
    try:
        for line in iter(sys.stdin.readline, ""):
            request = json.loads(line)
            if "poll" in request:
                pid, status = os.waitpid(request["poll"], os.WNOHANG)
                living.discard(pid)
                answer = os.waitstatus_to_exitcode(status) if pid else None
            else:
                answer = os.fork()
                if not answer:
                    living.clear()
                    return request
                with contextlib.suppress(PermissionError, ProcessLookupError):
                    os.setpgid(answer, answer)  # as in `_become`: whichever comes first
                living.add(answer)
            print(json.dumps(answer), flush=True)
    finally:
        for pid in living:
            os.killpg(pid, signal.SIGKILL)
    sys.exit()


def _become(request: dict[str, Any]) -> None:
    """Make this fork look like a process that a shell has started."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background may have been told to ignore it
    for number, path in enumerate((os.devnull, request["out"], request["err"])):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    os.environ.update(request["environment"])


def _main() -> None:
    # What every rank would import, some of it when its first optimizer steps.
    for name in ("torch._dynamo", "torch.distributed.device_mesh", "torch.distributed.pipelining", "torch.profiler"):
        importlib.import_module(name)
    programs = importlib.import_module("rank_programs")
    for name in ("saving_programs", "drop_in_forms"):
        importlib.import_module(name)  # adds its own
    gc.freeze()  # a second a rank: its end would look at all these objects, and so copy them
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads must not fork"
    request = _serve()
    _become(request)
    programs.main(request["program"], request["arguments"])


if __name__ == "__main__":
    _main()
