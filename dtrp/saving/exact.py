"""Exact checkpoints: one stage between two steps, with its micro-batches in flight, and the same stage again.

A graph cannot be written down. It is made again from what it was made of: the input, the version of the weights, the
random draws, which depend on the micro-batch alone, and the buffers that it has read (`dtrp.stage.buffers`). What that
forward does to buffers is discarded: they have moved already.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..comm.message import Note
from ..engine.base import Progress
from ..predict import BuiltInPredictor
from ..schedule import Position
from ..stage import buffers
from ..stage.stage import Stage
from ..stage.stash import MicroBatch, StashEntry
from ..stage.weight_versions import WeightVersion
from ..tensors import module_buffers
from ..tensors.autocast import AutocastState
from ..tensors.pytree import flatten
from ..tensors.torch_private import non_persistent_buffers
from ..typing import Json
from . import checks
from .coding import DTYPES, Decoder, Encoder
from .manifest import CheckpointError, is_count

_OLD_NOTE = 7  # entries of a note before there were weights
COMMON = ("parameters", "optimizer", "optimizer_type", "scheduler")  # what replicas have in common


def encode_stage(encoder: Encoder, stage: Stage, progress: Progress) -> dict[str, Json]:
    """The stage as JSON; its tensors go to the encoder.

    Replicas have the same weights and optimizers, so that the first alone writes them.

    Raises:
        CheckpointError: it holds what no checkpoint can.
    """

    def encode(value: Any, name: str) -> Json:
        return encoder.encode(value, f"stage{stage.index}.replica{stage.replica}.{name}")

    stage.finish_weights()  # the same bits as later, and no graph's leavings to write down
    versions = list({id(held.weights): held.weights for held in stage.stash if held.weights is not None}.values())
    numbers = {id(version): i for i, version in enumerate(versions)}
    shared = {id(version): list(key) for key, version in stage.versions.shared.items()}
    ahead = stage.repeatable.ahead
    if ahead is not None:
        ahead.follow(module_buffers.buffers_of(stage.whole))
    part: dict[str, Json] = {
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
            {"key": shared.get(id(v)), "tensors": encode(v.tensors, f"version.{i}")} for i, v in enumerate(versions)
        ],
        "stash": [_encode_held(*pair, numbers, encode) for pair in zip(stage.stash, _buffers_read(stage), strict=True)],
        "predictor": encode(_predictor_state(stage), "predictor"),
        "num_updates": progress.num_updates,
        "next_microbatch": progress.next_microbatch,
        "position": _encode_position(progress.position),
        "notes": [list(note) for note in progress.notes],
        "samples": progress.samples,
        "arrived": encode(progress.gradients, "arrived"),
        "keywords": encode(progress.keywords, "keywords"),
    }
    if stage.replica == 0:
        parameters = {name: p.detach() for name, p in stage.whole.named_parameters()}
        part["parameters"] = encode(parameters, "parameter")
        part["optimizer"] = encode(stage.optimizer.state_dict() if stage.optimizer else None, "optimizer")
        part["optimizer_type"] = type(stage.optimizer).__name__
        part["scheduler"] = encode(stage.lr_scheduler.state_dict() if stage.lr_scheduler else None, "scheduler")
    return part


def _encode_position(position: Position) -> list[Json]:
    """Of whole backwards as older checkpoints have it; of those in two parts with the place in the cycle and the next W."""
    counts: list[Json] = [*position[:3], list(position.left)]
    return counts if position.next_weights is None else [*counts, position.place, position.next_weights]


def _named_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """The buffers of a module, a shared one once, and None for those that are no tensors."""
    no_tensors = {slot: None for slot, buffer in module_buffers.buffers_of(module).items() if buffer is None}
    return {**dict(module.named_buffers()), **_by_name(module, no_tensors)}


def _by_name(module: nn.Module, values: dict[module_buffers.Slot, Any]) -> dict[str, Any]:
    names = module_buffers.names_of(module, values)
    return {names[slot]: value for slot, value in values.items()}


def _buffers_read(stage: Stage) -> list[dict[str, Any]]:
    """The buffers that the graph of each micro-batch in the stash has read and that are no longer there, by name."""
    if not any(held.has_graph and stage.trains for held in stage.stash):
        return [{} for _ in stage.stash]
    cure = "call pipe.flush() before pipe.save(), or save with portable=True"
    if _extra_state(stage.whole):
        raise CheckpointError(
            f"stage {stage.index} has graphs in flight and a module with get_extra_state(), which they may have read and a "
            f"checkpoint has only as it is now; {cure}"
        )
    try:
        met = [held.met or buffers.BuffersRead() for held in stage.stash]
        entries = buffers.values_met(met, module_buffers.buffers_of(stage.whole))
    except buffers.Overwritten as error:
        (name,) = module_buffers.names_of(stage.whole, [error.slot]).values()
        raise CheckpointError(
            f"the buffer {name} of stage {stage.index} has been written between steps, and graphs in flight have met it as it "
            f"was; {cure}"
        ) from None
    return [_by_name(stage.whole, entry) for entry in entries]


def _encode_held(
    held: StashEntry, met: dict[str, Any], numbers: dict[int, int], encode: Callable[[Any, str], Json]
) -> dict[str, Json]:
    """A micro-batch of the stash as JSON; ``numbers`` numbers the versions of weights by id."""
    m = held.micro.index
    return {
        "micro": [m, held.micro.minibatch, held.micro.share, _as_json(held.micro.weight)],
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


def _as_json(weight: float | None) -> float | None:
    """A micro-batch's part of the loss; JSON has no nan."""
    return -1.0 if weight is not None and math.isnan(weight) else weight


def _from_json(weight: list[float | None]) -> float | None:
    """The same back; older checkpoints have none."""
    return math.nan if weight == [-1.0] else weight[0] if weight else None


def _extra_state(module: nn.Module) -> dict[str, Any]:
    """What `get_extra_state` of its modules returns, by name."""
    return {name: value for name, value in module.state_dict().items() if name.endswith("_extra_state")}


def _predictor_state(stage: Stage) -> Any:
    predictor = stage.versions.predictor
    state = getattr(predictor, "state_dict", None)
    return state() if callable(state) and not isinstance(predictor, BuiltInPredictor) else None


def check_form(where: str, part: dict[str, Json]) -> None:
    """Check that the numbers of a stage's part have the right types."""
    position = part["position"]
    checks.expect(isinstance(position, list) and len(position) in (4, 6), f"the position of {where}")
    counts = [part["version"], part["num_updates"], part["next_microbatch"], *position[:3], *position[4:]]
    checks.expect_counts(counts, f"the counters of {where}", len(counts))
    for name, length in (("peaks", 2), ("skipped", None), ("samples", None)):
        checks.expect_counts(part[name], f"{name!r} of {where}", length)
    checks.expect_counts(part["position"][3], f"the position of {where}")
    checks.expect(part["keep"] in (None, "graph", "input"), f"{where} keeps {str(part['keep'])[:20]!r}")
    checks.expect(part["changes_input"] in (None, True, False), f"{where} may change its input or not")
    changed = part.get("changed", {})
    fits = isinstance(changed, dict) and set(map(type, changed.values())) <= {bool}
    checks.expect(fits, f"the buffers of {where} that have changed")
    for note in part["notes"]:
        fits = isinstance(note, list) and len(note) in (_OLD_NOTE, len(Note._fields))
        fits = fits and all(type(n) is int for n in note[:8]) and all(type(n) in (int, float) for n in note[8:])
        checks.expect(fits and note[4] > 0 and is_count(note[1]), f"a note of {where} is none")
    for entry in part["versions"]:
        if entry["key"] is not None:
            checks.expect_counts(entry["key"], f"a version of {where}", 2)
    for entry in part["stash"]:
        m, minibatch, share, *weight = entry["micro"]
        counts = [m, minibatch, entry["version"], entry["nbytes"], 0 if entry["weights"] is None else entry["weights"]]
        checks.expect_counts(counts, f"what {where} keeps", 5)
        checks.expect(type(share) in (int, float) and 0 < share <= 1, f"a share of {where} is none")
        fits = weight in ([], [None]) or (len(weight) == 1 and type(weight[0]) in (int, float) and -1 <= weight[0] <= 1)
        checks.expect(fits, f"a weight of {where} is none")
        modes = entry["modes"]
        checks.expect(isinstance(modes, str) and set(modes) <= set("ET"), f"what {where} keeps is in no mode")
        checks.expect(type(entry["has_graph"]) is bool and type(entry["autocast"][1]) is bool, f"what {where} keeps")


class SavedStage:
    """A stage's part of a checkpoint, decoded and checked against the stage; `put` makes the stage what it was.

    Args:
        decoder: has the tensors.
        part: entry of the stage and replica in the manifest; `check_form` has passed it.
        common: entries `COMMON` of the first replica of the stage.
        stage: stage to load it into, which is not touched until `put`.

    Attributes:
        progress: progress of the stage, for the engine.

    Raises:
        CheckpointError: it is another stage's.
    """

    def __init__(self, decoder: Decoder, part: dict[str, Json], common: dict[str, Json], stage: Stage) -> None:
        self._decoder, self._part, self._stage, self._where = decoder, part, stage, f"stage {stage.index}"
        self._read_tensors(common["parameters"])
        self._read_optimizer(common)
        self._read_gradients()
        self._versions = list(map(self._version, part["versions"]))
        self._stash = [(self._held(entry), entry["has_graph"]) for entry in part["stash"]]
        self.progress = self._read_progress()
        self._delays = self._decode(part["delays"])
        checks.expect(isinstance(self._delays, Counter), f"{self._where} has no delays")
        checks.expect_counts([*self._delays, *self._delays.values()], f"the delays of {self._where}")
        self._predictor = self._decode(part["predictor"])

    def _decode(self, coded: Json) -> Any:
        return self._decoder.decode(coded, self._stage.device)

    def _read_tensors(self, parameters: Json) -> None:
        """Parameters, buffers, and the state that modules have besides."""
        part, module, repeatable = self._part, self._stage.whole, self._stage.repeatable
        self._parameters, self._buffers = self._decode(parameters), self._decode(part["buffers"])
        _check_same(f"the parameters of {self._where}", dict(module.named_parameters()), self._parameters)
        current, self._changed = _named_buffers(module), part.get("changed", {})
        free = repeatable.changed() | self._changed
        for name in sorted((current.keys() ^ self._buffers.keys()) - free.keys()):
            if current.get(name) is not None or self._buffers.get(name) is not None:
                raise CheckpointError(
                    f"another model's checkpoint: {self._where} has the buffer {name} only here or only there"
                )
        self._ahead = self._decode(part.get("ahead"))
        for name, buffer in [*self._buffers.items(), *(self._ahead or {}).items()]:
            module_buffers.slot_of(module, name)
            checks.expect(isinstance(buffer, Tensor | None), f"the buffer {name} of {self._where} is no tensor")
        self._extra_state = self._decode(part["extra_state"])
        fits = isinstance(self._extra_state, dict) and self._extra_state.keys() == _extra_state(module).keys()
        checks.expect(fits, "extra_state")

    def _read_optimizer(self, common: dict[str, Json]) -> None:
        stage, where = self._stage, self._where
        if common["optimizer_type"] != type(stage.optimizer).__name__:
            raise CheckpointError(
                f"{where} was trained by {common['optimizer_type']} and this pipeline has {type(stage.optimizer).__name__}; "
                "make the pipeline with the same optimizer"
            )
        self._optimizer = optimizer = self._decode(common["optimizer"])
        self._scheduler = scheduler = self._decode(common["scheduler"])
        if stage.optimizer is not None:
            current = stage.optimizer.state_dict()
            fits = isinstance(optimizer, dict) and optimizer.keys() == current.keys()
            checks.expect(fits, f"{where} has no optimizer")
            checks.expect_same_groups(where, current["param_groups"], optimizer["param_groups"])
            members = [number for group in optimizer["param_groups"] for number in group["params"]]
            fits = members == list(range(len(members)))
            checks.expect(fits, f"the members of the groups of {where} are not in order")
            checks.expect_optimizer_state(where, optimizer["state"], set(members))
        if (scheduler is None) != (stage.lr_scheduler is None):
            raise CheckpointError(
                "the checkpoint and this pipeline differ in having a learning-rate scheduler; make both with one"
            )
        if stage.lr_scheduler is not None:
            checks.expect_alike(stage.lr_scheduler.state_dict(), scheduler, f"the scheduler of {where}")

    def _read_gradients(self) -> None:
        self._gradients, parameters = self._decode(self._part["gradients"]), self._stage.parameters
        checks.expect(isinstance(self._gradients, list), f"{self._where} has no gradients")
        if len(self._gradients) != len(parameters):
            raise CheckpointError(
                f"{self._where} has {len(parameters)} trained parameters, the checkpoint {len(self._gradients)}"
            )
        for p, gradient in zip(parameters, self._gradients, strict=True):
            fits = gradient is None or (gradient.shape == p.shape and gradient.dtype == p.dtype)
            checks.expect(fits, f"a gradient of {self._where} is not of its parameter")

    def _version(self, entry: dict[str, Json]) -> tuple[tuple[int, int] | None, WeightVersion]:
        """A version of the weights, with its key among those that micro-batches share."""
        version, tensors = WeightVersion(self._stage.parameters), self._decode(entry["tensors"])
        if [t.shape for t in tensors] != [t.shape for t in version.tensors]:
            raise CheckpointError(f"a stashed version of {self._where} has other shapes than its parameters")
        version.copy_from(tensors)
        return tuple(entry["key"]) if entry["key"] else None, version

    def _held(self, entry: dict[str, Json]) -> StashEntry:
        """A micro-batch of the stash, without its graph."""
        stage = self._stage
        leaf, target = self._decode(entry["leaf"]), self._decode(entry["target"])
        try:
            flatten([leaf, target])
        except TypeError:
            raise CheckpointError(f"an input of {self._where} is none") from None
        met = None
        if entry["has_graph"]:
            moved = self._decode(entry["met"]).items()
            met = buffers.BuffersRead({module_buffers.slot_of(stage.whole, name): value for name, value in moved})
            fits = all(value is buffers.ABSENT or isinstance(value, Tensor | None) for value in met.moved.values())
            checks.expect(fits, f"a buffer that {self._where} has met is none")
        fits = len(entry["modes"]) == len(list(stage.module.modules()))
        fits = fits or (not entry["modes"] and not (entry["has_graph"] and stage.trains))
        checks.expect(fits, f"what {self._where} keeps is not of its modules")
        device_type, enabled, dtype = entry["autocast"]
        m, minibatch, share, *weight = entry["micro"]
        return StashEntry(
            MicroBatch(m, minibatch, share, _from_json(weight)),
            entry["version"],
            AutocastState(str(device_type), enabled, DTYPES[dtype]),
            leaf,
            entry["nbytes"],
            target,
            None if entry["weights"] is None else self._versions[entry["weights"]][1],
            modes=tuple(letter == "T" for letter in entry["modes"]),
            met=met,
        )

    def _read_progress(self) -> Progress:
        part = self._part
        forward, backward, update, left, *place = part["position"]
        arrived, keywords = self._decode(part["arrived"]), self._decode(part["keywords"])
        fits = isinstance(arrived, list) and all(map(_is_gradient, arrived))
        checks.expect(fits, f"what has arrived at {self._where} are no gradients")
        fits = isinstance(keywords, list) and len(keywords) in (0, len(part["notes"]))
        fits = fits and all(type(k) is dict for k in keywords)
        checks.expect(fits, f"the keyword arguments of {self._where} are none")
        notes, position = (
            [Note(*note) for note in part["notes"]],
            Position(forward, backward, update, tuple(left), *place),
        )
        counted = part["num_updates"], part["next_microbatch"]
        return Progress(*counted, position, notes, list(part["samples"]), arrived, keywords)

    @torch.no_grad()
    def put(self, seed: int) -> None:
        """Make the stage what it was."""
        stage, part = self._stage, self._part
        stage.drop()
        stage.draws.seed = seed
        for name, p in stage.whole.named_parameters():
            p.copy_(self._parameters[name])
        self._put_buffers()
        if self._extra_state:
            stage.whole.load_state_dict(self._extra_state, strict=False)
        self._put_optimizer()
        keep = part["keep"]
        if keep is not None and stage.method.keep != keep:
            stage.method = stage.method.keeping(keep)
            stage.recomputes = stage.trains and stage.method.recomputes(stage.num_stages, stage.index)
        stage.has_decided = keep is not None
        stage.delays, stage.gradients = self._delays, self._gradients
        stage.updates.skipped = list(part["skipped"])
        stage.stash_peak, stage.activations_peak = part["peaks"]
        stage.repeatable.changes_input = part["changes_input"]
        if self._predictor is not None:
            stage.versions.predictor.load_state_dict(self._predictor)
        self._put_stash()

    def _put_optimizer(self) -> None:
        stage = self._stage
        if stage.optimizer is not None:
            stage.optimizer.load_state_dict(self._optimizer)
            # As they were: loading casts to the dtype of the parameters.
            members = [p for group in stage.optimizer.param_groups for p in group["params"]]
            for number, state in self._optimizer["state"].items():
                stage.optimizer.state[members[number]] = state
        if stage.lr_scheduler is not None:
            stage.lr_scheduler.load_state_dict(self._scheduler)

    def _put_stash(self) -> None:
        stage = self._stage
        stage.versions.shared.update((key, version) for key, version in self._versions if key is not None)
        for held, has_graph in self._stash:
            stage.restore(held, has_graph=has_graph)
        current = module_buffers.buffers_of(stage.whole)
        for held, _ in self._stash:
            if held.met is not None:
                held.met.before = held.met.after = buffers.marks(current)
        if self._ahead is not None:
            shared: dict[int, Tensor | None] = {}
            ahead: module_buffers.Buffers = {
                module_buffers.slot_of(stage.whole, name): value for name, value in self._ahead.items()
            }
            for slot in ahead.keys() & current.keys():
                if current[slot] is not None:
                    ahead[slot] = shared.setdefault(id(current[slot]), ahead[slot])
            stage.repeatable.ahead = buffers.BufferState(ahead, seen=buffers.marks(current))

    def _put_buffers(self) -> None:
        module, saved = self._stage.whole, self._buffers
        current = module_buffers.buffers_of(module)
        names, first = module_buffers.names_of(module, current), dict[int, str]()
        values: module_buffers.Buffers = {}
        for slot, name in names.items():
            shared = name if current[slot] is None else first.setdefault(id(current[slot]), name)  # is saved once
            if name in saved or shared in saved:
                values[slot] = saved[name if name in saved else shared]
            elif current[slot] is None:
                values[slot] = None
        for name in saved.keys() - set(names.values()):
            slot = module_buffers.slot_of(module, name)
            values[slot] = saved[name]
            if not self._changed.get(name, True):
                non_persistent_buffers(slot[0]).add(slot[1])
        module_buffers.write(current, values)


def _is_gradient(value: Any) -> bool:
    """Whether it is the gradient of a tensor, or a list of the gradients of several; None stands for no gradient."""
    gradients = value if isinstance(value, list) else [value]
    return all(isinstance(gradient, Tensor | None) for gradient in gradients)


def _check_same(what: str, current: dict[str, Any], saved: dict[str, Tensor]) -> None:
    for name in dict.fromkeys([*current, *saved]):
        if name not in saved or name not in current:
            raise CheckpointError(
                f"another model's checkpoint, or cut elsewhere: of {what}, {name} is only {'here' if name in current else 'there'}"
            )
        a, b = saved[name], current[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            raise CheckpointError(
                f"another model's checkpoint: {name} is {tuple(a.shape)}, {a.dtype} there and {tuple(b.shape)}, {b.dtype} here"
            )
