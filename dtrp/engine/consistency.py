"""What must be the same on every rank of a pipeline, and who says so when it is not.

When the pipeline is made: the settings, the method, and the names, shapes and dtypes of all stages' tensors, which are
compared, and the initial values and the seed, which are the first rank's. In every mini-batch: the targets, which the first
and the last rank may both be given; on an accelerator, which would be waited for, in the first few.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn

from ..comm.message import Note, memory_of
from ..comm.process_groups import backend_for, place_of
from ..comm.transport import Transport
from ..methods import Method
from ..predict import BuiltInPredictor
from ..stage.tied import Tie
from ..tensors.layout import parts_of
from ..tensors.pytree import flatten, num_samples, on_cpu

_CHECKED_BYTES = 4 * 2**20  # of a mini-batch's targets; of larger ones every n-th value


def unite(
    transport: Transport,
    modules: Sequence[nn.Module],
    device: torch.device,
    settings: dict[str, Any],
    seed: int,
    ties: Sequence[Tie] = (),
) -> int:
    """Make all ranks one pipeline: what must be the same is, the first rank's initial values are taken, and links made.

    Args:
        transport: the connections made so far.
        modules: of all stages, with their auxiliary networks.
        device: of this rank's stage.
        settings: what else must be the same on every rank, by the name of its argument.
        seed: the first rank's is everyone's.
        ties: parameters that several stages hold.

    Returns:
        The seed.

    Raises:
        ValueError: a rank differs from the first.
    """
    ranks = transport.ranks
    settings = {**settings, "method": method_values(settings["method"]), "tied parameters": [str(tie) for tie in ties]}
    own = {"settings": settings, "stages": [_fingerprint(module) for module in modules]}
    facts = transport.collectives.all_gather("Pipeline", (own, place_of(device)))
    for rank, (theirs, _) in zip(ranks.all, facts, strict=True):
        _check_alike(rank, theirs, facts[0][0])
    values = [_tensors(module) for module in modules] * ranks.num_replicas
    given = transport.collectives.scatter("Pipeline", on_cpu(values) if ranks.rank == ranks.all[0] else None)
    with torch.no_grad():
        for name, tensor in _tensors(modules[ranks.stage]).items():
            tensor.copy_(given[name])
    seed = transport.collectives.broadcast("Pipeline", seed)
    backend = backend_for([place for _, place in facts])
    trained = [tie for tie in ties if tie.trained]
    tied = [sorted({k for tie in trained for k in tie.partners(stage)}) for stage in range(ranks.num_stages)]
    transport.connect(device, backend, tied)
    return int(seed)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict([*module.named_parameters(), *module.named_buffers()])


def _fingerprint(module: nn.Module) -> dict[str, str]:
    """What a stage's tensors are, by name."""
    return {
        name: f"shape {tuple(t.shape)}, {t.dtype}, {'trained' if t.requires_grad else 'not trained'}"
        for name, t in _tensors(module).items()
    }


def method_values(method: Method) -> dict[str, Any]:
    """A method as values that can be compared; a predictor object by its name or its type."""
    values = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    if not isinstance(method.predict, (str, NoneType)):
        built_in = isinstance(method.predict, BuiltInPredictor)
        values["predict"] = method.predict.name if built_in else type(method.predict).__name__
    return values


def check_same(rank: int, theirs: dict[str, Any], first: dict[str, Any], same: str) -> None:
    """Refuse a rank whose settings differ from the first's; ``same`` says what to make the same."""
    for name, value in first.items():
        if theirs[name] != value:
            raise ValueError(f"rank {rank} has {name}={theirs[name]}, rank 0 has {value}; {same}")


def _check_alike(rank: int, theirs: dict[str, Any], first: dict[str, Any]) -> None:
    same = "make the same Pipeline on every rank"
    check_same(rank, theirs["settings"], first["settings"], same)
    for stage, (a, b) in enumerate(zip(theirs["stages"], first["stages"], strict=True)):
        for name in dict.fromkeys([*b, *a]):
            if a.get(name) != b.get(name):
                raise ValueError(
                    f"the models differ: {name} of stage {stage} is {a.get(name, 'missing')} on rank {rank}, "
                    f"{b.get(name, 'missing')} on rank 0; {same}"
                )


def checksum_of(y: Any, *, waits: bool) -> int:
    """Of the targets' values, shapes and dtypes; -1 where looking at them would hold up an accelerator, unless it ``waits``."""
    tensors, form = flatten(y)
    if not waits and any(t.device.type != "cpu" for t in tensors):
        return -1
    checksum = zlib.crc32(repr((form, [(tuple(t.shape), t.dtype) for t in tensors])).encode())
    for part in (part for t in tensors for part in parts_of(t.detach())):
        values = part.reshape(-1)
        values = values[:: max(1, values.nbytes // _CHECKED_BYTES)].contiguous().cpu()
        checksum = zlib.crc32(memory_of(values), checksum)
    return checksum


def check_targets(note: Note, y: Any, *, waits: bool) -> None:
    """Refuse targets on the last rank that are not those that the first one was given; ``waits`` as in `checksum_of`."""
    seed = (
        "seed the sampler, so that all ranks of a pipeline see the same mini-batches; a DistributedSampler deals samples out to "
        "ranks, which is for replicas alone: num_replicas=the number of replicas (1 without a mesh), rank=the replica (0)"
    )
    if num_samples(y) != note.total:
        raise ValueError(
            f"the first rank was given {note.total} samples and the last rank {num_samples(y)} targets; {seed}"
        )
    if note.checksum != -1 and checksum_of(y, waits=waits) not in (-1, note.checksum):
        raise ValueError(
            f"the first and the last rank were given different targets for mini-batch {note.minibatch}; {seed}"
        )
