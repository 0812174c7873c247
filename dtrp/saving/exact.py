"""One stage as it is between two steps, with what is in flight; and the same stage again.

A graph cannot be written down. It is made again from what it was made of: the input, the version of the weights, and the
random draws, which depend on the micro-batch alone, and the buffers that it met (`dtrp.stage.buffers`). What that forward does to
buffers is discarded: they have moved.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..comm.message import Note
from ..engine.base import Progress
from ..predict import BuiltInPredictor
from ..schedule import Position
from ..stage.buffers import (
    ABSENT,
    Buffers,
    Elsewhere,
    Met,
    Overwritten,
    Slot,
    buffers_of,
    marks,
    names_of,
    slot_of,
    values_met,
    write,
)
from ..stage.stage import Stage
from ..stage.stash import Held, MicroBatch, WeightVersion
from ..tensors.autocast import AutocastState
from ..tensors.pytree import flatten
from . import checks
from .coding import DTYPES, Decoder, Encoder
from .manifest import CheckpointError, is_count


def encode_stage(encoder: Encoder, stage: Stage, progress: Progress) -> dict[str, Any]:
    """The stage as JSON, its tensors in the encoder.

    Replicas have the same weights and optimizers, so the first alone writes them; the rest is each one's own.

    Raises:
        CheckpointError: it holds what no checkpoint can.
    """
    key = f"stage{stage.index}.replica{stage.replica}"

    def encode(value: Any, name: str) -> Any:
        return encoder.encode(value, f"{key}.{name}")

    versions = {id(held.weights): held.weights for held in stage.stash if held.weights is not None}
    numbers = {number: i for i, number in enumerate(versions)}
    shared = {id(version): k for k, version in stage.versions.shared.items()}
    parameters, ahead = dict(stage.whole.named_parameters()), stage.repeatable.ahead
    if ahead is not None:
        ahead.follow(buffers_of(stage.whole))
    part: dict[str, Any] = {
        "version": stage.version,
        "keep": stage.method.keep if stage.has_decided else None,
        "changes_input": stage.repeatable.changes_input,
        "skipped": list(stage.updates.skipped),
        "delays": encode(stage.delays, "delays"),
        "peaks": [stage.stash_peak, stage.activations_peak],
        "buffers": encode(_named_buffers(stage.whole), "buffer"),
        "changed": stage.repeatable.changed(),
        "ahead": None if ahead is None else encode(_by_name(stage.whole, ahead.buffers), "ahead"),
        "extra_state": encode(_extra_state(stage.whole), "extra_state"),
        "gradients": encode(list(stage.gradients), "gradient"),
        "versions": [
            {"key": list(shared[id(v)]) if id(v) in shared else None, "tensors": encode(v.tensors, f"version.{i}")}
            for i, v in enumerate(versions.values())
        ],
        "stash": [_encode_held(held, met, numbers, encode) for held, met in zip(stage.stash, _met(stage), strict=True)],
        "predictor": encode(_predictor_state(stage), "predictor"),
        "num_updates": progress.num_updates,
        "next_microbatch": progress.next_microbatch,
        "position": [*progress.position[:3], list(progress.position.left)],
        "notes": [list(note) for note in progress.notes],
        "samples": progress.samples,
        "arrived": encode(progress.gradients, "arrived"),
        "keywords": encode(progress.keywords, "keywords"),
    }
    if stage.replica == 0:
        part["parameters"] = encode({name: p.detach() for name, p in parameters.items()}, "parameter")
        part["optimizer"] = encode(stage.optimizer.state_dict() if stage.optimizer else None, "optimizer")
        part["optimizer_type"] = type(stage.optimizer).__name__
        part["scheduler"] = encode(stage.lr_scheduler.state_dict() if stage.lr_scheduler else None, "scheduler")
    return part


def _named_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """Those of a module: a shared one once, and those that are no tensors."""
    buffers = buffers_of(module)
    return {**dict(module.named_buffers()), **_by_name(module, {s: None for s, b in buffers.items() if b is None})}


def _by_name(module: nn.Module, values: dict[Slot, Any]) -> dict[str, Any]:
    names = names_of(module, values)
    return {names[slot]: value for slot, value in values.items()}


def _met(stage: Stage) -> list[dict[str, Any]]:
    """What each entry of the stash must meet when its graph is made again, and is not there now."""
    entries = [held.met or Met() for held in stage.stash]
    if not any(held.has_graph and stage.trains for held in stage.stash):
        return [{} for _ in entries]
    cure = "call pipe.flush() before pipe.save(), or save with portable=True"
    if _extra_state(stage.whole):
        raise CheckpointError(
            f"stage {stage.index} has graphs in flight and a module with get_extra_state(), which they may have read and a "
            f"checkpoint has only as it is now; {cure}"
        )
    try:
        return [_by_name(stage.whole, met) for met in values_met(entries, buffers_of(stage.whole))]
    except Overwritten as error:
        (name,) = names_of(stage.whole, [error.slot]).values()
        raise CheckpointError(
            f"the buffer {name} of stage {stage.index} has been written between steps, and graphs in flight have met it as it "
            f"was; {cure}"
        ) from None


def _encode_held(
    held: Held, met: dict[str, Any], numbers: dict[int, int], encode: Callable[[Any, str], Any]
) -> dict[str, Any]:
    m = held.micro.index
    return {
        "micro": [m, held.micro.minibatch, held.micro.share],
        "version": held.version,
        "autocast": [held.autocast.device_type, held.autocast.enabled, str(held.autocast.dtype).removeprefix("torch.")],
        "leaf": encode(held.leaf, f"input.{m}"),
        "nbytes": held.nbytes,
        "target": encode(held.target, f"target.{m}"),
        "weights": None if held.weights is None else numbers[id(held.weights)],
        "has_graph": held.has_graph,
        "met": encode(met, f"met.{m}"),
        "modes": "".join("ET"[mode] for mode in held.modes),
    }


def _extra_state(module: nn.Module) -> dict[str, Any]:
    """What `get_extra_state` of its modules says, by name."""
    return {name: value for name, value in module.state_dict().items() if name.endswith("_extra_state")}


def _predictor_state(stage: Stage) -> Any:
    own = stage.versions.predictor
    if own is None or isinstance(own, BuiltInPredictor):
        return None
    state = getattr(own, "state_dict", None)
    return state() if callable(state) else None


def decode_stage(decoder: Decoder, part: dict[str, Any], common: dict[str, Any], stage: Stage) -> StageParts:
    """Everything of a stage that `encode_stage` wrote, checked against it; the stage is not touched.

    Args:
        decoder: has its tensors.
        part: what was written.
        common: what the first replica wrote of the same stage.
        stage: to load it into.

    Raises:
        CheckpointError: it is another stage's.
    """
    where = f"stage {stage.index}"

    def decode(coded: Any, device: torch.device = stage.device) -> Any:
        return decoder.decode(coded, device)

    parameters, buffers = decode(common["parameters"]), decode(part["buffers"])
    _check_same(f"the parameters of {where}", dict(stage.whole.named_parameters()), parameters)
    own_buffers = _named_buffers(stage.whole)
    changed = part.get("changed", {})
    free = stage.repeatable.changed() | changed
    for name in sorted(own_buffers.keys() ^ buffers.keys()):
        if name not in free and (own_buffers.get(name) is not None or buffers.get(name) is not None):
            raise CheckpointError(f"another model's checkpoint: {where} has the buffer {name} only here or only there")
    ahead = decode(part.get("ahead"))
    for name, buffer in [*buffers.items(), *(ahead or {}).items()]:
        slot_of(stage.whole, name)
        checks.expect(isinstance(buffer, Tensor | None), f"the buffer {name} of {where} is no tensor")
    if common["optimizer_type"] != type(stage.optimizer).__name__:
        raise CheckpointError(
            f"{where} was trained by {common['optimizer_type']} and this pipeline has {type(stage.optimizer).__name__}; "
            "make the pipeline with the same optimizer"
        )
    optimizer, scheduler = decode(common["optimizer"]), decode(common["scheduler"])
    if stage.optimizer is not None:
        own_state = stage.optimizer.state_dict()
        checks.expect(isinstance(optimizer, dict) and optimizer.keys() == own_state.keys(), f"{where} has no optimizer")
        checks.groups(where, own_state["param_groups"], optimizer["param_groups"])
        saved_groups = optimizer["param_groups"]
        members = [number for group in saved_groups for number in group["params"]]
        checks.expect(members == list(range(len(members))), f"the members of the groups of {where} are not in order")
        checks.entries(where, optimizer["state"], set(members))
    if (scheduler is None) != (stage.lr_scheduler is None):
        raise CheckpointError(
            "the checkpoint and this pipeline differ in having a learning-rate scheduler; make both with one"
        )
    if stage.lr_scheduler is not None:
        checks.alike(stage.lr_scheduler.state_dict(), scheduler, f"the scheduler of {where}")
    gradients = decode(part["gradients"])
    checks.expect(isinstance(gradients, list), f"{where} has no gradients")
    if len(gradients) != len(stage.parameters):
        raise CheckpointError(
            f"{where} has {len(stage.parameters)} trained parameters, the checkpoint {len(gradients)}"
        )
    for p, gradient in zip(stage.parameters, gradients, strict=True):
        fits = gradient is None or (gradient.shape == p.shape and gradient.dtype == p.dtype)
        checks.expect(fits, f"a gradient of {where} is not of its parameter")
    versions = []
    for entry in part["versions"]:
        version = WeightVersion(stage.parameters)
        tensors = decode(entry["tensors"])
        if [t.shape for t in tensors] != [t.shape for t in version.tensors]:
            raise CheckpointError(f"a stashed version of {where} has other shapes than its parameters")
        version.copy_from(tensors)
        versions.append((tuple(entry["key"]) if entry["key"] else None, version))
    stash = []
    for entry in part["stash"]:
        device_type, enabled, dtype = entry["autocast"]
        leaf, target = decode(entry["leaf"]), decode(entry["target"])
        try:
            flatten([leaf, target])
        except TypeError:
            raise CheckpointError(f"an input of {where} is none") from None
        held = Held(
            MicroBatch(*entry["micro"]),
            entry["version"],
            AutocastState(str(device_type), enabled, DTYPES[dtype]),
            leaf,
            entry["nbytes"],
            target,
            None if entry["weights"] is None else versions[entry["weights"]][1],
            met=Met({slot_of(stage.whole, name): value for name, value in decode(entry["met"]).items()})
            if entry["has_graph"]
            else None,
        )
        checks.expect(
            len(entry["modes"]) == len(list(stage.module.modules()))
            or (not entry["modes"] and not (entry["has_graph"] and stage.trains)),
            f"what {where} keeps is not of its modules",
        )
        held.modes = tuple(letter == "T" for letter in entry["modes"])
        for value in held.met.moved.values() if held.met is not None else ():
            checks.expect(value is ABSENT or isinstance(value, Tensor | None), f"a buffer that {where} has met is none")
        stash.append((held, bool(entry["has_graph"])))
    forward, backward, update, left = part["position"]
    progress = Progress(
        part["num_updates"],
        part["next_microbatch"],
        Position(forward, backward, update, tuple(left)),
        [Note(*note) for note in part["notes"]],
        list(part["samples"]),
        decode(part["arrived"]),
        decode(part["keywords"]),
    )
    arrived, delays, extra_state = progress.gradients, decode(part["delays"]), decode(part["extra_state"])
    checks.expect(
        isinstance(arrived, list) and all(map(_is_gradient, arrived)), f"what has arrived at {where} are no gradients"
    )
    keywords = progress.keywords
    fits = isinstance(keywords, list) and len(keywords) in (0, len(progress.notes))
    checks.expect(fits and all(type(k) is dict for k in keywords), f"the keyword arguments of {where} are none")
    checks.expect(isinstance(delays, Counter), f"{where} has no delays")
    checks.counts([*delays, *delays.values()], f"the delays of {where}")
    checks.expect(
        isinstance(extra_state, dict) and extra_state.keys() == _extra_state(stage.whole).keys(), "extra_state"
    )
    return StageParts(
        stage, part, parameters, buffers, changed, ahead, extra_state, optimizer, scheduler, gradients, versions, stash,
        delays, decode(part["predictor"]), progress,
    )  # fmt: skip


def _is_gradient(value: Any) -> bool:
    """Of a tensor, or of the tensors of a tree; None where there is none."""
    each = value if isinstance(value, list) else [value]
    return all(g is None or isinstance(g, torch.Tensor) for g in each)


def check_form(where: str, part: dict[str, Any]) -> None:
    """The numbers of a stage's part, each of its type."""
    counts = [part["version"], part["num_updates"], part["next_microbatch"], *part["position"][:3]]
    checks.counts(counts, f"the counters of {where}", 6)
    for name, length in (("peaks", 2), ("skipped", None), ("samples", None)):
        checks.counts(part[name], f"{name!r} of {where}", length)
    checks.counts(part["position"][3], f"the position of {where}")
    checks.expect(part["keep"] in (None, "graph", "input"), f"{where} keeps {str(part['keep'])[:20]!r}")
    checks.expect(part["changes_input"] in (None, True, False), f"{where} may change its input or not")
    changed = part.get("changed", {})
    fits = isinstance(changed, dict) and set(map(type, changed.values())) <= {bool}
    checks.expect(fits, f"the buffers of {where} that have changed")
    for note in part["notes"]:
        fits = isinstance(note, list) and len(note) == len(Note._fields) and all(type(n) is int for n in note)
        checks.expect(fits and note[4] > 0 and is_count(note[1]), f"a note of {where} is none")
    for entry in part["versions"]:
        if entry["key"] is not None:
            checks.counts(entry["key"], f"a version of {where}", 2)
    for entry in part["stash"]:
        m, minibatch, share = entry["micro"]
        checks.counts([m, minibatch, entry["version"], entry["nbytes"]], f"what {where} keeps", 4)
        checks.expect(type(share) in (int, float) and 0 < share <= 1, f"a share of {where} is none")
        modes = entry["modes"]
        checks.expect(isinstance(modes, str) and set(modes) <= set("ET"), f"what {where} keeps is in no mode")
        checks.expect(type(entry["has_graph"]) is bool and type(entry["autocast"][1]) is bool, f"what {where} keeps")
        if entry["weights"] is not None:
            checks.counts([entry["weights"]], f"a version of {where}", 1)


@dataclasses.dataclass
class StageParts:
    """A stage's parts, ready to be put in place."""

    stage: Stage
    part: dict[str, Any]
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor | None]
    changed: dict[str, bool]
    ahead: dict[str, Tensor | None] | None
    extra_state: dict[str, Any]
    optimizer: Any
    scheduler: Any
    gradients: list[Tensor | None]
    versions: list[tuple[Any, WeightVersion]]
    stash: list[tuple[Held, bool]]
    delays: Counter[int]
    predictor: Any
    progress: Progress

    @torch.no_grad()
    def put(self, seed: int) -> None:
        """Make the stage what it was."""
        stage = self.stage
        stage.drop()
        stage.draws.seed = seed
        for name, p in stage.whole.named_parameters():
            p.copy_(self.parameters[name])
        self._put_buffers(stage.whole)
        if self.extra_state:
            stage.whole.load_state_dict(self.extra_state, strict=False)
        if stage.optimizer is not None:
            stage.optimizer.load_state_dict(self.optimizer)
            # As they were: loading casts to the dtype of the parameters.
            members = [p for group in stage.optimizer.param_groups for p in group["params"]]
            for number, state in self.optimizer["state"].items():
                stage.optimizer.state[members[number]] = state
        if stage.lr_scheduler is not None:
            stage.lr_scheduler.load_state_dict(self.scheduler)
        stage.keep_as(self.part["keep"])
        stage.delays = self.delays
        stage.updates.skipped = list(self.part["skipped"])
        stage.stash_peak, stage.activations_peak = self.part["peaks"]
        stage.repeatable.changes_input = self.part["changes_input"]
        stage.gradients = self.gradients
        if self.predictor is not None:
            stage.versions.predictor.load_state_dict(self.predictor)  # type: ignore[union-attr]
        for key, version in self.versions:
            if key is not None:
                stage.versions.shared[key] = version
        for held, had_graph in self.stash:
            stage.restore(held, has_graph=had_graph)
        own = buffers_of(stage.whole)
        for held, _ in self.stash:
            if held.met is not None:
                held.met.before = held.met.after = marks(own)
        if self.ahead is not None:
            shared: dict[int, Tensor | None] = {}
            ahead = {slot_of(stage.whole, name): value for name, value in self.ahead.items()}
            for slot in ahead.keys() & own.keys():
                if own[slot] is not None:
                    ahead[slot] = shared.setdefault(id(own[slot]), ahead[slot])
            stage.repeatable.ahead = Elsewhere(ahead, seen=marks(own))

    def _put_buffers(self, module: nn.Module) -> None:
        own = buffers_of(module)
        names, first = names_of(module, own), dict[int, str]()
        values: Buffers = {}
        for slot, name in names.items():
            shared = name if own[slot] is None else first.setdefault(id(own[slot]), name)  # is saved once
            if name in self.buffers or shared in self.buffers:
                values[slot] = self.buffers[name if name in self.buffers else shared]
            elif own[slot] is None:
                values[slot] = None
        for name in self.buffers.keys() - set(names.values()):
            slot = slot_of(module, name)
            values[slot] = self.buffers[name]
            if not self.changed.get(name, True):
                slot[0]._non_persistent_buffers_set.add(slot[1])
        write(own, values)


def _check_same(what: str, own: dict[str, Any], saved: dict[str, Tensor]) -> None:
    for name in dict.fromkeys([*own, *saved]):
        if name not in saved or name not in own:
            raise CheckpointError(
                f"another model's checkpoint, or cut elsewhere: of {what}, {name} is only {'here' if name in own else 'there'}"
            )
        if own[name].shape != saved[name].shape or own[name].dtype != saved[name].dtype:
            raise CheckpointError(
                f"another model's checkpoint: {name} is {tuple(saved[name].shape)}, {saved[name].dtype} there and "
                f"{tuple(own[name].shape)}, {own[name].dtype} here"
            )
