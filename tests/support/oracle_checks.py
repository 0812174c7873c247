"""The local engine held against the oracles."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import oracles
import torch
from helpers import (
    adamw,
    assert_close,
    classifiers,
    clone,
    network,
    pipeline,
    rate,
    sgd,
)
from torch import Tensor, nn

import dtrp
from dtrp.splitting.stages import into_stages


def check_against_oracle(
    row: oracles.Row,
    method: dtrp.Method,
    num_stages: int,
    num_microbatches: int,
    optimizer: str,
    segments: list[list[tuple[Tensor, Tensor]]],
    **options: Any,
) -> dtrp.Pipeline:
    make, equations = OPTIMIZERS[optimizer]
    model = network()
    untouched = [copy.deepcopy(stage) for stage in into_stages(clone(model), num_stages)]
    networks = classifiers(untouched) if row.local else []
    keeps_own = not options
    if row.local:
        options["aux"] = clone(networks)
    pipe = pipeline(model, make, num_stages=num_stages, method=method, num_microbatches=num_microbatches, **options)
    losses = []
    for segment in segments:
        losses += [pipe.step(x, y) for x, y in segment]
        pipe.flush()
    keeps = None if keeps_own else [str(keep) for keep in pipe.keeps().values()]
    want = oracles.train(
        untouched, segments, nn.functional.cross_entropy, row, equations, rate, pipe.rng, num_microbatches, keeps,
        networks=networks,
    )  # fmt: skip
    assert_close(dict(enumerate(losses)), dict(enumerate(want.losses)))
    state = pipe.model_state_dict()
    expected = {}
    for stage, parts in zip(pipe.stages, zip(want.weights, want.buffers, strict=True), strict=True):
        layer = list(dict(stage.named_children()))[-1]
        for name, t in [item for part in parts for item in part.items()]:
            expected[name if not name.startswith("aux.") else f"aux.{layer}.{name[4:]}"] = t
    if row.local and num_stages > 1:
        state |= pipe.state_dict()["aux"]["model"]
    counters = {name for name in state if name.endswith("num_batches_tracked")}
    assert_close(
        {n: t for n, t in state.items() if n not in counters}, {n: expected[n] for n in expected if n not in counters}
    )
    for name in counters:
        assert torch.equal(state[name], expected[name]), "buffers move exactly once per micro-batch"
    assert pipe.delays() == {k: Counter(delays) for k, delays in enumerate(want.delays)}
    return pipe


OPTIMIZERS = {
    "sgd": (sgd, oracles.Sgd(momentum=0.9, decay=0.01)),
    "adamw": (adamw, oracles.AdamW(decay=0.01)),
}
