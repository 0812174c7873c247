"""The plan: what `dtrp.plan` chose, as a small file that people read and edit."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import nn

from ..atomic_file import whole_file
from ..methods import Keep, Method, get_method, list_methods
from ..splitting.stages import layers_of

_FORMAT = 1


class PlanError(ValueError):
    """What cannot be planned, and what would; or a plan that does not fit."""


@dataclass(frozen=True)
class StagePlan:
    """A stage: seconds a mini-batch, bytes at most, share of the time in which it works."""

    layers: tuple[str, ...]
    keep: Keep
    slot_s: float
    memory_bytes: int
    utilization: float


@dataclass(frozen=True)
class Choice:
    """What one method would take for the same job, at its own best cuts.

    Attributes:
        method, ahead, order: the row; ``one worker`` is backpropagation without a pipeline.
        num_workers, num_microbatches: K and A.
        batch_size: samples in a mini-batch.
        cuts: the first layer of each later stage.
        minibatch_s: predicted time of a mini-batch.
        samples_per_s: of the whole pipeline.
        memory_bytes: of the worker that needs most.
        delay: the largest, in updates.
        utilization: of each worker.
    """

    method: str
    ahead: float
    order: str
    num_workers: int
    num_microbatches: int
    batch_size: int
    cuts: tuple[int, ...]
    minibatch_s: float
    samples_per_s: float
    memory_bytes: int
    delay: int
    utilization: tuple[float, ...]


@dataclass(frozen=True)
class Plan:
    """Where to cut, what to keep, how large a batch, and what to expect.

    The first group of attributes is what `Pipeline` and ``dtrp train`` do, and may be edited; the rest says why.

    Attributes:
        method: name of the row.
        options: fields of the row that differ from the method's own.
        cuts: index of the first layer of stages 1..K-1.
        keep: ``"graph"`` or ``"input"`` for each stage.
        num_microbatches: A.
        batch_size: samples in a mini-batch.
        lr_scale: times the learning rate of the base mini-batch.
        warmup_updates: over which the learning rate should rise.
        model: of the model planned for: ``fingerprint`` of its names, shapes and dtypes, ``layers``, ``parameters``.
        latency_s, bandwidth_bytes_s: of the links.
        memory_limit_bytes: of a worker, if there was one.
        minibatch_s: predicted.
        one_worker_s: what one worker would take for as many samples.
        advice: in a sentence or two.
        stages: one by one.
        alternatives: the same job by other methods; ``dtrp, recomputing``: by this plan with no more graphs kept than
            the method keeps; ``dtrp, equal cuts``.
        leads: orders of work of the same method, the chosen one among them.
        batches: other sizes of the mini-batch.
    """

    method: str
    options: dict[str, Any]
    cuts: tuple[int, ...]
    keep: tuple[Keep, ...]
    num_microbatches: int
    batch_size: int
    lr_scale: float
    warmup_updates: int
    model: dict[str, Any]
    latency_s: float
    bandwidth_bytes_s: float | None
    memory_limit_bytes: int | None
    minibatch_s: float
    one_worker_s: float
    advice: str
    stages: tuple[StagePlan, ...]
    alternatives: tuple[Choice, ...] = ()
    leads: tuple[Choice, ...] = ()
    batches: tuple[Choice, ...] = ()

    @property
    def num_workers(self) -> int:
        """K."""
        return len(self.cuts) + 1

    @property
    def row(self) -> Method:
        """The method, with its options."""
        return get_method(self.method, **self.options)

    @property
    def speedup(self) -> float:
        """Over one worker, predicted."""
        return self.one_worker_s / self.minibatch_s

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, whole or not at all."""
        text = json.dumps({"dtrp_plan": _FORMAT, **dataclasses.asdict(_rounded(self))}, indent=1)
        with whole_file(path) as file:
            file.write((_compact(text) + "\n").encode())

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
    def from_dict(cls, values: Any, source: str = "plan") -> Plan:
        """As `load`, from what the file holds."""
        if not isinstance(values, Mapping) or "dtrp_plan" not in values:
            raise PlanError(f"{source} is no plan of dtrp: it has no entry 'dtrp_plan'")
        if values["dtrp_plan"] != _FORMAT:
            raise PlanError(
                f"{source} is a plan of format {values['dtrp_plan']!r}; this version of dtrp reads format {_FORMAT}: plan again"
            )
        fields = {field.name: field for field in dataclasses.fields(cls)}
        given = {name: value for name, value in values.items() if name != "dtrp_plan"}
        unknown = sorted(set(given) - set(fields))
        missing = sorted(
            name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in given
        )
        if unknown or missing:
            what = f"an unknown entry {unknown[0]!r}" if unknown else f"no entry {missing[0]!r}"
            raise PlanError(f"{source} has {what}; its entries are {', '.join(fields)}")
        try:
            for name, kind in (("stages", StagePlan), ("alternatives", Choice), ("leads", Choice), ("batches", Choice)):
                given[name] = tuple(_of(kind, entry) for entry in given.get(name, ()))
            given["keep"], given["cuts"] = tuple(given["keep"]), tuple(given["cuts"])
            plan = cls(**given)
            plan._check(source)
        except (TypeError, KeyError, AttributeError) as error:
            raise PlanError(f"{source} is no plan: {error}") from None
        return plan

    def _check(self, source: str) -> None:
        def whole(value: Any, least: int) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and value >= least

        def number(value: Any) -> bool:
            return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < float("inf")

        bad: str | None = None
        if not all(whole(cut, 1) for cut in self.cuts) or list(self.cuts) != sorted(set(self.cuts)):
            bad = f"cuts={list(self.cuts)}: whole numbers of at least 1, in rising order"
        elif len(self.keep) != self.num_workers or any(one not in ("graph", "input") for one in self.keep):
            bad = f"keep={list(self.keep)}: 'graph' or 'input' for each of the {self.num_workers} stages"
        elif not isinstance(self.model, Mapping) or not isinstance(self.model.get("fingerprint"), str):
            bad = "model has no fingerprint"
        elif not isinstance(self.options, Mapping):
            bad = f"options={self.options!r}: fields of the method with their values"
        for name, least in (("num_microbatches", 1), ("batch_size", 1), ("warmup_updates", 0)):
            if not whole(getattr(self, name), least):
                bad = f"{name}={getattr(self, name)!r}: a whole number of at least {least}"
        for name in ("lr_scale", "minibatch_s", "one_worker_s", "latency_s"):
            if not number(getattr(self, name)):
                bad = f"{name}={getattr(self, name)!r}: a number of at least 0"
        if bad is not None:
            raise PlanError(f"{source}: {bad}")
        try:
            _ = self.row
        except (ValueError, TypeError) as error:
            raise PlanError(f"{source}: {error}") from None

    def check_model(self, model: nn.Module | Sequence[nn.Module]) -> None:
        """Refuse another model than the one planned for.

        Raises:
            PlanError: names, shapes or dtypes differ.
        """
        own = describe_model(model)
        if own["fingerprint"] != self.model["fingerprint"]:
            raise PlanError(
                f"the plan is for a model with {_outline(self.model)}; this one has {_outline(own)}, or other names, shapes or "
                "dtypes of its tensors. Plan again for this model"
            )


def describe_model(model: nn.Module | Sequence[nn.Module]) -> dict[str, Any]:
    """What a plan remembers of its model; the fingerprint is of all names, shapes and dtypes."""
    layers = layers_of(model)
    digest = hashlib.sha256()
    parameters = 0
    for layer, module in layers:
        digest.update(f"layer {layer}\n".encode())
        for kind, tensors in (("parameter", module.named_parameters()), ("buffer", module.named_buffers())):
            for name, tensor in tensors:
                digest.update(f"{kind} {name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
                parameters += tensor.numel() if kind == "parameter" else 0
    return {"fingerprint": digest.hexdigest(), "layers": [name for name, _ in layers], "parameters": parameters}


def method_options(method: Method) -> dict[str, Any]:
    """The fields in which a method differs from the row of its name.

    Raises:
        PlanError: a predictor object, which no file can hold.
    """
    if method.name not in list_methods():
        raise PlanError(
            f"method {method.name!r} is no row of dtrp's, and a plan is a file, which names one: make it of the nearest, as "
            "get_method('dtrp', ahead=3)"
        )
    own = get_method(method.name)
    if not isinstance(method.predict, (str, type(None))):
        raise PlanError(
            f"predict={method.predict!r}: a plan is a file, and holds predictors by name; plan with 'linear', 'rollout' or "
            "'informed', and pass your own predictor with the plan's cuts"
        )
    fields = [field.name for field in dataclasses.fields(method) if field.name != "name"]
    options = {name: getattr(method, name) for name in fields if getattr(method, name) != getattr(own, name)}
    return {name: "none" if name == "predict" and value is None else value for name, value in options.items()}


def _outline(model: Mapping[str, Any]) -> str:
    layers = model.get("layers") or ["?"]
    return f"{len(layers)} layers ({layers[0]}..{layers[-1]}) and {model.get('parameters', 0):,} parameters"


def _of(kind: type[Any], entry: Any) -> Any:
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()}
    return kind(**values)


def _compact(text: str) -> str:
    """JSON with an entry of the plan a line, and of its tables a row a line."""
    lines: list[str] = []
    for line in text.splitlines():
        depth = len(line) - len(line.lstrip(" "))
        bare = line.strip()
        closes = bare[0] in "]}"
        if depth <= (1 if not closes else 0) or (depth == 2 and bare == "{"):
            lines.append(line)
        else:
            lines[-1] += bare if closes or lines[-1][-1] in "[{" else f" {bare}"
    return "\n".join(lines)


def _rounded(value: Any) -> Any:
    """A plan with six digits of its floats: more were not measured."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, tuple):
        return tuple(_rounded(one) for one in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(
            value, **{field.name: _rounded(getattr(value, field.name)) for field in dataclasses.fields(value)}
        )
    return value


def as_plan(plan: Any) -> Plan:
    """A plan, or the file or dictionary that holds one."""
    if isinstance(plan, Plan):
        return plan
    if isinstance(plan, (str, os.PathLike)):
        return Plan.load(cast("str | os.PathLike[str]", plan))
    if isinstance(plan, Mapping):
        return Plan.from_dict(plan)
    raise TypeError(f"plan is a {type(plan).__name__}; pass what dtrp.plan returns, or the path of its file")
