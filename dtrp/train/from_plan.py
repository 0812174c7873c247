"""Plans of the command line: a plan made from the settings of a run, and settings taken from a plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ..planning import Plan
from ..planning import plan as plan_pipeline
from . import build
from .config import TrainConfig, option_name
from .config_checks import check_settings


def make_plan(config: TrainConfig, *, say: Callable[[str], None], **choices: Any) -> Plan:
    """Call `dtrp.plan` with the model, the data and the optimizer of a run's settings.

    Args:
        config: settings of the run.
        say: function that shows a line of progress.
        choices: other arguments of `dtrp.plan`.
    """
    check_settings(config)
    device = build.find_devices(config.device)[0]
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    source = build.open_source(config, say)
    torch.manual_seed(config.seed)
    model = build.make_model(config, source)
    if isinstance(model, nn.Module) and not isinstance(model, nn.Sequential):
        model = build.finely_divided(model, source, choices["num_workers"])
    batch = source.example(config.batch_size)
    criterion = build.criterion_of(config, source)
    source.close()
    options = {"method": build.make_method(config), "optimizer": build.make_optimizer(config), "device": device}
    if config.dtype == "bfloat16":
        choices["autocast"] = partial(torch.autocast, device.type, dtype=torch.bfloat16)
    return plan_pipeline(model, batch, criterion.loss, **options, progress=say, **choices)  # type: ignore[arg-type]


def resolved(config: TrainConfig) -> tuple[TrainConfig, Plan | None]:
    """The settings completed by ``config.plan``, and the plan; the settings as they are, and None, without a plan.

    Raises:
        ValueError, OSError: a setting that contradicts the plan, or a file that is not a plan.
    """
    if config.plan is None:
        return config, None
    try:
        plan = Plan.load(config.plan)
    except OSError as error:
        raise ValueError(f"--plan {config.plan} cannot be read: {error.strerror}; name a file of 'dtrp plan'") from None
    row = plan.row
    decided: dict[str, Any] = {
        "method": plan.method,
        "cuts": plan.cuts or None,
        "num_microbatches": plan.num_microbatches,
        "batch_size": plan.batch_size,
        "ahead": row.ahead,
        "order": "backward-first" if row.backward_first else "forward-first",
        "leads": row.leads,
        "orders": (row.orders,) if isinstance(row.orders, str) else row.orders,
        "keep": ",".join(plan.keep),
        "prediction": row.predict or "none",
        "grad_shrink": row.grad_shrink,
        "lr_shrink": row.lr_shrink,
    }
    for field, value in decided.items():
        given = getattr(config, field)
        if given not in (getattr(TrainConfig, field), value):
            shown = given if not isinstance(given, tuple) else ",".join(map(str, given))
            raise ValueError(
                f"{option_name(field)} {shown} with a plan that says {value}; leave it out, or edit {config.plan}"
            )
    if config.stages not in (None, plan.num_workers):
        raise ValueError(f"--stages {config.stages} with a plan for {plan.num_workers}; leave it out, or plan again")
    if config.memory_limit is not None:
        instead = "leave it out, or plan again with it"
        raise ValueError(f"--memory-limit with a plan, which says what each stage keeps; {instead}")
    warmup = max(config.warmup_updates, plan.warmup_updates)
    decided |= {
        "stages": plan.num_workers,
        "lr": config.base_lr * plan.lr_scale,
        "warmup_updates": warmup,
        "plan": None,
    }
    completed = dataclasses.replace(config, **decided)
    if build.make_method(completed) != row:
        raise ValueError(
            f"{config.plan} has options of {plan.method} that dtrp train cannot be told ({', '.join(plan.options)}); use "
            "Pipeline(plan=...)"
        )
    return completed, plan
