"""Train a network that is spread over several workers, without waiting.

`Pipeline` trains; `split` divides a model of any forward into stages; `get_method` and `list_methods` name what it can
train by; `Schedule` writes a method's order of work down; `linear`, `rollout` and `informed` predict weights;
`plan` chooses cuts, batch and memory for a model, and `simulate` runs a schedule without one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .lazy import lazy_names

if TYPE_CHECKING:
    from .data.sampler import ResumableSampler
    from .errors import PlanError, StageError, WaitTimeoutError, WorkerError
    from .methods import Method, get_method, list_methods
    from .pipeline import Pipeline
    from .planning.choose import plan
    from .planning.plan_file import Plan
    from .planning.simulate import simulate
    from .predict import informed, linear, rollout
    from .saving import CheckpointError
    from .schedule_grid import Schedule, ScheduleError
    from .splitting.stages import Stages, split
    from .stage.deferral import defer
    from .stage.losses import add_loss
    from .stage.repetition import recomputing
    from .train.callbacks.protocol import Callback
    from .train.own_loop.loop_folder import RunFolder

__all__ = [
    "Callback",
    "CheckpointError",
    "Method",
    "Pipeline",
    "Plan",
    "PlanError",
    "ResumableSampler",
    "RunFolder",
    "Schedule",
    "ScheduleError",
    "StageError",
    "Stages",
    "WaitTimeoutError",
    "WorkerError",
    "add_loss",
    "defer",
    "get_method",
    "informed",
    "linear",
    "list_methods",
    "plan",
    "recomputing",
    "rollout",
    "simulate",
    "split",
]

__version__ = "0.2.0"

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Callback": ".train.callbacks.protocol",
        "CheckpointError": ".saving",
        "Method": ".methods",
        "Pipeline": ".pipeline",
        "Plan": ".planning.plan_file",
        "PlanError": ".errors",
        "ResumableSampler": ".data.sampler",
        "RunFolder": ".train.own_loop.loop_folder",
        "Schedule": ".schedule_grid",
        "ScheduleError": ".schedule_grid",
        "StageError": ".errors",
        "Stages": ".splitting.stages",
        "WaitTimeoutError": ".errors",
        "WorkerError": ".errors",
        "add_loss": ".stage.losses",
        "defer": ".stage.deferral",
        "get_method": ".methods",
        "informed": ".predict",
        "linear": ".predict",
        "list_methods": ".methods",
        "plan": ".planning.choose",
        "recomputing": ".stage.repetition",
        "rollout": ".predict",
        "simulate": ".planning.simulate",
        "split": ".splitting.stages",
    },
    submodules=("optim", "predict"),
)
