"""The weights that a stage's forwards read where they are not those of now: copies, predicted if the method predicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..predict import BuiltInPredictor, Predictor
from .stash import WeightVersion


class Versions:
    """What the forwards of one stage read.

    Args:
        stage: k, which a predictor is told.
        parameters: what is trained at the stage.
        optimizer: the stage's.
        predictor: None: copies are of the weights of now.
        lr: within it the optimizer has the learning rates of the next update.

    Attributes:
        shared: the copies that graphs stand on, by (updates made, horizon), as long as something holds them.
        alike: whether micro-batches of one version and horizon read the same, which may be made ahead of its time.
    """

    def __init__(
        self,
        stage: int,
        parameters: Sequence[Tensor],
        optimizer: Optimizer | None,
        predictor: Predictor | None,
        lr: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.predictor = predictor
        if isinstance(predictor, BuiltInPredictor) and optimizer is not None:
            predictor.check(optimizer)
        self.uses_gradients = bool(getattr(predictor, "uses_gradients", False))
        self.alike = predictor is None or (isinstance(predictor, BuiltInPredictor) and not self.uses_gradients)
        self.shared: WeakValueDictionary[tuple[int, int], WeightVersion] = WeakValueDictionary()
        self._stage, self._parameters, self._optimizer, self._lr = stage, parameters, optimizer, lr
        self._buffer: WeightVersion | None = None
        self._buffered: tuple[int, int] | None = None  # (version, horizon) of what the buffer holds

    @property
    def nbytes(self) -> int:
        """Of the buffer for predictions."""
        return self._buffer.nbytes if self._buffer is not None else 0

    def tensors(self) -> Sequence[Tensor]:
        """The buffer's, which the next prediction writes."""
        return self._buffer.tensors if self._buffer is not None else ()

    def predicted(
        self, microbatch: int, version: int, horizon: int, gradients: Callable[[], dict[str, Any]]
    ) -> WeightVersion | None:
        """The predicted weights, in the one buffer for them; None where nothing is predicted.

        Args:
            microbatch: m.
            version: updates that the weights of now have had.
            horizon: updates to the micro-batch's backward.
            gradients: what a predictor that uses them is told.
        """
        if self.predictor is None:
            return None
        if self._buffer is None:
            self._buffer = WeightVersion(self._parameters)
        if self._buffered != (version, horizon) or not self.alike:
            self._predict(self._buffer, microbatch, version, horizon, gradients)
            self._buffered = (version, horizon)
        return self._buffer

    def copied(
        self, microbatch: int, version: int, horizon: int, gradients: Callable[[], dict[str, Any]]
    ) -> WeightVersion | None:
        """A copy of its own, shared by the micro-batches that read the same; None where nothing is trained.

        The arguments are those of `predicted`.
        """
        if not self._parameters:
            return None
        key = (version, 0 if self.predictor is None else horizon)
        alike = self.alike or not horizon
        copy = self.shared.get(key) if alike else None
        if copy is None or not self._is_now(copy, version + horizon):
            copy = WeightVersion(self._parameters)
            if self.predictor is None or not horizon:
                copy.copy_from(self._parameters)
            else:
                self._predict(copy, microbatch, version, horizon, gradients)
            copy.minibatch, copy.marks = version + horizon, self._marks()
            if alike:
                self.shared[key] = copy
        return copy

    def _is_now(self, copy: WeightVersion, minibatch: int) -> bool:
        """Whether a copy of this version is of the weights of now: between two steps the caller may write them."""
        if copy.minibatch != minibatch:
            # What is written through ``.data`` counts nowhere; an accelerator would have to be waited for.
            unwritten = copy.marks == self._marks() and all(
                p.device.type != "cpu" or torch.equal(p, t) for p, t in zip(self._parameters, copy.tensors, strict=True)
            )
            if not unwritten:
                return False
            copy.minibatch = minibatch
        return True

    def _marks(self) -> list[tuple[int, int]]:
        return [(p.data_ptr(), p._version) for p in self._parameters]

    def _predict(
        self, out: WeightVersion, microbatch: int, version: int, horizon: int, gradients: Callable[[], dict[str, Any]]
    ) -> None:
        assert self.predictor is not None
        assert self._optimizer is not None
        if not isinstance(self.predictor, BuiltInPredictor):
            out.copy_from(self._parameters)  # a weight that it leaves out is predicted to stay
        more = gradients() if self.uses_gradients else {}
        with torch.no_grad(), self._lr():
            self.predictor(
                self._parameters,
                self._optimizer,
                horizon,
                out.tensors,
                stage=self._stage,
                microbatch=microbatch,
                version=version,
                **more,
            )

    def forget(self) -> None:
        """What was predicted from other weights than those of now."""
        self._buffered = None
        self.shared.clear()

    def drop(self) -> None:
        """The buffer too."""
        self._buffer = None
        self.forget()
