"""The loop behind ``dtrp train``: settings, the run on disk, its saves and its results."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .build import class_loss, lr_factor, make_method
    from .callbacks.protocol import Callback, RunStart, Update
    from .config import TrainConfig
    from .results import EpochMetrics, TrainResult, environment, summarize_delays, summary
    from .scores.samples_needed import RelativeSamples, relative_samples, samples_to
    from .trainer import Interrupted, Reporter, Trainer

__all__ = [
    "Callback",
    "EpochMetrics",
    "Interrupted",
    "RelativeSamples",
    "Reporter",
    "RunStart",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "Update",
    "class_loss",
    "environment",
    "lr_factor",
    "make_method",
    "relative_samples",
    "samples_to",
    "summarize_delays",
    "summary",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Callback": ".callbacks.protocol",
        "EpochMetrics": ".results",
        "Interrupted": ".trainer",
        "RelativeSamples": ".scores.samples_needed",
        "Reporter": ".trainer",
        "RunStart": ".callbacks.protocol",
        "TrainConfig": ".config",
        "TrainResult": ".results",
        "Trainer": ".trainer",
        "Update": ".callbacks.protocol",
        "class_loss": ".build",
        "environment": ".results",
        "lr_factor": ".build",
        "make_method": ".build",
        "relative_samples": ".scores.samples_needed",
        "samples_to": ".scores.samples_needed",
        "summarize_delays": ".results",
        "summary": ".results",
    },
)
