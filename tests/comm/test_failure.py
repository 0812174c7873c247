"""What is not worth a launch of ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from typing import Any

import pytest
import torch
from helpers import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import complaints

from dtrp.comm.failure import Failure, Monitor, SigtermHandler
from dtrp.comm.peer_watch import _MESSAGE_BYTES, _packed
from dtrp.errors import StageError, WaitTimeoutError, WorkerError
from dtrp.launch.join import _interruptibly
from dtrp.schedule import Action


@pytest.mark.parametrize("letter", ["a", "\u0436", "\U0001f600", "\n", '"'])
@pytest.mark.parametrize("length", [0, 100, 5000, 100_000])
def test_a_word_always_fits_and_can_be_read(letter: str, length: int) -> None:
    failure = Failure("stage", 3, "begins " + letter * length, (1, 2, 3), letter * length + " ends")
    packed = _packed(asdict(failure))
    assert len(packed) == _MESSAGE_BYTES
    word = json.loads(packed)
    assert (word["kind"], word["rank"], word["place"]) == ("stage", 3, [1, 2, 3])
    assert word["text"].startswith("begins")
    assert word["trace"].endswith(" ends")
    if length <= 100:
        assert word["text"] == failure.text


ANYTHING = st.text(
    st.characters(exclude_categories=()), max_size=30
)  # nulls, surrogates, what JSON writes as twelve bytes
LONG = st.builds(lambda text, times: text * times, ANYTHING, st.sampled_from([1, 1, 100, 3000]))


@settings(deadline=None, derandomize=True, database=None, max_examples=examples(150))
@given(
    name=st.text("aZ_", min_size=1).flatmap(lambda name: st.sampled_from([name, name * 20_000])),
    messages=st.lists(LONG, min_size=1, max_size=4),
    deep=st.sampled_from([0, 0, 0, 400]),
    place=st.none() | st.integers(0, 2**62),
    mute=st.booleans(),
)
def test_anything_that_is_raised_can_be_told(
    name: str, messages: list[str], deep: int, place: int | None, mute: bool
) -> None:
    def failing(self: Any) -> str:
        raise self

    kind = type(name, (FloatingPointError,), {"__str__": failing} if mute else {})
    error: BaseException | None = None
    for message in (*messages, *["deep"] * deep, messages[0]):
        inner, error = error, kind(message)
        error.__cause__ = inner
    assert error is not None
    for raised in (
        error,
        StageError(2, Action("U" if place is None else "F", place or 0), 7, error),
        SystemExit(messages[0]),
    ):
        if raised is not error:
            raised.__cause__ = raised.__context__ = error
        failure = Failure.from_error(3, raised)
        packed = _packed(asdict(failure))
        assert len(packed) == _MESSAGE_BYTES
        word = json.loads(packed)
        told = Failure(**{**word, "place": tuple(word["place"]) if word["place"] else None})
        assert (told.kind, told.rank, told.place) == (failure.kind, 3, failure.place)
        for field in ("text", "trace", "nonfinite"):
            sent, came = (
                json.loads(json.dumps(getattr(each, field))) for each in (failure, told)
            )  # halves of a pair are one
            assert came == sent or " characters, cut)" in came
            assert len(came) <= len(sent) + 40
        assert str(told.exception("in step()")).startswith(told.text[:50])


def test_words_of_any_kind_are_cut() -> None:
    for word in ({"doing": "x" * 10**6, "awaited": list(range(10**5))}, {"done": 10**9}, {"asks": True}):
        told = json.loads(_packed(word))
        assert told.keys() == word.keys()
        assert all(told[name] == value or len(told[name]) < len(value) for name, value in word.items())


def test_the_first_failure_counts() -> None:
    heard: list[Failure] = []
    monitor = Monitor(1.0, heard.append)
    monitor.fail(Failure("gone", 2, "rank 2 is gone"))
    monitor.fail(Failure("gone", 1, "rank 1 is gone"))
    assert [failure.rank for failure in heard] == [2]
    with pytest.raises(WorkerError, match="rank 2 is gone; this process was starting"):
        monitor.wait(lambda: None, lambda: "{}")
    assert monitor.wait(lambda: 5, lambda: "{}") == 5, "what is there is taken first"


def test_a_wait_ends() -> None:
    monitor = Monitor(0.2, lambda failure: None)
    with pytest.raises(WaitTimeoutError, match="rank 0 has waited 0.2 s for rank 1"):
        monitor.wait(lambda: None, lambda: "rank 0 has waited {} for rank 1")


def test_a_stage_error_is_one_elsewhere_too() -> None:
    failure = Failure("stage", 3, "stage 3, update: ValueError: x", (3, None, 7), "Traceback of rank 3")
    error = failure.exception("in flush()")
    assert isinstance(error, StageError)
    assert (error.stage, error.microbatch, error.minibatch, str(error)) == (3, None, 7, failure.text)
    assert "on rank 3:\nTraceback of rank 3" in str(error.__cause__)


def test_who_exits_with_an_error_in_hand_says_which() -> None:
    """As `torch.multiprocessing.spawn` does in its processes."""
    with pytest.raises(SystemExit, match="1") as caught:
        try:
            raise KeyError("no such column")
        except KeyError:
            sys.exit(1)
    failure = Failure.from_error(2, caught.value)
    assert failure.text == "rank 2 has ended (exit code 1), after KeyError: 'no such column'"
    assert "raise KeyError" in failure.trace
    assert Failure.from_error(2, SystemExit(3)) == Failure("ended", 2, "rank 2 has ended (exit code 3)")


def test_sigterm_names_who_failed_and_is_obeyed_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtrp.comm.failure._NEWS_S", 0.1)
    monkeypatch.setattr("dtrp.comm.failure._LAST_WORDS_S", 0.2)
    monitor = Monitor(1.0, lambda failure: None)
    handler = SigtermHandler(monitor, 0)
    try:
        monitor.fail(Failure("gone", 2, "rank 2 is gone"))
        with pytest.raises(WorkerError, match="rank 2 is gone"):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # it is ending, and has something to say first
        time.sleep(0.25)
        with pytest.raises(SystemExit, match="143"):
            signal.raise_signal(signal.SIGTERM)
    finally:
        handler.restore()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_sigterm_without_a_failure_ends_this_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtrp.comm.failure._NEWS_S", 0.1)
    heard: list[Failure] = []
    monitor = Monitor(1.0, heard.append)
    handler = SigtermHandler(monitor, 4)
    try:
        with pytest.raises(SystemExit, match="143"):
            signal.raise_signal(signal.SIGTERM)
    finally:
        handler.restore()
    assert [failure.text for failure in heard] == ["rank 4 was told to end (SIGTERM)"]


@pytest.mark.parametrize("frozen", ["", "import gc; gc.freeze()"])
def test_a_run_that_failed_at_its_end_runs_exit_handlers_and_ends_with_a_failure(frozen: str) -> None:
    """Those too that are older than torch: of `logging`, of temporary folders."""
    program = f"""
import atexit; atexit.register(print, "older")
from dtrp.launch.process_end import end_with_failure
atexit.register(print, "newer"); atexit.register(end_with_failure)
{frozen}"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stdout, complaints(ended.stderr)) == (1, "newer\nolder\n", [])


def test_a_forked_child_is_no_part_of_the_run() -> None:
    heard: list[Failure] = []
    handler = SigtermHandler(Monitor(1.0, heard.append), 0)
    try:
        child = os.fork()
        if not child:
            signal.raise_signal(signal.SIGTERM)
            os._exit(0)
        _, status = os.waitpid(child, 0)
    finally:
        handler.restore()
    assert os.WTERMSIG(status) == signal.SIGTERM
    assert not heard


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("no such interface"), "no such interface"),
        (torch.distributed.DistNetworkError("refused"), "rank 0 cannot be reached: refused"),
        (TimeoutError("rank 1 has not come"), "rank 1 has not come"),
    ],
)
def test_why_a_rank_could_not_join(error: Exception, reason: str) -> None:
    def job(at: object) -> None:
        raise error

    with pytest.raises(TimeoutError, match=rf"within 5 s \({reason}\); start all of them"):
        _interruptibly(job, 5.0)


@pytest.mark.parametrize(
    ("number", "error", "text"),
    [(signal.SIGTERM, WorkerError, "waited for rank 0, which has not come"), (signal.SIGINT, KeyboardInterrupt, "^$")],
)
def test_a_signal_ends_the_wait_and_the_process_though_the_backend_waits_on(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals, error: type[BaseException], text: str
) -> None:
    at_exit: list[Any] = []
    codes: list[int] = []
    monkeypatch.setattr("dtrp.launch.join.Finalize", lambda _, job, exitpriority: at_exit.append(job))
    monkeypatch.setattr("os._exit", codes.append)
    monkeypatch.setenv("RANK", "1")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored
    may_end = threading.Event()
    threading.Timer(0.3, os.kill, (os.getpid(), number)).start()
    with pytest.raises(error, match=text):
        _interruptibly(lambda at: may_end.wait(10), 5.0)
    signal.signal(signal.SIGINT, before)
    at_exit[0]()
    assert codes == [1], "no thread may come back from the backend while the interpreter goes down"
    may_end.set()
    time.sleep(0.1)
    at_exit[0]()
    assert codes == [1]


def test_somebody_elses_handler_stays() -> None:
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        mine = signal.getsignal(signal.SIGTERM)
        handler = SigtermHandler(Monitor(1.0, lambda failure: None), 0)
        assert signal.getsignal(signal.SIGTERM) is mine
        handler.restore()
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)
