"""A run that is saved and loaded, and what two runs are compared by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from helpers import adamw, assert_same, minibatches, network, pipeline, sgd
from torch import Tensor


def data() -> list[tuple[Tensor, Tensor]]:
    """Ten mini-batches, one of them with unequal parts, another partial."""
    own = minibatches(10)
    own[3] = (own[3][0][:11], own[3][1][:11])
    return own


def run(
    method: Any,
    num_stages: int,
    parts: int,
    optimizer: str,
    folder: Path,
    stops: tuple[int, ...] = (),
    model: Any = None,
    **more: Any,
) -> tuple[list[Tensor], dict[str, Any], Any]:
    """Losses, state and delays of a run with a flush in the middle, taken up by another pipeline at each of ``stops``."""
    make = model or network
    options = {"num_stages": num_stages, "method": method, "num_microbatches": parts, **more}
    torch.manual_seed(0)
    pipe = pipeline(make(), OPTIMIZERS[optimizer], **options)
    losses = []
    for i, (x, y) in enumerate(data()):
        if i in stops:
            pipe.save(folder, extra={"next": i})
            torch.manual_seed(5)
            pipe = pipeline(make(), OPTIMIZERS[optimizer], **options)
            assert pipe.load(folder) == {"next": i}
        if i == 6:
            pipe.flush()
        loss = pipe.step(x, y)
        assert loss is not None
        losses.append(loss)
    pipe.flush()
    return losses, pipe.state_dict(), pipe.delays()


def check_equal(a: tuple[list[Tensor], dict[str, Any], Any], b: tuple[list[Tensor], dict[str, Any], Any]) -> None:
    for n, (x, y) in enumerate(zip(a[0], b[0], strict=True)):
        assert torch.equal(x, y), f"loss {n}: {x} and {y}"
    assert a[1].keys() == b[1].keys()
    for x, y in [(a[1], b[1]), *([(a[1]["aux"], b[1]["aux"])] if "aux" in a[1] else [])]:
        assert_same(x["model"], y["model"])
        check_states(x["optimizer"]["state"], y["optimizer"]["state"])
        assert x["optimizer"]["param_groups"] == y["optimizer"]["param_groups"]
    assert a[1]["scheduler"] == b[1]["scheduler"]
    assert a[2] == b[2]


def check_states(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert_same(a[name], b[name])


OPTIMIZERS = {"sgd": sgd, "adamw": adamw}
