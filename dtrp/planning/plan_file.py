"""The plan: what `dtrp.plan` chose, and the small file that people read and edit."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from torch import nn

from ..atomic_file import whole_file
from ..errors import PlanError
from ..methods import Keep, Method, get_method, list_methods
from ..schedule import steady_delay
from ..splitting.stages import layers_of
from ..typing import Json
from ..validation import is_number, is_whole

_FORMAT = 2  # 1: without spreads and verdict
Verdict = Literal["pipeline", "one worker"]


@dataclass(frozen=True)
class StagePlan:
    """One stage of a plan.

    Attributes:
        layers: names of its layers.
        keep: what it keeps from a forward to its backward.
        slot_s: seconds for a mini-batch, of its work or of its slower link.
        memory_bytes: bytes that it holds at most.
        utilization: share of the time in which it works.
        weight_share: share of its backward that is the gradients of its weights, for which nobody waits; None: the
            backward is whole.
    """

    layers: tuple[str, ...]
    keep: Keep
    slot_s: float
    memory_bytes: int
    utilization: float
    weight_share: float | None = None


@dataclass(frozen=True)
class Choice:
    """What one method would take for the same job, at the cuts that are best for it.

    Attributes:
        method, ahead, order: name of the method, and its order of work; ``one worker`` is backpropagation without a
            pipeline.
        num_workers, num_microbatches: K and A.
        batch_size: samples in a mini-batch.
        cuts: index of the first layer of stages 1..K-1.
        minibatch_s: predicted seconds for a mini-batch.
        samples_per_s: throughput of the whole pipeline; None: not measurable.
        memory_bytes: bytes that the worker needs which needs most.
        delay: largest delay, in updates.
        utilization: by worker, the share of the time in which it works.
        spread: interquartile range, over the rounds, of the measured time of the slowest stage, over its median; None:
            not measurable, as in fewer than four rounds, or in a plan of an older version.
        leads, orders: the method's fields of these names; None: from ``ahead`` and ``order``.
    """

    method: str
    ahead: float
    order: str
    num_workers: int
    num_microbatches: int
    batch_size: int
    cuts: tuple[int, ...]
    minibatch_s: float
    samples_per_s: float | None
    memory_bytes: int
    delay: int
    utilization: tuple[float, ...]
    spread: float | None = None
    leads: tuple[int, ...] | None = None
    orders: tuple[str, ...] | str | None = None


@dataclass(frozen=True)
class Plan:
    """Where to cut, what to keep, how large a batch, and what to expect.

    The first group of attributes is what `Pipeline` and ``dtrp train`` do, and may be edited; the rest says why.

    Attributes:
        method: name of the method.
        options: fields of the method that differ from the built-in one of its name.
        cuts: index of the first layer of stages 1..K-1.
        keep: ``"graph"`` or ``"input"`` for each stage.
        num_microbatches: A.
        batch_size: samples in a mini-batch.
        lr_scale: factor on the learning rate of the base mini-batch.
        warmup_updates: updates over which the learning rate should rise.
        model: the model planned for: ``fingerprint`` of its names, shapes and dtypes, ``layers``, ``parameters``.
        latency_s: seconds that a message takes.
        bandwidth_bytes_s: bytes per second of a link; None: not given or not measurable, and counted as without bound.
        memory_limit_bytes: bytes that a worker may hold, if that was limited.
        minibatch_s: predicted seconds for a mini-batch.
        one_worker_s: seconds that one worker would take for as many samples.
        spread: interquartile range of the measured time of the slowest stage, over its median; None: not measurable.
        verdict: what to train on: this ``"pipeline"`` or ``"one worker"``; None: the measurement does not tell.
        advice: the verdict and its reason, in a sentence or two.
        stages: the stages, in order.
        alternatives: evaluations of the same job by other methods; ``dtrp, recomputing``: by this plan with no more
            graphs kept than the method keeps; ``dtrp, equal cuts``.
        leads: orders of work of the same method, the chosen order among them.
        batches: other sizes of the mini-batch.
    """

    method: str
    options: dict[str, Json]
    cuts: tuple[int, ...]
    keep: tuple[Keep, ...]
    num_microbatches: int
    batch_size: int
    lr_scale: float
    warmup_updates: int
    model: dict[str, Json]
    latency_s: float
    bandwidth_bytes_s: float | None
    memory_limit_bytes: int | None
    minibatch_s: float
    one_worker_s: float
    spread: float | None = field(default=None, kw_only=True)
    verdict: Verdict | None = field(default=None, kw_only=True)
    advice: str
    stages: tuple[StagePlan, ...]
    alternatives: tuple[Choice, ...] = ()
    leads: tuple[Choice, ...] = ()
    batches: tuple[Choice, ...] = ()

    @property
    def num_workers(self) -> int:
        """K, the number of stages."""
        return len(self.cuts) + 1

    @property
    def row(self) -> Method:
        """The method, with its options."""
        return get_method(self.method, **self.options)

    @property
    def speedup(self) -> float | None:
        """How many times as fast as one worker, predicted; None: not measurable."""
        return self.one_worker_s / self.minibatch_s if self.minibatch_s else None

    @property
    def choice(self) -> Choice:
        """This plan as a row of its tables."""
        row = self.row
        return Choice(
            method=self.method,
            ahead=row.ahead,
            order="backward-first" if row.backward_first else "forward-first",
            num_workers=self.num_workers,
            num_microbatches=self.num_microbatches,
            batch_size=self.batch_size,
            cuts=self.cuts,
            minibatch_s=self.minibatch_s,
            samples_per_s=samples_per_s(self.batch_size, self.minibatch_s),
            memory_bytes=max((stage.memory_bytes for stage in self.stages), default=0),
            delay=steady_delay(row, self.num_workers, 0, self.num_microbatches, 0),
            utilization=tuple(stage.utilization for stage in self.stages),
            spread=self.spread,
            leads=row.leads,
            orders=row.orders,
        )

    @property
    def fastest(self) -> Choice:
        """The fastest of this plan and its ``alternatives``, within the memory; of equals the first."""
        limit = math.inf if self.memory_limit_bytes is None else self.memory_limit_bytes
        return fastest_row(self.choice, self.alternatives, limit)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, whole or not at all."""
        entries = dataclasses.asdict(self, dict_factory=_rounded_entries)
        with whole_file(path) as file:
            file.write(_text({"dtrp_plan": _FORMAT, **entries}).encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan.

        Raises:
            OSError: no such file.
            PlanError: what the file holds is no plan, with the entry at fault.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:  # of JSON, or of the text's encoding
            raise PlanError(f"{path} is no plan: {error}") from None
        return cls.from_dict(values, str(path))

    @classmethod
    def from_dict(cls, values: Json, source: str = "plan") -> Plan:
        """As `load`, from what the file holds; ``source`` is the name for it in errors."""
        if not isinstance(values, Mapping) or "dtrp_plan" not in values:
            raise PlanError(f"{source} is no plan of dtrp: it has no entry 'dtrp_plan'")
        if values["dtrp_plan"] not in range(1, _FORMAT + 1):
            raise PlanError(
                f"{source} is a plan of format {values['dtrp_plan']!r}; this version of dtrp reads formats 1 to "
                f"{_FORMAT}: plan again"
            )
        given = {name: value for name, value in values.items() if name != "dtrp_plan"}
        fields = {entry.name: entry.default for entry in dataclasses.fields(cls)}
        unknown = sorted(given.keys() - fields.keys())
        missing = [name for name in sorted(fields.keys() - given.keys()) if fields[name] is dataclasses.MISSING]
        if unknown or missing:
            what = f"an unknown entry {unknown[0]!r}" if unknown else f"no entry {missing[0]!r}"
            raise PlanError(f"{source} has {what}; its entries are {', '.join(fields)}")
        try:
            for name, kind in (("stages", StagePlan), ("alternatives", Choice), ("leads", Choice), ("batches", Choice)):
                given[name] = tuple(kind(**_with_tuples(entry)) for entry in given.get(name, ()))
            plan = cls(**{**given, "keep": tuple(given["keep"]), "cuts": tuple(given["cuts"])})
            plan._check(source)
        except (TypeError, KeyError, AttributeError) as error:
            raise PlanError(f"{source} is no plan: {error}") from None
        return plan

    def _check(self, source: str) -> None:
        def require(holds: bool, rule: str) -> None:
            if not holds:
                raise PlanError(f"{source}: {rule}")

        cuts, keep = list(self.cuts), list(self.keep)
        rising = all(map(is_whole, cuts)) and cuts == sorted(set(cuts))
        require(rising, f"cuts={cuts}: whole numbers of at least 1, in rising order")
        complete = len(keep) == self.num_workers and all(kept in ("graph", "input") for kept in keep)
        require(complete, f"keep={keep}: 'graph' or 'input' for each of the {self.num_workers} stages")
        known = isinstance(self.model, Mapping) and isinstance(self.model.get("fingerprint"), str)
        require(known, "model has no fingerprint")
        require(isinstance(self.options, Mapping), f"options={self.options!r}: fields of the method with their values")
        for name, least in (("num_microbatches", 1), ("batch_size", 1), ("warmup_updates", 0)):
            require(
                is_whole(value := getattr(self, name), least), f"{name}={value!r}: a whole number of at least {least}"
            )
        for name in ("lr_scale", "minibatch_s", "one_worker_s", "latency_s"):
            require(is_number(value := getattr(self, name), 0), f"{name}={value!r}: a number of at least 0")
        spread, verdict, verdicts = self.spread, self.verdict, get_args(Verdict)
        require(spread is None or is_number(spread, 0), f"spread={spread!r}: a number of at least 0, or null")
        require(verdict is None or verdict in verdicts, f"verdict={verdict!r}: one of {', '.join(verdicts)}, or null")
        try:
            _ = self.row
        except (ValueError, TypeError) as error:
            raise PlanError(f"{source}: {error}") from None

    def check_model(self, model: nn.Module | Sequence[nn.Module]) -> None:
        """Refuse another model than the one planned for.

        Raises:
            PlanError: names, shapes or dtypes differ.
        """
        given = describe_model(model)
        if given["fingerprint"] != self.model["fingerprint"]:
            raise PlanError(
                f"the plan is for a model with {_outline(self.model)}; this one has {_outline(given)}, or other names, "
                "shapes or dtypes of its tensors. Plan again for this model"
            )


def describe_model(model: nn.Module | Sequence[nn.Module]) -> dict[str, Json]:
    """What a plan remembers of its model; the fingerprint is of all names, shapes and dtypes."""
    layers = layers_of(model)
    digest = hashlib.sha256()
    for layer, module in layers:
        digest.update(f"layer {layer}\n".encode())
        for kind, tensors in (("parameter", module.named_parameters()), ("buffer", module.named_buffers())):
            for name, tensor in tensors:
                digest.update(f"{kind} {name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
    parameters = sum(p.numel() for _, module in layers for p in module.parameters())
    return {"fingerprint": digest.hexdigest(), "layers": [name for name, _ in layers], "parameters": parameters}


def samples_per_s(batch_size: int, minibatch_s: float) -> float | None:
    """The throughput; None where the time was too short to measure."""
    return batch_size / minibatch_s if minibatch_s else None


def fastest_row(plan: Choice, others: Sequence[Choice], memory_limit_bytes: float) -> Choice:
    """The fastest of a plan and the other rows that fit the memory; of equals the first."""
    fitting = [row for row in others if row.memory_bytes <= memory_limit_bytes]
    return min([plan, *fitting], key=lambda row: row.minibatch_s)


def method_options(method: Method) -> dict[str, Json]:
    """The fields in which a method differs from the built-in one of its name.

    Raises:
        PlanError: a predictor object, which no file can hold.
    """
    if method.name not in list_methods():
        raise PlanError(
            f"method {method.name!r} is no row of dtrp's, and a plan is a file, which names one: make it of the "
            "nearest, as get_method('dtrp', ahead=3)"
        )
    if not isinstance(method.predict, (str, type(None))):
        raise PlanError(
            f"predict={method.predict!r}: a plan is a file, and holds predictors by name; plan with 'linear', "
            "'rollout' or 'informed', and pass your own predictor with the plan's cuts"
        )
    built_in = get_method(method.name)
    names = [entry.name for entry in dataclasses.fields(method)]
    options = {name: getattr(method, name) for name in names if getattr(method, name) != getattr(built_in, name)}
    return {**options, "predict": "none"} if options.get("predict", "") is None else options


def _outline(model: Mapping[str, Json]) -> str:
    layers = model.get("layers") or ["?"]
    return f"{len(layers)} layers ({layers[0]}..{layers[-1]}) and {model.get('parameters', 0):,} parameters"


def _with_tuples(entry: Json) -> dict[str, Json]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()}


def _text(entries: dict[str, Json]) -> str:
    """JSON with an entry of the plan a line, and of its tables a row a line."""
    lines = []
    for name, value in entries.items():
        is_table = isinstance(value, tuple) and value and isinstance(value[0], dict)
        text = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "]" if is_table else json.dumps(value)
        lines.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _rounded_entries(entries: list[tuple[str, Json]]) -> dict[str, Json]:
    """Entries with six digits of their floats: more were not measured."""

    def rounded(value: Json) -> Json:
        if isinstance(value, float):
            return float(f"{value:.6g}")
        return tuple(map(rounded, value)) if isinstance(value, tuple) else value

    return {name: rounded(value) for name, value in entries}


def as_plan(plan: Plan | str | os.PathLike[str] | Mapping[str, Json]) -> Plan:
    """A plan, or the file or dictionary that holds one."""
    if isinstance(plan, Plan):
        return plan
    if isinstance(plan, (str, os.PathLike)):
        return Plan.load(plan)
    if isinstance(plan, Mapping):
        return Plan.from_dict(plan)
    raise TypeError(f"plan is a {type(plan).__name__}; pass what dtrp.plan returns, or the path of its file")
