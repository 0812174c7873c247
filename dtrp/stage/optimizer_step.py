"""U: what a stage does with the gradient of a mini-batch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ..errors import StageError
from ..schedule import Action
from ..typing import OptimizerFactory, SchedulerFactory
from .gradients import GradientRule, Unseen, all_finite, clip_, gradient_norm, nonfinite, overall


class Updates:
    """The optimizer steps of one stage, each after a look at its gradient.

    Args:
        stage: k, for errors.
        parameters: all that are trained here, by name; the optimizer may have fewer.
        optimizer, lr_scheduler: the stage's; None: it has none.
        rule: what is done with gradients that are too long or not finite.
        lr_factor: of every learning rate, out of the scheduler's sight.
        device: where the gradients are.

    Attributes:
        skipped: mini-batches whose update was left out.
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
    ) -> None:
        self.skipped: list[int] = []
        self._stage, self._names, self._parameters = stage, list(parameters), list(parameters.values())
        self._optimizer, self._lr_scheduler, self._rule = optimizer, lr_scheduler, rule
        self._lr_factor, self._device = lr_factor, device
        # An accelerator would have nothing to do while its answer is waited for: it is heard at the next update.
        self._at_once = device.type == "cpu" or rule.max_norm is not None or rule.on_nonfinite == "skip"
        self._unseen = Unseen()

    def step(self, minibatch: int, gradients: Sequence[Tensor | None], norms: Sequence[float] | None) -> None:
        """One optimizer step.

        Args:
            minibatch: whose gradient it is.
            gradients: of the parameters.
            norms: of every stage's gradient, where the rule is about all of them together.

        Raises:
            StageError: a gradient is not finite, and the rule says to stop. With it nothing has been updated, but on an
                accelerator that is not waited for: there it is the gradient of the update before.
        """
        assert self._optimizer is not None
        try:
            for p, gradient in zip(self._parameters, gradients, strict=True):
                p.grad = gradient
            applies = self._admit(minibatch, gradients, norms)
            if applies:
                with self.shrunk_lr():
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
        if not self._at_once:
            self._unseen.add(minibatch, gradients, self._device)
            return True
        unclipped = norms is None and rule.max_norm is None
        if unclipped and self._device.type == "cpu" and all_finite(gradients):
            return True
        if norms is None or (rule.clip == "stage" and rule.max_norm is not None):
            norm = gradient_norm(gradients)
        else:
            like = next((g for g in gradients if g is not None), torch.zeros(()))
            norm = torch.tensor(overall(norms), dtype=like.dtype.to_real(), device=like.device)
        every = {self._stage: float(norm)} if norms is None else dict(enumerate(norms))
        bad = next((stage for stage, each in every.items() if not math.isfinite(each)), None)
        if bad is not None:
            if rule.on_nonfinite == "skip":
                return False
            cause = nonfinite(minibatch, bad, self._names, gradients if bad == self._stage else ())
            raise StageError(bad, Action("U", minibatch), minibatch, cause) from cause
        if rule.max_norm is not None:
            clip_(self._parameters, rule.max_norm, norm)
        return True

    def check(self) -> None:
        """Refuse a gradient that was not finite and has been applied: an accelerator answers when it comes to it."""
        minibatch = self._unseen.first_bad()
        if minibatch is not None:
            cause = nonfinite(minibatch, self._stage, self._names, ())
            raise StageError(self._stage, Action("U", minibatch), minibatch, cause) from cause

    def _step_scheduler(self, *, applied: bool) -> None:
        if applied:
            self._lr_scheduler.step()
            return
        with warnings.catch_warnings():  # where the very first update is left out, torch takes it for a wrong order
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step", category=UserWarning)
            self._lr_scheduler.step()

    def shrunk_lr(self) -> AbstractContextManager[None]:
        """Within it learning rates are lr * lr_shrink**d, out of the scheduler's sight."""
        return nullcontext() if self._lr_factor == 1 or self._optimizer is None else self._shrunk_lr()

    @contextmanager
    def _shrunk_lr(self) -> Iterator[None]:
        assert self._optimizer is not None
        groups = self._optimizer.param_groups
        rates = [group["lr"] for group in groups]
        try:
            for group in groups:
                group["lr"] = group["lr"] * self._lr_factor
            yield
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate

    def drop(self) -> None:
        """Forget what is under way."""
        self._unseen.drop()


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
    def checked(parameters: list[nn.Parameter]) -> Optimizer:
        optimizer = make(parameters)
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

    return checked


def checked_scheduler(make: SchedulerFactory | None) -> SchedulerFactory | None:
    if make is None:
        return None

    def checked(optimizer: Optimizer) -> Any:
        scheduler = make(optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            raise TypeError(
                "ReduceLROnPlateau needs a metric at every step; use a scheduler that is a function of the update"
            )
        if not hasattr(scheduler, "step"):
            raise TypeError(
                f"lr_scheduler returned a {type(scheduler).__name__}; it returns a torch.optim.lr_scheduler"
            )
        return scheduler

    return checked
