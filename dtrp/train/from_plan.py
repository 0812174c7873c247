"""Plans of the command line: one for the settings of a run, and the settings that one has decided."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..planning import Plan, plan
from .build import (
    class_loss,
    example,
    find_devices,
    load_dataset,
    make_method,
    make_model,
    make_optimizer,
    weights_dtype,
)
from .config import TrainConfig, default_lr, option_name
from .config_checks import check_settings


def make_plan(config: TrainConfig, *, say: Callable[[str], None], **choices: Any) -> Plan:
    """`dtrp.plan` for the model, the data and the optimizer of a configuration; ``choices`` are its other arguments."""
    check_settings(config)
    device = find_devices(config.device)[0]
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    dataset = load_dataset(config)
    torch.manual_seed(config.seed)
    model = make_model(config, dataset)
    x, y = example(config, dataset, config.batch_size)
    model = model.to(weights_dtype(config))
    autocast = partial(torch.autocast, device.type, dtype=torch.bfloat16) if config.dtype == "bfloat16" else None
    return plan(
        model,
        (x, y),
        class_loss,
        method=make_method(config),
        optimizer=make_optimizer(config),
        device=device,
        autocast=autocast,
        progress=say,
        **choices,
    )


def resolved(config: TrainConfig) -> tuple[TrainConfig, Plan | None]:
    """The settings with those of the plan in them, and the plan; a plan says what it says alone.

    Raises:
        ValueError, OSError: a setting that says otherwise than the plan, or a file that is none.
    """
    if config.plan is None:
        return config, None
    agreed = Plan.load(config.plan)
    row = agreed.row
    order = "backward-first" if row.backward_first else "forward-first"
    said: dict[str, Any] = {
        "method": agreed.method,
        "cuts": agreed.cuts or None,
        "num_microbatches": agreed.num_microbatches,
        "batch_size": agreed.batch_size,
        "ahead": row.ahead,
        "order": order,
        "keep": ",".join(agreed.keep),
        "prediction": row.predict or "none",
        "grad_shrink": row.grad_shrink,
        "lr_shrink": row.lr_shrink,
    }
    defaults = TrainConfig()
    for field, value in said.items():
        given = getattr(config, field)
        if given not in (getattr(defaults, field), value):
            shown = given if not isinstance(given, tuple) else ",".join(map(str, given))
            raise ValueError(
                f"{option_name(field)} {shown} with a plan that says {value}; leave it out, or edit {config.plan}"
            )
    if config.stages not in (None, agreed.num_workers):
        raise ValueError(f"--stages {config.stages} with a plan for {agreed.num_workers}; leave it out, or plan again")
    if config.memory_limit is not None:
        raise ValueError(
            "--memory-limit with a plan, which says what each stage keeps; leave it out, or plan again with it"
        )
    base_lr = config.lr if config.lr is not None else default_lr(config)
    scaled = dataclasses.replace(
        config,
        **said,
        stages=agreed.num_workers,
        lr=base_lr * agreed.lr_scale,
        warmup_updates=max(config.warmup_updates, agreed.warmup_updates),
        plan=None,
    )
    if make_method(scaled) != row:
        raise ValueError(
            f"{config.plan} has options of {agreed.method} that dtrp train cannot be told ({', '.join(agreed.options)}); use "
            "Pipeline(plan=...)"
        )
    return scaled, agreed
