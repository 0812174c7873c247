"""The loss of a run, and the metrics of its tests: cross entropy and accuracy, or functions of the user's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ...data import Source
from ...errors import message_of
from ...tensors.pytree import num_samples
from ...typing import LossFn, LossWeight
from ..user_code import UserCodeError, explained, is_reference, load_function

# (output, target) -> the sum over what counts, and the number of what counts.
Total: TypeAlias = Callable[[Any, Any], tuple[float, float]]
ClassLossFn: TypeAlias = Callable[..., Tensor]  # (logits, classes, reduction)
Sums: TypeAlias = dict[str, tuple[float, float]]

IGNORED = -100  # a label that is left out
TOP5_CLASSES = 100  # from which on the share of labels among the five likeliest is told too
_CHECKED_CALLS = 32  # of a loss on an accelerator, whose labels are looked at there


@dataclass(frozen=True)
class Criterion:
    """What a run is trained by, and what its tests tell.

    Attributes:
        loss, loss_weight: as `dtrp.Pipeline` takes them.
        loss_total: loss of a mini-batch of a test.
        metrics: metrics by name; the first one is the score of the run.
        check_labels: function that refuses targets, on the CPU, of which the loss cannot be taken.
    """

    loss: LossFn
    loss_weight: LossWeight | None
    loss_total: Total
    metrics: Mapping[str, Total]
    check_labels: Callable[[Any], None] = lambda target: None

    def judge(self, out: Any, target: Any) -> Sums:
        """The sums and counts of loss and metrics on a mini-batch: outputs (B, ...), targets (B, ...)."""
        out = _precise(out) if isinstance(out, Tensor) else out
        sums = {"loss": self.loss_total(out, target)}
        sums |= {name: total(out, target) for name, total in self.metrics.items()}
        return {name: (total, count) for name, (total, count) in sums.items() if count >= 0}


def means(parts: Iterable[Sums]) -> dict[str, float]:
    """The means of loss and metrics over mini-batches."""
    totals: Sums = {}
    for sums in parts:
        for name, (total, count) in sums.items():
            before = totals.get(name, (0.0, 0.0))
            totals[name] = (before[0] + total, before[1] + count)
    return {name: total / count if count else float("nan") for name, (total, count) in totals.items()}


def counted_labels(target: Tensor) -> Tensor:
    """The number of labels that cross entropy takes the mean over: it leaves out those of -100."""
    return (target != IGNORED).sum()


def make_criterion(
    loss: str | None, metrics: tuple[str, ...], source: Source, class_loss: ClassLossFn, *, supplied: bool
) -> Criterion:
    """The criterion of a run.

    Args:
        loss: reference of a function (output, target) -> mean over the samples; None: cross entropy.
        metrics: names and references of such functions; empty: accuracy, and top5 from 100 classes on.
        source: data of the run.
        class_loss: cross entropy of logits (..., C) and classes (...).
        supplied: whether the data is the user's, and its labels are checked.

    Raises:
        ValueError: functions that cannot be loaded, or targets that loss or metrics do not take.
    """
    _, targets = source.example(1)
    names = metrics or (("accuracy",) if source.is_text else ("accuracy", "top5"))
    of_classes = [f"--metric {name}" for name in metrics if not is_reference(name)]
    of_classes += ["the accuracy"] * (not metrics) + ["cross entropy"] * (loss is None)
    if of_classes and not _are_classes(targets):
        what = str(targets.dtype).removeprefix("torch.") if isinstance(targets, Tensor) else "several tensors"
        option = "--loss" if loss is None else "--metric"
        raise ValueError(
            f"the targets of {source.name} are {what}, and {of_classes[-1]} needs classes, whole numbers; pass {option}, such as "
            f"torch.nn.functional:{'mse_loss' if loss is None else 'l1_loss'}"
            + (", and --metric" * (not metrics and loss is None))
        )
    totals = {_name(name): _metric(name, optional=not metrics) for name in names}
    if len(totals) < len(names):
        raise ValueError(f"--metric {', '.join(names)}: two functions of one name; rename one")
    if loss is not None:
        function = load_loss(loss)
        return Criterion(function, None, _mean_total("--loss", loss, function), totals)
    weight = counted_labels if source.is_text or (supplied and targets.dim() > 1) else None
    if not supplied:
        return Criterion(
            class_loss, weight, lambda out, y: (float(class_loss(out.float(), y, "sum")), y.numel()), totals
        )
    checked = ClassLoss(class_loss, ignores=weight is not None)

    def total(out: Any, target: Any) -> tuple[float, float]:
        return float(checked(out, target, "sum")), float(counted_labels(target))

    return Criterion(checked, weight, total, totals, checked.check_labels)


class ClassLoss:
    """Cross entropy of a user's model and data: logits (B, ..., C) or (B, C, ...) and classes (B, ...).

    Args:
        class_loss: cross entropy of logits (..., C) and classes (...).
        ignores: whether labels of -100 are left out.
    """

    def __init__(self, class_loss: ClassLossFn, *, ignores: bool) -> None:
        self._class_loss, self._ignores = class_loss, ignores
        self._num_outputs: int | None = None
        self._calls = 0

    def __call__(self, out: Any, target: Any, reduction: str = "mean") -> Tensor:
        logits, classes = as_classes(out, target)
        self._num_outputs = logits.shape[-1]
        self._calls += 1
        # On an accelerator every look would wait for it: those who move targets there look at them before.
        if classes.device.type == "cpu" or self._calls <= _CHECKED_CALLS:
            self.check_labels(classes)
        return self._class_loss(logits, classes, reduction)

    def check_labels(self, target: Any) -> None:
        """Refuse a label that has no output.

        Raises:
            ValueError: such a label.
        """
        if self._num_outputs is None or not _are_classes(target):
            return
        wrong = (target < 0) | (target >= self._num_outputs)
        if self._ignores:
            wrong &= target != IGNORED
        if wrong.any():
            label = int(target[wrong][0])
            raise ValueError(
                f"a label is {label}, and the model has {self._num_outputs} outputs: labels are 0 to {self._num_outputs - 1}"
                + ("" if self._ignores else " (-100 leaves a label out where a sample has several)")
                * (label == IGNORED)
            )


def as_classes(out: Any, target: Any) -> tuple[Tensor, Tensor]:
    """Outputs as logits (..., C), and targets as classes (...).

    Raises:
        ValueError: they are no such things.
    """
    if isinstance(out, Tensor) and isinstance(target, Tensor) and _are_classes(target) and out.is_floating_point():
        if out.shape[:-1] == target.shape:
            return out, target.long()
        if out.dim() == target.dim() + 1 and (out.shape[:1] + out.shape[2:]) == target.shape:
            return out.movedim(1, -1), target.long()
    shapes = [
        f"{tuple(t.shape)}, {str(t.dtype).removeprefix('torch.')}" if isinstance(t, Tensor) else f"a {type(t).__name__}"
        for t in (out, target)
    ]
    raise ValueError(
        f"the model's output is {shapes[0]}, and the targets are {shapes[1]}; logits (B, C) and classes (B,) go together, "
        "(B, ..., C) or (B, C, ...) and (B, ...) too; for others pass --loss and --metric"
    )


def load_loss(reference: str) -> LossFn:
    """The function of ``--loss``, whose result is checked.

    Raises:
        ValueError: it cannot be loaded, or has weights.
    """
    function: Any = load_function("--loss", reference)
    if inspect.isclass(function):
        try:
            function = function()
        except Exception as error:
            raise ValueError(f"--loss {reference}: {explained(error, reference)}") from error
    if isinstance(function, nn.Module):
        if any(p.requires_grad for p in function.parameters()):
            raise ValueError(
                f"--loss {reference} has weights to train; put them into the model, or train in a loop of your own "
                "(dtrp.Pipeline takes such a loss)"
            )
        return function
    return _Scalar(function, reference)


@dataclass(frozen=True)
class _Scalar:
    """A loss of the user's, checked to be a scalar."""

    function: Callable[[Any, Any], Any]
    reference: str

    def __call__(self, out: Any, target: Any) -> Tensor:
        loss = self.function(out, target)
        if not isinstance(loss, Tensor) or loss.dim() or not loss.is_floating_point():
            raise ValueError(
                f"--loss {self.reference} returned {_described(loss)}; return the mean over the samples, a scalar"
            )
        return loss


def _name(metric: str) -> str:
    return metric.rpartition(":")[2]


def _metric(metric: str, *, optional: bool) -> Total:
    if is_reference(metric):
        return _mean_total("--metric", metric, load_function("--metric", metric))
    known: dict[str, Total] = {
        "accuracy": _correct,
        "top5": lambda out, target: _among_five(out, target, optional=optional),
    }
    return known[metric]


def _mean_total(option: str, reference: str, function: Callable[[Any, Any], Any]) -> Total:
    """A mean over the samples, from a function of the user's, as a sum."""

    def total(out: Any, target: Any) -> tuple[float, float]:
        try:
            mean = function(out, target)
        except Exception as error:
            raise UserCodeError(f"{option} {reference}: {explained(error, reference)}") from error
        count = num_samples(target)
        try:
            return float(mean) * count, float(count)
        except (TypeError, ValueError, RuntimeError):
            raise UserCodeError(
                f"{option} {reference} returned {_described(mean)}; return the mean over the samples, a number"
            ) from None

    return total


def _correct(out: Any, target: Any) -> tuple[float, float]:
    logits, classes = _judged(out, target)
    return float((logits.argmax(-1) == classes).sum()), float((classes != IGNORED).sum())


def _among_five(out: Any, target: Any, *, optional: bool) -> tuple[float, float]:
    logits, classes = _judged(out, target)
    if optional and logits.shape[-1] < TOP5_CLASSES:
        return 0.0, -1.0  # not told
    likeliest = logits.topk(min(5, logits.shape[-1])).indices
    return float((likeliest == classes[..., None]).sum()), float((classes != IGNORED).sum())


def _judged(out: Any, target: Any) -> tuple[Tensor, Tensor]:
    try:
        return as_classes(out, target)
    except ValueError as error:
        raise UserCodeError(message_of(error)) from None


def _are_classes(target: Any) -> bool:
    return isinstance(target, Tensor) and not target.is_floating_point() and not target.is_complex()


def _precise(t: Tensor) -> Tensor:
    """Half precision as float32."""
    return t.float() if t.is_floating_point() and t.dtype != torch.float64 else t


def _described(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
