"""Checks that what must be the same on every rank of a pipeline is the same.

When the pipeline is made, the ranks compare the settings, the method, and the names, shapes and dtypes of all stages'
tensors; initial values and seed are those of the first rank. In every mini-batch the targets are compared, which the
first and the last rank may both be given; on an accelerator, which would have to be waited for, only in the first few.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn

from ..comm.message import Note, memory_of
from ..comm.process_groups import backend_for, place_of
from ..comm.transport import Transport
from ..methods import Method
from ..predict import BuiltInPredictor, StatefulPredictor
from ..stage.tied import Tie
from ..tensors.layout import parts_of
from ..tensors.pytree import flatten, num_samples, on_cpu, targets_fit
from ..typing import Tree

_CHECKED_BYTES = 4 * 2**20  # of a mini-batch's targets; of larger ones every n-th value


def make_consistent(
    transport: Transport,
    modules: Sequence[nn.Module],
    device: torch.device,
    settings: Mapping[str, Any],
    seed: int,
    ties: Sequence[Tie] = (),
) -> int:
    """Compare the ranks of a pipeline, take the first rank's initial values and seed, and connect them for training.

    Args:
        transport: the connections made so far.
        modules: all stages, with their auxiliary networks.
        device: of this rank's stage.
        settings: what else must be the same on every rank, by the name of its argument.
        seed: of the pipeline, as this rank has it.
        ties: parameters that several stages hold.

    Returns:
        The first rank's seed.

    Raises:
        ValueError: a rank differs from the first.
    """
    ranks, collectives = transport.ranks, transport.collectives
    settings = {**settings, "tied parameters": [str(tie) for tie in ties]}
    described = {"settings": settings, "stages": [_described(module) for module in modules]}
    gathered = collectives.all_gather("Pipeline", (described, place_of(device)))
    for rank, (theirs, _) in zip(ranks.all, gathered, strict=True):
        _check_rank(rank, theirs, gathered[0][0])
    values = [_tensors(module) for module in modules] * ranks.num_replicas
    given = collectives.scatter("Pipeline", on_cpu(values) if ranks.rank == ranks.all[0] else None)
    with torch.no_grad():
        for name, tensor in _tensors(modules[ranks.stage]).items():
            tensor.copy_(given[name])
    seed = collectives.broadcast("Pipeline", seed)
    trained = [tie for tie in ties if tie.trained]
    tied_stages = [sorted({k for tie in trained for k in tie.partners(stage)}) for stage in range(ranks.num_stages)]
    transport.connect(device, backend_for([place for _, place in gathered]), tied_stages)
    return seed


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict([*module.named_parameters(), *module.named_buffers()])


def _described(module: nn.Module) -> dict[str, str]:
    """Shape and dtype of a stage's tensors, by name."""
    return {
        name: f"shape {tuple(t.shape)}, {t.dtype}, {'trained' if t.requires_grad else 'not trained'}"
        for name, t in _tensors(module).items()
    }


def method_values(method: Method) -> dict[str, Any]:
    """The fields of a method as values that can be compared; a predictor object by its name or its type."""
    values = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    values |= {name: list(value) for name, value in values.items() if isinstance(value, tuple)}
    if not isinstance(method.predict, (str, NoneType)):
        built_in = isinstance(method.predict, (BuiltInPredictor, StatefulPredictor))
        values["predict"] = method.predict.name if built_in else type(method.predict).__name__
    return values


def check_same(rank: int, theirs: Mapping[str, Any], first: Mapping[str, Any], advice: str) -> None:
    """Refuse a rank whose settings differ from the first rank's; ``advice`` says what to make the same."""
    for name, value in first.items():
        if theirs[name] != value:
            raise ValueError(f"rank {rank} has {name}={theirs[name]}, rank 0 has {value}; {advice}")


def _check_rank(rank: int, theirs: Mapping[str, Any], first: Mapping[str, Any]) -> None:
    advice = "make the same Pipeline on every rank"
    check_same(rank, theirs["settings"], first["settings"], advice)
    for stage, (a, b) in enumerate(zip(theirs["stages"], first["stages"], strict=True)):
        for name in dict.fromkeys([*b, *a]):
            if a.get(name) != b.get(name):
                raise ValueError(
                    f"the models differ: {name} of stage {stage} is {a.get(name, 'missing')} on rank {rank}, "
                    f"{b.get(name, 'missing')} on rank 0; {advice}"
                )


def checksum_of(y: Tree, *, waits: bool) -> int:
    """A checksum of the values, shapes and dtypes of targets.

    Args:
        y: the targets of a mini-batch.
        waits: whether to wait for an accelerator; otherwise the checksum of targets on one is -1.
    """
    tensors, form = flatten(y)
    if not waits and any(t.device.type != "cpu" for t in tensors):
        return -1
    checksum = zlib.crc32(repr((form, [(tuple(t.shape), t.dtype) for t in tensors])).encode())
    for part in (part for t in tensors for part in parts_of(t.detach())):
        values = part.reshape(-1)
        values = values[:: max(1, values.nbytes // _CHECKED_BYTES)].contiguous().cpu()
        checksum = zlib.crc32(memory_of(values), checksum)
    return checksum


def check_targets(note: Note, y: Tree, num_microbatches: int, *, waits: bool) -> None:
    """Refuse targets on the last rank that differ from the first rank's.

    Args:
        note: what the first rank's message says of the mini-batch.
        y: the targets that the last rank was given.
        num_microbatches: A.
        waits: as in `checksum_of`.
    """
    advice = (
        "seed the sampler, so that all ranks of a pipeline see the same mini-batches; a DistributedSampler deals samples out to "
        "ranks, which is for replicas alone: num_replicas=the number of replicas (1 without a mesh), rank=the replica (0)"
    )
    if not targets_fit(note.total, num_samples(y), num_microbatches):
        raise ValueError(
            f"the first rank was given {note.total} samples and the last rank {num_samples(y)} targets; {advice}"
        )
    if note.checksum != -1 and checksum_of(y, waits=waits) not in (-1, note.checksum):
        raise ValueError(
            f"the first and the last rank were given different targets for mini-batch {note.minibatch}; {advice}"
        )
