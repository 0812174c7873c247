"""Spans as ranges of `torch.profiler`. What a trace of all ranks holds is in test_distributed.py."""

from __future__ import annotations

import threading
from collections import Counter

import pytest
import torch
from helpers import minibatches, network, pipeline
from torch.profiler import ProfilerActivity, profile

from dtrp.measure.trace import Tracer


def test_every_action_is_a_range_of_the_profiler() -> None:
    with (
        pipeline(network(), num_stages=2, method="dtrp", num_microbatches=2, trace=True) as pipe,
        profile(activities=[ProfilerActivity.CPU]) as profiler,
    ):
        for x, y in minibatches(3):
            pipe.step(x, y)
        pipe.flush()
    events = profiler.events()
    assert events is not None
    ranges = Counter(event.name for event in events if event.name[0] in "FBU" and event.name[1:].isdigit())
    assert ranges == {f"{kind}{i}": 2 for kind, count in (("F", 6), ("B", 6), ("U", 3)) for i in range(count)}, (
        "a stage"
    )


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="the profiler of torch 2.6 sees one thread only")
@pytest.mark.parametrize("all_threads", [False, True])
def test_what_a_helper_thread_sends_is_seen_by_a_profiler_of_all_threads(all_threads: bool) -> None:
    tracer, begun = Tracer(True), threading.Event()

    def send() -> None:
        begun.wait()
        with tracer.range("send forward"):
            torch.ones(3).sum()

    thread = threading.Thread(target=send)
    thread.start()
    config = torch._C._profiler._ExperimentalConfig(profile_all_threads=all_threads)
    with profile(activities=[ProfilerActivity.CPU], experimental_config=config) as profiler:
        begun.set()
        thread.join()
    events = profiler.events()
    assert events is not None
    assert ("send forward" in {event.name for event in events}) == all_threads
