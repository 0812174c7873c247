"""What ranks run for `tests/pipelining/test_forms.py`: the forms in which torch's scripts call a schedule."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from drop_in_programs import (
    OPTIMIZERS,
    WIDTH,
    Block,
    Masked,
    Tied,
    by_hand,
    cross_entropy,
    masked,
    numbers,
    one_of,
    rank,
    run_cases,
    traced,
    traced_blocks,
    words,
    world_size,
)
from rank_programs import PROGRAMS
from torch import Tensor, nn
from torch.distributed.pipelining import Schedule1F1B

from dtrp.pipelining import ScheduleDTRP

Result = dict[str, Any]
CASES: dict[str, Callable[[], Result]] = {}
LIMIT: dict[str, Any] = {"timeout_s": 20.0, "seed": 7, "scale_grads": True}


def case(run: Callable[[], Result]) -> Callable[[], Result]:
    CASES[run.__name__] = run
    return run


def values_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in module.state_dict().items()}


def is_last() -> bool:
    return rank() == world_size() - 1


def said_of(run: Callable[[], Any]) -> str:
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


# -- micro-batches that are cut already -----------------------------------------------------------------------


def trained_on_parts(*, cut: bool, method: str) -> Result:
    """Stages that take a keyword argument of their own, fed whole or in micro-batches of 4, 3 and 3 samples."""
    torch.manual_seed(0)
    stage = one_of(Masked)
    torch.manual_seed(1)
    losses, outputs = [], []
    with ScheduleDTRP(stage, OPTIMIZERS["momentum"], 3, cross_entropy, method=method, **LIMIT) as schedule:
        for _ in range(5):
            (x,), kwargs, y = masked(10)
            parts = [range(4), range(4, 7), range(7, 10)]
            each: list[Tensor] = []
            if cut:
                given: dict[str, Any] = {
                    "arg_mbs": [(x[part],) for part in parts],
                    "kwarg_mbs": [{"mask": kwargs["mask"][part], "scale": 1.5} for part in parts],
                    "target_mbs": [y[part] for part in parts],
                    "losses": each,
                }
                outputs += [schedule.step(**given), schedule.eval(**given)]
            else:
                outputs += [
                    schedule.step(x, target=y, losses=each, **kwargs),
                    schedule.eval(x, target=y, losses=each, **kwargs),
                ]
            losses += each
    return {"weights": values_of(stage.submod), "losses": losses, "outputs": outputs}


@case
def micro_batches() -> Result:
    return {
        f"{method}, {'cut' if cut else 'whole'}": trained_on_parts(cut=cut, method=method)
        for method in ("dtrp", "bp")
        for cut in (True, False)
    }


@case
def micro_batches_by_torch() -> Result:
    """By torch's own schedule, of 2.15 and later, of which earlier ones know nothing."""
    if "arg_mbs" not in inspect.signature(Schedule1F1B.step).parameters:
        return {}
    found = {}
    for name in ("torch", "ours"):
        torch.manual_seed(0)
        stage = one_of(lambda k: Block())
        optimizer = OPTIMIZERS["sgd"](stage.submod.parameters())
        schedule: Any = (
            Schedule1F1B(stage, 2, cross_entropy)
            if name == "torch"
            else ScheduleDTRP(stage, optimizer, 2, cross_entropy, method="bp", **LIMIT)
        )
        (x,), _, y = numbers(8)
        losses: list[Tensor] = []
        parts = {"arg_mbs": [(x[:4],), (x[4:],)]} if rank() == 0 else {}
        last = {"target_mbs": [y[:4], y[4:]], "losses": losses} if is_last() else {}
        schedule.step(**parts, **last)
        optimizer.step()
        found[name] = {"weights": values_of(stage.submod), "losses": [loss.detach() for loss in losses]}
        if name == "ours":
            schedule.close()
    return found


# -- forwards alone -------------------------------------------------------------------------------------------


def with_statistics(k: int) -> nn.Module:
    return nn.Sequential(Block(), nn.BatchNorm1d(WIDTH))


@case
def forwards_alone() -> Result:
    """Without loss_fn: in train mode, in eval mode, and beside a schedule that trains the same stage."""
    torch.manual_seed(0)
    stage = one_of(with_statistics)
    stage.submod[0].linear.weight.grad = torch.ones(WIDTH, WIDTH)
    before = {"module": values_of(stage.submod)}
    x = torch.randn(8, WIDTH)
    outputs: dict[str, Any] = {}
    with ScheduleDTRP(stage, None, 4, **LIMIT) as schedule:
        outputs["train"] = schedule.step(x)
        moved = values_of(stage.submod)
        outputs["eval"] = schedule.eval(x)
        stage.submod.eval()
        with torch.inference_mode():
            outputs["step in eval"] = schedule.step(x)
        counts = schedule.num_updates, schedule.grad_norm(), schedule.grad_norms()
        after = values_of(stage.submod)
        kept = stage.submod[0].linear.weight.grad
    traced_stage = traced_blocks(0.3)
    with ScheduleDTRP(traced_stage, None, n_microbatches=2, **LIMIT) as schedule:
        drawn = [schedule.step(x) for _ in range(2)]
    return {
        **before, "x": x, "outputs": outputs, "moved": moved, "after": after, "counts": counts, "kept": kept,
        "drawn": drawn,
    }  # fmt: skip


@case
def forwards_beside_training() -> Result:
    torch.manual_seed(0)
    stage = one_of(lambda k: Block())
    (x,), _, y = numbers(8)
    with (
        ScheduleDTRP(stage, OPTIMIZERS["sgd"], 2, cross_entropy, **LIMIT) as training,
        ScheduleDTRP(stage, None, 2, **LIMIT) as forwards,
    ):
        for _ in range(3):
            training.step(x, target=y)
            out = forwards.step(x)
        again = training.eval(x)
    return {"same": out is None or torch.equal(out, again)}


# -- eval of traced stages ------------------------------------------------------------------------------------


class DropsAtTheEnd(nn.Module):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.first, self.second, self.dropout = Block(), Block(), nn.Dropout(rate)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.second(self.first(x)))


@case
def traced_eval() -> Result:
    torch.manual_seed(0)
    (x,), _, y = numbers(8)
    stage = traced(DropsAtTheEnd(0.0), torch.randn(3, WIDTH), ["second"])
    losses: list[Tensor] = []
    with ScheduleDTRP(stage, OPTIMIZERS["sgd"], 2, cross_entropy, **LIMIT) as schedule:
        for _ in range(3):
            schedule.step(x, target=y)
        out = schedule.eval(x, target=y, losses=losses)
    stage = traced(DropsAtTheEnd(0.1), torch.randn(3, WIDTH), ["second"])
    with ScheduleDTRP(stage, OPTIMIZERS["sgd"], 2, cross_entropy, **LIMIT) as schedule:
        refused = said_of(lambda: schedule.eval(x))
        schedule.step(x, target=y)
    stage = traced(DropsAtTheEnd(0.1).eval(), torch.randn(3, WIDTH), ["second"])
    with ScheduleDTRP(stage, OPTIMIZERS["sgd"], 2, cross_entropy, **LIMIT) as schedule:
        in_eval = schedule.eval(x)
    return {"x": x, "y": y, "out": out, "losses": losses, "refused": refused, "in_eval": in_eval}


# -- norms of gradients ---------------------------------------------------------------------------------------


@case
def gradient_norms() -> Result:
    """By method bp beside a plain loop, clipped and not; by dtrp, in which stages are at different mini-batches."""
    found: Result = {}
    for method, limit in (("bp", None), ("bp", 0.1), ("dtrp", None)):
        torch.manual_seed(0)
        blocks = [Block() for _ in range(world_size())]
        torch.manual_seed(1)
        seen = []
        stage = by_hand(blocks[rank()])
        with ScheduleDTRP(
            stage, OPTIMIZERS["sgd"], 2, cross_entropy, method=method, max_grad_norm=limit, **LIMIT
        ) as schedule:
            before = schedule.grad_norm(), schedule.grad_norms()
            for _ in range(6):
                (x,), _, y = numbers(8)
                schedule.step(x, target=y)
                seen.append((schedule.grad_norm(), schedule.grad_norms()[rank()]))
            schedule.flush()
            seen.append((schedule.grad_norm(), schedule.grad_norms()[rank()]))
        found[f"{method}, {limit}"] = {"before": before, "seen": seen}
    return found


# -- parameters that several stages have ----------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.norm(self.linear(x)))


class Repeated(nn.Module):
    """Calls a layer twice in each stage, as ALBERT does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer, self.middle = nn.Linear(WIDTH, WIDTH), Layer(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(self.layer(self.first(x)))
        return self.layer(self.layer(self.middle(x)))


TIED: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any]]] = {
    "tied": (Tied, words),
    "repeated": (Repeated, numbers),
}


def tied_stage(kind: str) -> Any:
    """Of a model that each rank has made with a seed of its own: the first stage's values are those of a shared one."""
    make, data = TIED[kind]
    return traced(make(), data(3)[0][0], ["middle"])


@case
def shared_parameters() -> Result:
    found: Result = {}
    for kind in TIED:
        for optimizer_name in ("momentum", "adam"):
            for given in ("object", "function"):
                torch.manual_seed(rank())
                stage = tied_stage(kind)
                make = OPTIMIZERS[optimizer_name]
                optimizer: Any = make(stage.submod.parameters()) if given == "object" else make
                torch.manual_seed(1)
                with ScheduleDTRP(stage, optimizer, 2, cross_entropy, method="bp", **LIMIT) as schedule:
                    losses: list[list[Tensor]] = []
                    for _ in range(4):
                        args, _, y = TIED[kind][1](8)
                        losses.append([])
                        schedule.step(*args, **({"target": y, "losses": losses[-1]} if is_last() else {}))
                    norm = schedule.grad_norm()
                weights = [values_of(stage.submod)]
                # Made again, with what the first has trained.
                with ScheduleDTRP(stage, optimizer, 2, cross_entropy, method="bp", **LIMIT) as schedule:
                    args, _, y = TIED[kind][1](8)
                    schedule.step(*args, **({"target": y} if is_last() else {}))
                weights.append(values_of(stage.submod))
                found[f"{kind}, {optimizer_name}, {given}"] = {"weights": weights, "losses": losses, "norm": norm}
    return found


def plain_tied(kind: str, optimizer_name: str) -> Result:
    """The whole model in a plain loop; its stages were made with two seeds."""
    make, data = TIED[kind]
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(make())
    model = models[0]
    model.middle.load_state_dict(models[1].middle.state_dict())  # type: ignore[union-attr, arg-type]
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    torch.manual_seed(1)
    losses, norms, weights = [], [], []
    for _ in range(5):
        (x,), _, y = data(8)
        each = [cross_entropy(model(a), b) for a, b in zip(x.tensor_split(2), y.tensor_split(2), strict=True)]
        optimizer.zero_grad()
        (sum(each) / 2).backward()  # type: ignore[union-attr]
        norms.append(float(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])))
        optimizer.step()
        losses.append([loss.detach() for loss in each])
        weights.append(values_of(model))
    return {"weights": weights[3:], "losses": losses, "norms": norms}


# -- habits of scripts ----------------------------------------------------------------------------------------


def accumulating(*, every: int, method: str) -> Result:
    torch.manual_seed(0)
    stage = one_of(lambda k: Block())
    optimizer = OPTIMIZERS["momentum"](stage.submod.parameters())
    torch.manual_seed(1)
    with (
        warnings.catch_warnings(record=True) as caught,
        ScheduleDTRP(stage, optimizer, 2, cross_entropy, method=method, **LIMIT) as schedule,
    ):
        warnings.simplefilter("always")
        for n in range(8):
            (x,), _, y = numbers(8)
            schedule.step(x, target=y)
            if (n + 1) % every == 0:
                optimizer.step()
                optimizer.zero_grad()
        schedule.flush()
        updates = schedule.num_updates
    optimizer.step()  # of the closed schedule's
    optimizer.step()
    return {"said": [str(w.message) for w in caught], "updates": updates, "weights": values_of(stage.submod)}


@case
def accumulation() -> Result:
    return {
        f"{method}, {every}": accumulating(every=every, method=method) for method in ("bp", "dtrp") for every in (1, 2)
    }


@case
def without_gradients() -> Result:
    """Under `torch.no_grad`, as `dtrp.Pipeline` does it: it trains."""
    found = {}
    for enabled in (True, False):
        torch.manual_seed(0)
        stage = one_of(lambda k: Block())
        torch.manual_seed(1)
        with (
            torch.set_grad_enabled(enabled),
            ScheduleDTRP(stage, OPTIMIZERS["momentum"], 2, cross_entropy, **LIMIT) as schedule,
        ):
            for _ in range(5):
                (x,), _, y = numbers(8)
                schedule.step(x, target=y)
        found[str(enabled)] = values_of(stage.submod)
    return found


def in_double(run: Callable[[], Result]) -> Result:
    torch.set_default_dtype(torch.float64)
    return run()


def cases(folder: str, *names: str) -> None:
    """Run cases in double precision, in one process group."""
    run_cases(folder, {name: functools.partial(in_double, CASES[name]) for name in names})


PROGRAMS["drop_in_forms"] = cases
