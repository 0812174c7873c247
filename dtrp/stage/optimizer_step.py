"""The optimizer steps of a stage (U), after a check of the gradient."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ..errors import StageError
from ..optim.factories import is_by_place, with_keywords
from ..schedule import Action
from ..typing import OptimizerFactory, SchedulerFactory
from .gradients import GradientRule, PendingNorms, clip_, gradient_norm, nonfinite, overall


class OptimizerSteps:
    """The optimizer steps of one stage, with a check of the gradient before each.

    Args:
        stage: k, for errors.
        parameters: all parameters that are trained at the stage, by name; the optimizer may have fewer.
        optimizer, lr_scheduler: the stage's optimizer and scheduler, or None.
        rule: what is done with gradients that are too long or not finite.
        lr_factor: multiplies every learning rate, unseen by the scheduler.
        device: the device of the gradients.
        num_stages: K.

    Attributes:
        skipped: mini-batches whose update was left out.
        norms: (mini-batch, the norm of its gradient before it was clipped, a scalar tensor) of the last updates.
    """

    def __init__(
        self,
        stage: int,
        parameters: dict[str, nn.Parameter],
        optimizer: Optimizer | None,
        lr_scheduler: Any,
        rule: GradientRule,
        *,
        lr_factor: float,
        device: torch.device,
        num_stages: int,
    ) -> None:
        self.skipped: list[int] = []
        self.norms: deque[tuple[int, Tensor]] = deque(maxlen=2 * num_stages + 1)  # no stage is further ahead of another
        self._stage, self._names, self._parameters = stage, list(parameters), list(parameters.values())
        self._optimizer, self._lr_scheduler, self._rule = optimizer, lr_scheduler, rule
        self._lr_factor, self._device = lr_factor, device
        # An accelerator would have nothing to do while its answer is waited for: it is read at the next update.
        self._at_once = device.type == "cpu" or rule.max_norm is not None or rule.on_nonfinite == "skip"
        self._unseen = PendingNorms()

    def step(
        self,
        minibatch: int,
        gradients: Sequence[Tensor | None],
        norms: Sequence[float] | None,
        before: Callable[[], None],
    ) -> None:
        """One optimizer step.

        Args:
            minibatch: the mini-batch of the gradient.
            gradients: the gradients of the parameters, in their order.
            norms: the norms of all stages' gradients, where the rule looks at them together.
            before: called right before the optimizer steps, with the learning rates of that step.

        Raises:
            StageError: a gradient is not finite, and the rule says to stop. Nothing has been updated then, except on an
                accelerator that is not waited for: there it is the gradient of the update before.
        """
        assert self._optimizer is not None
        try:
            for p, gradient in zip(self._parameters, gradients, strict=True):
                p.grad = gradient
            applies = self._admit(minibatch, gradients, norms)
            if applies:
                with nullcontext() if self._lr_factor == 1 else self.shrunk_lr():
                    before()
                    self._optimizer.step()
            else:
                self.skipped.append(minibatch)
        finally:
            for p in self._parameters:
                p.grad = None
        if self._lr_scheduler is not None:
            self._step_scheduler(applied=applies)

    def _admit(self, minibatch: int, gradients: Sequence[Tensor | None], norms: Sequence[float] | None) -> bool:
        """Whether the gradient, which is in ``p.grad``, is to be applied; it is clipped then."""
        rule = self._rule
        self.check()
        norm = gradient_norm(gradients, waits=self._at_once)
        self.norms.append((minibatch, norm))
        if not self._at_once:
            self._unseen.add(minibatch, gradients, self._device)
            return True
        if norms is not None and not (rule.clip == "stage" and rule.max_norm is not None):
            norm = norm.new_tensor(overall(norms))
        by_stage = {self._stage: float(norm)} if norms is None else dict(enumerate(norms))
        bad = next((stage for stage, value in by_stage.items() if not math.isfinite(value)), None)
        if bad is not None:
            if rule.on_nonfinite == "skip":
                return False
            self._raise_nonfinite(minibatch, bad, gradients if bad == self._stage else ())
        if rule.max_norm is not None:
            clip_(self._parameters, rule.max_norm, norm)
        return True

    def check(self) -> None:
        """Refuse a gradient that was not finite and has been applied, where an accelerator has answered by now."""
        minibatch = self._unseen.first_bad()
        if minibatch is not None:
            self._raise_nonfinite(minibatch, self._stage, ())

    def _raise_nonfinite(self, minibatch: int, stage: int, gradients: Sequence[Tensor | None]) -> NoReturn:
        cause = nonfinite(minibatch, stage, self._names, gradients)
        raise StageError(stage, Action("U", minibatch), minibatch, cause) from cause

    def _step_scheduler(self, *, applied: bool) -> None:
        with nullcontext() if applied else warnings.catch_warnings():
            if not applied:  # where the very first update is left out, torch takes it for a wrong order
                warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step", category=UserWarning)
            self._lr_scheduler.step()

    @contextmanager
    def shrunk_lr(self) -> Iterator[None]:
        """Within it the learning rates are lr * lr_shrink**d, unseen by the scheduler."""
        groups = [] if self._lr_factor == 1 or self._optimizer is None else self._optimizer.param_groups
        rates = [group["lr"] for group in groups]
        try:
            for group in groups:
                group["lr"] = group["lr"] * self._lr_factor
            yield
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate

    def drop(self) -> None:
        """Forget the norms under way, and those of the last updates."""
        self._unseen.drop()
        self.norms.clear()


def check_callables(optimizer: Any, loss_fn: Any, lr_scheduler: Any) -> None:
    if isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__} made already; each stage has its own: pass a function, "
            "lambda params: torch.optim.SGD(params, lr=0.1)"
        )
    for label, value in (("optimizer", optimizer), ("loss_fn", loss_fn), ("lr_scheduler", lr_scheduler)):
        if not callable(value) and not (label == "lr_scheduler" and value is None):
            raise TypeError(f"{label} is a {type(value).__name__}; pass a function")


def checked_optimizer(make: OptimizerFactory) -> OptimizerFactory:
    def checked(parameters: list[nn.Parameter], *, stage: int, num_stages: int, delay: int, named: Any) -> Optimizer:
        optimizer = with_keywords(make, parameters, stage=stage, num_stages=num_stages, delay=delay, named=named)
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer returned a {type(optimizer).__name__}; it returns a torch.optim.Optimizer")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError(
                "LBFGS calls the loss many times in a step, which no pipeline can do; use another optimizer"
            )
        strange = {id(p) for group in optimizer.param_groups for p in group["params"]} - {id(p) for p in parameters}
        if strange:
            raise ValueError(
                "optimizer was given a stage's parameters and holds others; use only those it is called with (what a loss would "
                "train belongs into the last stage's module)"
            )
        return optimizer

    checked.by_place = is_by_place(make)  # type: ignore[attr-defined]
    return checked


def checked_scheduler(make: SchedulerFactory | None) -> SchedulerFactory | None:
    if make is None:
        return None

    def checked(optimizer: Optimizer, *, stage: int, num_stages: int, delay: int) -> Any:
        scheduler = with_keywords(make, optimizer, stage=stage, num_stages=num_stages, delay=delay)
        if isinstance(scheduler, ReduceLROnPlateau):
            raise TypeError(
                "ReduceLROnPlateau needs a metric at every step; use a scheduler that is a function of the update"
            )
        needed = ("step", "state_dict", "load_state_dict")  # the last two for checkpoints
        if lacks := [name for name in needed if not callable(getattr(scheduler, name, None))]:
            raise TypeError(
                f"lr_scheduler returned a {type(scheduler).__name__} without {', '.join(lacks)}; it returns a "
                "torch.optim.lr_scheduler, or what has these methods"
            )
        return scheduler

    checked.by_place = is_by_place(make)  # type: ignore[attr-defined]
    return checked
