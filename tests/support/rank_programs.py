"""What ranks run: training runs, which the same functions also do in one process, and programs that go wrong.

    python rank_programs.py PROGRAM ARGUMENT...     one rank, in the environment of torchrun

A `Case` is a run of which the local engine and the ranks must make the same. Everything is drawn from seeds, so that
each process makes the same model and mini-batches by itself.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import json
import math
import multiprocessing
import os
import signal
import statistics
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import adding_models
import reaching_losses
import stateful_models
import torch
import torch.distributed as dist
import trained_losses
import unsplit
import varying_models
import weighted_losses
from drop_in_programs import PROGRAMS as DROP_IN_PROGRAMS
from helpers import (
    WIDTH,
    Prophet,
    adamw,
    block,
    cut,
    device_under_test,
    minibatches,
    network,
    pipeline,
    scheduler,
    sgd,
    with_aux,
)
from moving_models import KINDS as MOVING
from moving_models import model_of as moving_model
from moving_models import sequences
from split_models import MODELS as SPLIT_MODELS
from strained_models import MODELS, Tokens
from tied_models import TIED
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader, DistributedSampler
from tree_models import TREES

import dtrp
from dtrp.comm.process_groups import GroupFactory

OPTIMIZERS = {"sgd": sgd, "adamw": adamw}
Batch = tuple[Tensor, Tensor]
Result = dict[str, Any]


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """1 in the process that makes the reference."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(frozen=True)
class Case:
    """A run on ``num_ranks`` ranks; ``run`` does it there, and in one process."""

    num_ranks: int
    run: Callable[[], Result]


CASES: dict[str, Case] = {}


def run_case(name: str) -> Result:
    torch.manual_seed(0)
    if device_under_test().type == "cuda":  # bits are compared
        torch.use_deterministic_algorithms(True)
    try:
        return CASES[name].run()
    finally:
        torch.set_default_dtype(torch.float32)


def train(
    model: nn.Sequential | list[nn.Module],
    segments: list[list[Batch]],
    make_optimizer: Any = sgd,
    *,
    ends: tuple[int, int] | None = None,
    around: Callable[[], Any] = contextlib.nullcontext,
    **options: Any,
) -> Result:
    """Train with a flush after each segment; only the first rank is given x, and only the last one y (the first, by dgl).

    ``ends`` are the ranks that host the first and the last stage, if not the first and the last of all; every step runs
    within ``around``.
    """
    options.setdefault("timeout_s", 10.0)
    first, last = ends or (0, world_size() - 1)
    with pipeline(model, make_optimizer, **options) as pipe:
        losses = []
        for segment in segments:
            for x, y in segment:
                with around():
                    own = first if pipe.method.local else last
                    losses.append(pipe.step(x if rank() == first else None, y if rank() == own else None))
            pipe.flush()
        return result(pipe, losses)


def result(pipe: dtrp.Pipeline, losses: list[Tensor | None], **more: Any) -> Result:
    aux = pipe.state_dict()["aux"]["model"] if pipe.method.local and pipe.num_stages > 1 else {}
    return {
        "losses": losses,
        "weights": {**pipe.model_state_dict(), **aux},
        "delays": pipe.delays(),
        "gradients": [p for stage in pipe.stages for p in stage.parameters() if p.grad is not None],
        **more,
    }


# -- every method, K, A and optimizer -------------------------------------------------------------------------


def matrix_case(method: str, num_stages: int, num_microbatches: int, optimizer: str) -> str:
    return f"{method} K={num_stages} A={num_microbatches} {optimizer}"


def _matrix(method: str, num_stages: int, num_microbatches: int, optimizer: str) -> Callable[[], Result]:
    return lambda: train(
        network(),
        [minibatches(6, seed=1), minibatches(3, seed=2)],
        OPTIMIZERS[optimizer],
        num_stages=num_stages,
        method=method,
        num_microbatches=num_microbatches,
    )


MATRIX = list(itertools.product(dtrp.list_methods(), (2, 3, 4), (1, 2, 4), OPTIMIZERS))
# Every method with every K and both optimizers, and with every A.
SOME_OF_THE_MATRIX = [cell for cell in MATRIX if (1, 2, 4).index(cell[2]) == (sum(map(ord, cell[0])) + cell[1]) % 3]
CASES.update({matrix_case(*cell): Case(cell[1], _matrix(*cell)) for cell in MATRIX})

# -- models with forwards of their own --------------------------------------------------------------------------


def _model_of(kind: str) -> tuple[nn.Module, Any, list[tuple[Any, Tensor]]]:
    """The model in train mode, what it is called with, and mini-batches."""
    if kind in SPLIT_MODELS:
        build, data, _ = SPLIT_MODELS[kind]
    else:  # only where they are asked for: transformers takes seconds to import
        import hugging_face_models

        build, data, _ = hugging_face_models.MODELS[kind]
    model, x = build(), data()
    batches = unsplit.minibatches(x, unsplit.logits(unsplit.call(model.eval(), x)).shape[1], 5)
    return model.train(), x, batches


def _split(kind: str, method: str, num_stages: int) -> Result:
    kind, _, lowered = kind.partition(" in ")
    model, x, batches = _model_of(kind)
    stages = dtrp.split(model, num_stages=num_stages, example=x)
    with torch.autocast("cpu", torch.bfloat16, enabled=bool(lowered)):
        return _trained(stages, batches, method)


def _trained(
    stages: Any, batches: list[tuple[Any, Tensor]], method: Any, after: Callable[[dtrp.Pipeline], None] | None = None
) -> Result:
    options: dict[str, Any] = {"num_microbatches": 2, "seed": 7, "timeout_s": 20.0}
    with dtrp.Pipeline(stages, sgd, unsplit.loss_fn, method=method, **options) as pipe:
        losses = []
        for x, y in batches:
            losses.append(pipe.step(x if rank() == 0 else None, y if rank() == world_size() - 1 else None))
            if after is not None:
                after(pipe)
        pipe.flush()
        return result(pipe, losses)


def _oracle(kind: str, num_stages: int) -> Result:
    """dtrp, with the weights of a run of bp for predictions, is that run, to the bit."""
    torch.set_default_dtype(torch.float64)
    model, x, batches = _model_of(kind)
    splits = [dtrp.split(each, num_stages=num_stages, example=x) for each in (model, copy.deepcopy(model))]
    history = [[[p.detach().clone() for p in stage.parameters() if p.requires_grad]] for stage in splits[0]]

    def record(pipe: dtrp.Pipeline) -> None:
        for stage in pipe._engine.stages:
            history[stage.index].append([p.detach().clone() for p in stage.parameters])

    want = _trained(splits[0], batches, "bp", record)
    got = _trained(splits[1], batches, dtrp.get_method("dtrp", predict=Prophet(history)))
    for a, b in zip(got["losses"], want["losses"], strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    for name in want["weights"]:
        assert torch.equal(got["weights"][name], want["weights"][name]), name
    return got


SPLITS = [
    f"split {kind}, {method}"
    for kind, method in (
        ("u-net", "dtrp"),
        ("u-net", "fdg"),
        ("lstm, None", "dtrp"),
        ("siamese", "bp"),
        ("adapters", "dtrp"),
        ("regions", "fdg"),
        ("regions in bfloat16", "dtrp"),
    )
]
HUGGING_FACE = ["split gpt2, mask, dtrp", "split t5, dtrp", "split gpt2, tied, bp"]
for _name in [*SPLITS, *HUGGING_FACE]:
    _kind_of, _, _method = _name.removeprefix("split ").rpartition(", ")
    CASES[_name] = Case(2, functools.partial(_split, _kind_of, _method, 2))

TRANSFORMERS = ("gpt2", "gpt2, mask", "bert", "llama", "vit", "t5")
ORACLES = [f"oracle {kind}, K={num_stages}" for kind in [*SPLIT_MODELS, *TRANSFORMERS] for num_stages in (2, 4)]
for _name in ORACLES:
    _kind_of, _, _number = _name.removeprefix("oracle ").rpartition(", K=")
    CASES[_name] = Case(int(_number), functools.partial(_oracle, _kind_of, int(_number)))

# -- kinds of models ------------------------------------------------------------------------------------------


def _kind(kind: str, method: str) -> Result:
    make, data = {**MODELS, **TREES}[kind]
    model = nn.Sequential(*make())
    batches = [(data(), torch.randint(3, (12,))) for _ in range(5)]
    batches.append((cut(batches[0][0], 2)[0], batches[0][1][:6]))
    return train(model, [batches], num_stages=4, method=method, num_microbatches=2)


def _expanded(method: str) -> Result:
    model = nn.Sequential(Tokens(view=True), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    batches = [(torch.randn(12, 6), torch.randint(3, (12,))) for _ in range(6)]
    return train(model, [batches], num_stages=4, method=method, num_microbatches=2)


# Each kind by dtrp, which repeats forwards, or by fdg, which keeps graphs, in turn; and each by the other of them.
KINDS, OTHER_KINDS = (
    [f"{kind}, {('dtrp', 'fdg')[(n + i) % 2]}" for n, kind in enumerate([*MODELS, *TREES, "expanded output"])]
    for i in (0, 1)
)
for _name in [*KINDS, *OTHER_KINDS]:
    _kind_of, _, _method = _name.rpartition(", ")
    CASES[_name] = Case(
        4,
        (lambda method=_method: _expanded(method))
        if _kind_of == "expanded output"
        else (lambda kind=_kind_of, method=_method: _kind(kind, method)),
    )

# -- one by one -----------------------------------------------------------------------------------------------

SPECIAL: list[str] = []


def special(num_ranks: int, *variants: Any) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Makes a function a case, or one for each of its first argument's ``variants``."""

    def register(run: Callable[..., Result]) -> Callable[..., Result]:
        base = run.__name__.strip("_").replace("_", " ")
        for variant in variants or (None,):
            name = base if variant is None else f"{base}, {variant}"
            CASES[name] = Case(num_ranks, run if variant is None else (lambda variant=variant: run(variant)))
            SPECIAL.append(name)
        return run

    return register


def without_noise(layers: int = 4, width: int = WIDTH) -> nn.Sequential:
    """Neither BatchNorm, which one sample is too few for, nor dropout."""
    inner = [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(layers - 1)]
    return nn.Sequential(*inner, nn.Linear(width, 3))


@special(2)
def _compiled_stages() -> Result:
    return train(
        network(), [minibatches(6)], num_stages=2, method="dtrp", compile={"backend": "aot_eager"}, timeout_s=60.0
    )


def _hooked(method: str) -> Result:
    model = without_noise(6)
    model[0][0].weight.register_hook(lambda gradient: gradient.clamp(-1e-2, 1e-2))
    model[2][0].weight.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", p.grad / 2))
    model[5].bias.register_hook(lambda gradient: gradient * 2)
    return train(model, [minibatches(8)], num_stages=3, method=method, num_microbatches=2)


HOOKED = [f"hooks on parameters, {method}" for method in ("fdg", "spectrain", "dtrp", "bp")]
CASES.update({name: Case(3, functools.partial(_hooked, name.rpartition(" ")[2])) for name in HOOKED})


def compiled_as_by_default() -> Result:
    with warnings.catch_warnings():  # torch's compiler imports deprecated parts of torch
        warnings.simplefilter("ignore")
        return train(network(), [minibatches(6)], num_stages=2, method="spectrain", compile=True, timeout_s=120.0)


CASES["stages compiled as by default"] = Case(2, compiled_as_by_default)


@special(2, "dtrp", "fdg", "bp")
def _texts_padded_to_the_longest(method: str) -> Result:
    x, varying = varying_models.texts(5, 7), varying_models.VARYING
    stages = dtrp.split(varying_models.Classifier(), num_stages=2, example=x, dynamic_shapes=varying)
    return _trained(stages, varying_models.batches(varying_models.SHAPES), method)


@special(3, "dtrp", "spectrain", "bp")
def _image_sizes_and_batch_sizes_change(method: str) -> Result:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()),
        nn.Conv2d(4, 6, 3),
        nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(6, 3),
    )
    shapes = [(8, 8, 8), (5, 12, 10), (16, 6, 6), (4, 20, 16), (9, 8, 8), (2, 5, 31), (32, 9, 9), (6, 8, 8)]
    batches = [(torch.randn(n, 3, h, w), torch.randint(3, (n,))) for n, h, w in shapes]
    return train(model, [batches], num_stages=3, method=method, num_microbatches=2)


@special(3, *dtrp.list_methods())
def _fewer_samples_than_microbatches(method: str) -> Result:
    batches = [(torch.randn(n, WIDTH), torch.randint(3, (n,))) for n in (8, 2, 1, 3, 8, 1, 4, 1, 1, 5)]
    return train(without_noise(), [batches], num_stages=3, method=method, num_microbatches=4)


@special(3, *dtrp.list_methods())
def _as_many_microbatches_as_stages(method: str) -> Result:
    batches = [(torch.randn(n, WIDTH), torch.randint(3, (n,))) for n in (8, 5, 1, 3, 12, 6, 4, 2, 1, 5)]
    done = train(without_noise(), [batches], num_stages=3, method=method, num_microbatches="auto")
    (counts,) = {sum(counts.values()) for counts in done["delays"].values()}
    assert counts == 3 + 2 + 1 + 1 + 3 + 3 + 2 + 1 + 1 + 2
    return done


@special(3, *dtrp.list_methods())
def _each_stage_keeps_what_it_is_told(method: str) -> Result:
    return train(
        network(), [minibatches(8), minibatches(4)], num_stages=3, method=method, num_microbatches=2,
        keep=["input", "graph", "graph"],
    )  # fmt: skip


@special(3, 10**9, 28_000)
def _each_stage_keeps_what_fits(limit: int) -> Result:
    with pipeline(
        without_noise(6, 16), sgd, num_stages=3, keep="auto", memory_limit_bytes=limit, timeout_s=10.0
    ) as pipe:
        batches = [(torch.randn(32, 16), torch.randint(3, (32,))) for _ in range(8)]
        losses = [pipe.step(x, y) for x, y in batches]
        pipe.flush()
        return result(pipe, losses, keeps=pipe.keeps())


@special(3, "dtrp", "bp")
def _busy_and_waiting_time_adds_up(method: str) -> Result:
    with pipeline(network(), sgd, num_stages=3, method=method, num_microbatches=2, timeout_s=10.0) as pipe:
        losses = [pipe.step(x, y) for x, y in minibatches(8)]
        time.sleep(0.05)
        losses += [pipe.step(x, y) for x, y in minibatches(1)]
        pipe.flush()
        for k, seconds in pipe.busy().items():
            parts = [value for name, value in seconds.items() if name != "elapsed"]
            assert all(value >= 0 for value in parts), seconds
            assert abs(sum(parts) - seconds["elapsed"]) < 1e-6, seconds
            assert seconds["busy"] > 0, seconds
            assert seconds["outside"] >= 0.05, seconds
            if world_size() > 1:
                assert (seconds["wait_forward"] > 0) == (k > 0), seconds
                assert (seconds["wait_gradient"] > 0) == (k < 2), seconds
                assert seconds["wait_send"] > 0, seconds
        assert loops_of_gloo() <= 1  # which wake a hundred times a second: the default group's serves all others
        return result(pipe, losses)


def loops_of_gloo() -> int:
    """Its threads in this process that watch connections; 0 where threads have no names."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return names.count("gloo_tcp_loop")


class Slow(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.01)
        return super().forward(x)


@special(2)
def _no_stage_piles_up_messages_before_a_slower_one() -> Result:
    with pipeline([nn.Linear(2000, 2000), Slow(2000, 3)], num_stages=2, method="dgl", timeout_s=20.0) as pipe:
        losses = []
        for _ in range(20):
            x, y = torch.randn(32, 2000), torch.randint(3, (32,))
            losses.append(pipe.step(x if rank() == 0 else None, y))  # the last one may have it too: they are compared
            if world_size() > 1 and rank() == 0:
                link: Any = pipe._engine._transport.forward_out  # type: ignore[attr-defined]
                assert link.begun - link.finished <= 6
        pipe.flush()
        return result(pipe, losses)


@special(2, "dtrp", "fdg")
def _everything_is_on_the_device(method: str) -> Result:
    batches = [(x.to(device_under_test()), y.to(device_under_test())) for x, y in minibatches(6)]
    return train(network().to(device_under_test()), [batches], num_stages=2, method=method, num_microbatches=2)


class Column(nn.Module):
    """Its output is a column of a wider tensor: mostly holes."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1, WIDTH).repeat(1, 9, 1)[:, 0]


class Centered(nn.Module):
    """Sums in an order that depends on the strides."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean()) / (1 + x.norm())


@special(2, "bp", "dtrp", "fdg")
def _an_output_with_holes(method: str) -> Result:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Column(), Centered(), nn.Linear(WIDTH, 3))
    return train(model, [minibatches(9)], num_stages=2, method=method)


@special(2, "dtrp")
def _infer_in_inference_mode_and_out_of_it(method: str) -> Result:
    pipe = pipeline(without_noise(), num_stages=2, method=method)
    losses, outputs = [], []
    for x, y in minibatches(6):
        losses.append(pipe.step(x if pipe.is_first else None, y if pipe.is_last else None))
        for _ in range(3):
            with torch.inference_mode():
                outputs.append(pipe.infer(x if pipe.is_first else None))
            outputs.append(pipe.infer(x if pipe.is_first else None))
    pipe.flush()
    return result(pipe, losses, outputs=[out.clone() for out in outputs if out is not None])


@special(3, "dtrp", "fdg", "bp", "spectrain", "dgl")
def _frozen_front_stage(method: str) -> Result:
    model = network()
    for p in model[:3].parameters():
        p.requires_grad_(False)
    return train(model, [minibatches(7)], num_stages=3, method=method, num_microbatches=2)


@special(4, "dtrp", "fdg", "bp")
def _frozen_stages_in_front_and_in_the_middle(method: str) -> Result:
    model = network()
    for k in (0, 1, 2, 3, 5):
        model[k].requires_grad_(False)
    return train(model, [minibatches(7)], adamw, cuts=[2, 4, 5], method=method)


@special(3, "dtrp", "fdg", "bp", "dgl")
def _a_stage_without_parameters(method: str) -> Result:
    stages = [nn.Linear(WIDTH, WIDTH), nn.Sequential(nn.Tanh(), nn.Dropout(0.2)), nn.Linear(WIDTH, 3)]
    return train(stages, [minibatches(7)], method=method, num_microbatches=2)


@special(2, *dtrp.list_methods())
def _autocast(method: str) -> Result:
    return train(
        network(),
        [minibatches(6)],
        num_stages=2,
        method=method,
        num_microbatches=2,
        around=lambda: torch.autocast(device_under_test().type, dtype=torch.bfloat16),
    )


@special(2, torch.float64, torch.bfloat16)
def _dtype(dtype: torch.dtype) -> Result:
    model = without_noise().to(dtype)
    batches = [(x.to(dtype), y) for x, y in minibatches(6)]
    return train(model, [batches], num_stages=2)


@special(3, "dtrp", "bp")
def _models_made_from_different_seeds_and_no_seed_given(method: str) -> Result:
    torch.manual_seed(100 + rank())
    model = network()
    with dtrp.Pipeline(
        model, sgd, nn.functional.cross_entropy, num_stages=3, method=method, lr_scheduler=scheduler, num_microbatches=1
    ) as pipe:
        batches = minibatches(6)
        losses = [pipe.step(x if rank() == 0 else None, y if rank() == world_size() - 1 else None) for x, y in batches]
        pipe.flush()
        return result(pipe, losses, seed=pipe.seed)


@special(3, "dtrp", "fdg", "bp")
def _a_list_of_modules(method: str) -> Result:
    stages = [nn.Sequential(*part) for part in (network()[:2], network()[2:5], network()[5:])]
    done = train(stages, [minibatches(7)], method=method, num_microbatches=2)
    # The parameters stay the model's own objects; this rank trained those of its stage.
    hosted = range(3) if world_size() == 1 else [rank()]
    return {**done, "own": {f"{k}.{name}": t for k in hosted for name, t in stages[k].state_dict().items()}}


@special(3, "dtrp", "gpipe")
def _number_of_stages_from_the_world(method: str) -> Result:
    options = {} if world_size() > 1 else {"num_stages": 3}
    return train(network(), [minibatches(7)], method=method, **options)


@special(3, "dtrp", "adl")
def _uneven_cuts(method: str) -> Result:
    return train(network(), [minibatches(7)], cuts=[1, 6], method=method, num_microbatches=2)


@special(3, "grad_shrink", "lr_shrink", "ahead", "forward first", "input kept", "gradients in prediction")
def _a_field_of_the_row(field: str) -> Result:
    method = {
        "grad_shrink": dtrp.get_method("fdg", grad_shrink=0.5),
        "lr_shrink": dtrp.get_method("dtrp", lr_shrink=0.7),
        "ahead": dtrp.get_method("dtrp", ahead=1.5, predict="linear"),
        "forward first": dtrp.get_method("dtrp", backward_first=False),
        "input kept": dtrp.get_method("pipedream", keep="input"),
        "gradients in prediction": dtrp.get_method("dtrp", predict="informed"),
    }[field]
    return train(network(), [minibatches(8)], num_stages=3, method=method, num_microbatches=2)


@special(3, "dtrp", "bp")
def _the_loss_on_all_ranks(method: str) -> Result:
    return train(network(), [minibatches(7)], num_stages=3, method=method, num_microbatches=2, loss_on="all")


@special(2, "dtrp", "fdg")
def _flush_after_every_minibatch_and_twice(method: str) -> Result:
    segments: list[list[Batch]] = [[batch] for batch in minibatches(4)]
    return train(network(), [[], *segments, []], num_stages=2, method=method, num_microbatches=2)


TIES: dict[str, tuple[str, dict[str, Any]]] = {
    **{kind: (kind, {"method": "bp"}) for kind in TIED},
    "gpipe": ("three holders and two ties", {"method": "gpipe"}),
    "all clip": ("three holders and two ties", {"method": "bp", "max_grad_norm": 0.2, "clip": "global"}),
    "skip": ("embedding and head", {"method": "gpipe", "max_grad_norm": 0.3, "on_nonfinite": "skip"}),
    "recomputed": ("embedding and head", {"method": dtrp.get_method("bp", keep="input")}),
    "frozen": ("embedding and head", {"method": "dtrp"}),
    "saved": ("three holders and two ties", {"method": "bp"}),
}


@special(4, *TIES)
def _tied_parameters(variant: str) -> Result:
    """After every step their copies are the same."""
    kind, options = TIES[variant]
    make, data = TIED[kind]
    model = nn.Sequential(*make())
    if variant == "frozen":
        model[0].requires_grad_(False)
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    batches = [(data(), torch.randint(3, (12,))) for _ in range(7)]
    batches[4] = (batches[4][0][:1], batches[4][1][:1])
    options = {"num_stages": 4, "num_microbatches": 2, "timeout_s": 10.0, **options}
    pipe = pipeline(model, adamw, **options)
    losses = []
    for i, (x, y) in enumerate(batches):
        if i == 3 and variant == "saved" and world_size() > 1:
            pipe.save(Path(os.environ["SCRATCH"], "tied"))
            pipe.close()
            pipe = pipeline(nn.Sequential(*make()), adamw, **options)
            pipe.load(Path(os.environ["SCRATCH"], "tied"))
        if i == 3 and variant == "skip":
            with torch.no_grad():  # what only the head sees
                for stage in pipe.stages:
                    for name, p in stage.named_parameters():
                        if name == "3.1.bias":
                            p.fill_(math.inf)
        losses.append(pipe.step(x, y))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r".*call flush\(\)")
            whole = pipe.model_state_dict()
        assert all(torch.equal(whole[name], whole[each[0]]) for each in names.values() for name in each)
        if i == 3 and variant == "skip":
            assert all(skipped == [3] for skipped in pipe.skipped_updates().values())
            with torch.no_grad():
                for stage in pipe.stages:
                    for name, p in stage.named_parameters():
                        if name == "3.1.bias":
                            p.fill_(0.0)
    pipe.flush()
    done = result(pipe, [None if loss is None else loss.nan_to_num(-1.0) for loss in losses])
    pipe.close()
    return done


@special(3, "dtrp", "spectrain")
def _state_dicts_and_infer(method: str) -> Result:
    """All that is collective, some of it with micro-batches in flight."""
    seen: dict[str, Any] = {}
    last = world_size() - 1

    def feed(pipe: dtrp.Pipeline, batches: list[Batch]) -> list[Tensor | None]:
        return [pipe.step(x if rank() == 0 else None, y if rank() == last else None) for x, y in batches]

    def infer(pipe: dtrp.Pipeline, n: int) -> Tensor | None:
        x = torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(n))
        return pipe.infer(x if rank() == 0 else None)

    options = {"num_stages": 3, "method": method, "num_microbatches": 2}
    with pipeline(network(), adamw, **options) as pipe:
        losses = feed(pipe, minibatches(5))
        seen["infer"] = [infer(pipe, n) for n in (1, 3, 200)]
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            seen["state in flight"] = pipe.state_dict()
            seen["model in flight"] = pipe.model_state_dict()
        assert ["call flush() before it" in str(each.message) for each in told] == [True] * (rank() == 0)
        losses += feed(pipe, minibatches(3, seed=2))
        pipe.flush()
        state = pipe.state_dict()
        seen["state"] = state
        losses += feed(pipe, minibatches(3, seed=3))
        pipe.flush()
        pipe.load_state_dict(state)
        seen["num_updates"] = pipe.num_updates
        seen["infer"].append(infer(pipe, 4))
        losses += feed(pipe, minibatches(3, seed=4))
        pipe.flush()
        path = Path(os.environ.get("SCRATCH", "."), f"model{world_size()}.{method}.pt")
        pipe.save_model(path)
        seen["saved"] = torch.load(path)
        first = result(pipe, losses)  # when all have read it
        if rank() == 0:
            path.unlink()
    with pipeline(network(), adamw, **options) as pipe:  # the next one goes on from it
        pipe.load_state_dict(state)
        more = feed(pipe, minibatches(3, seed=4))
        pipe.flush()
        seen["continued"] = pipe.model_state_dict()
        return {**first, "losses": [*losses, *more], **seen}


def _saved(
    method: str | dtrp.Method, num_stages: int, parts: int, make_optimizer: Any, stops: list[int], **more: Any
) -> Result:
    """Stopped at each of ``stops`` and taken up by another pipeline on ranks; never stopped in one process."""
    make_model, batches = more.pop("model", network), more.pop("batches", None)
    options = {"num_stages": num_stages, "method": method, "num_microbatches": parts, "timeout_s": 10.0, **more}
    if batches is None:
        batches = minibatches(10)
        batches[3] = (batches[3][0][:11], batches[3][1][:11])
    pipe = pipeline(make_model(), make_optimizer, **options)
    losses: list[Tensor | None] = []
    for i, (x, y) in enumerate(batches):
        if i in stops and world_size() > 1:
            folder = Path(os.environ["SCRATCH"], "saved")
            pipe.save(folder, extra={"next": i})
            pipe.close()
            torch.manual_seed(5)  # other initial weights, and another seed
            options["seed"] = 100 + i
            model = make_model()
            pipe = dtrp.Pipeline(
                model,
                make_optimizer,
                nn.functional.cross_entropy,
                lr_scheduler=scheduler,
                **{"num_microbatches": 1, **options},
                **with_aux(method),
            )
            assert pipe.load(folder) == {"next": i}
            assert pipe.seed == 7
        if i == 6:
            pipe.flush()
        reads_y = pipe.is_first if pipe.method.local else pipe.is_last
        losses.append(pipe.step(x if pipe.is_first else None, y if reads_y else None))
    pipe.flush()
    done = result(pipe, losses, state=pipe.state_dict()["optimizer"]["state"])
    pipe.close()
    return done


@special(3, *(f"{kind.__name__} by {method}" for kind in MOVING for method in ("dtrp", "fdg")))
def _buffers_that_forwards_read_and_move(cell: str) -> Result:
    """Through checkpoints too, but for one whose state is no buffer alone."""
    name, _, method = cell.partition(" by ")
    (kind,) = (each for each in MOVING if each.__name__ == name)
    stops = [] if name == "Replaced" else [1, 2, 5]
    return _saved(method, 3, 2, adamw, stops, model=lambda: moving_model(kind), batches=sequences())


@special(3, "dtrp", "adl", "gpipe", "ddg", "dgl")  # all of them, between processes, in test_going_on
def _saved_and_loaded(method: str) -> Result:
    return _saved(method, 3, 4 if method in ("dtrp", "adl", "gpipe") else 1, sgd, [1, 2, 5, 6, 9])


@special(4, "dtrp", "fdg", "spectrain")
def _saved_and_loaded_on_four(method: str) -> Result:
    return _saved(method, 4, 4, adamw, [1, 4, 7])


@special(3, "dtrp", "spectrain")
def _saved_and_loaded_where_gradients_are_predicted_from(method: str) -> Result:
    row = dtrp.get_method(method, predict="informed")
    return _saved(row, 3, 4, adamw, [1, 4, 7])


@special(3, "dtrp, auto", "spectrain, scaled", "dtrp-1f1b, last")
def _saved_and_loaded_with_predictors_that_have_a_state(cell: str) -> Result:
    method, predict = cell.split(", ")
    make = functools.partial(torch.optim.RMSprop, lr=0.01) if predict == "auto" else adamw
    return _saved(dtrp.get_method(method, predict=predict), 3, 2, make, [1, 4, 7])


@special(2, 1, 4)
def _a_predictor_of_the_users(num_microbatches: int) -> Result:
    """A predictor of the user's: called with this stage's parameters, and its answer is read."""
    asked: list[tuple[int, int, int, int]] = []

    def predictor(parameters: Any, optimizer: Any, horizon: int, out: Any, **where: int) -> None:
        asked.append((where["stage"], where["microbatch"], where["version"], horizon))
        for o, w in zip(out, parameters, strict=True):
            o.copy_(w * (1 - 0.001 * horizon))

    method = dtrp.get_method("dtrp", predict=predictor)
    done = train(network(), [minibatches(7)], num_stages=2, method=method, num_microbatches=num_microbatches)
    return {**done, "asked": asked}


# -- groups of ranks ------------------------------------------------------------------------------------------


def subset(method: str) -> Result:
    """A pipeline of two on the ranks 1 and 2 of three; rank 0 has none."""
    if world_size() == 1:
        return train(network(), [minibatches(6)], num_stages=2, method=method, num_microbatches=2)
    join()
    group = dist.new_group([1, 2])
    if rank() == 0:
        return {}
    return train(network(), [minibatches(6)], num_stages=2, method=method, num_microbatches=2, group=group, ends=(1, 2))


SUBSETS = {f"a subset of the ranks, {method}": method for method in ("dtrp", "fdg", "bp")}
CASES.update({name: Case(3, lambda method=method: subset(method)) for name, method in SUBSETS.items()})

# The parts of the shards have such sizes that tensor_split cuts their concatenation into the same micro-batches.
SHARDS = {
    "equal": [(8, 8)] * 6 + [(4, 4)],
    "unequal": [(6, 4), (7, 4), (2, 8), (6, 4), (12, 4), (7, 4), (4, 2)],
    "fewer than A": [(6, 4), (1, 2), (2, 4), (1, 2), (1, 2), (6, 4), (4, 2)],
    "fewer than A of two": [(6, 4), (1, 4), (1, 2), (2, 1), (6, 4), (1, 8), (4, 1)],
}


def replicas(
    method: str,
    num_microbatches: int | str,
    shards: str,
    optimizer: str = "sgd",
    tied: bool = False,
    synced: bool = False,
) -> Result:
    """Two replicas of two stages, or one process whose micro-batches are the replicas' ones put together."""
    torch.set_default_dtype(torch.float64)
    model = without_noise()
    if synced:  # BatchNorm, and no dropout
        model = nn.Sequential(*(block(WIDTH, WIDTH)[:3] for _ in range(3)), nn.Linear(WIDTH, 3))
    if tied:
        model[2][0].weight = model[0][0].weight
    batches = []
    for sizes in SHARDS[shards]:
        parts = []
        for n in sizes:
            x, y = torch.randn(n, WIDTH), torch.randint(3, (n,))
            cut = max(1, min(2, n // 2)) if num_microbatches == "auto" else min(n, int(num_microbatches))
            parts.append(list(zip(torch.tensor_split(x, cut), torch.tensor_split(y, cut), strict=True)))
        if world_size() == 1:
            mine = [part for together in itertools.zip_longest(*parts) for part in together if part is not None]
            whole = [[p for p in ps if p is not None] for ps in itertools.zip_longest(*parts)]
            cuts = [len(x) for x in torch.tensor_split(torch.empty(sum(sizes)), len(whole))]
            assert cuts == [sum(len(x) for x, _ in ps) for ps in whole], "the test's own sizes"
        else:
            mine = parts[rank() // 2]
        batches.append((torch.cat([x for x, _ in mine]), torch.cat([y for _, y in mine])))
    options: dict[str, Any] = {"num_stages": 2, "method": method, "num_microbatches": num_microbatches}
    if world_size() > 1:
        join()
        options["mesh"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "stage"))
        options["ends"] = (rank() // 2 * 2, rank() // 2 * 2 + 1)
        if synced:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model, options["mesh"].get_group("replica"))
    return train(model, [batches[:4], batches[4:]], OPTIMIZERS[optimizer], **options)


CLIPPING: dict[str, dict[str, Any]] = {
    "each stage, dtrp": {"method": "dtrp", "max_grad_norm": 0.3},
    "each stage, skip, fdg": {"method": "fdg", "max_grad_norm": 0.3, "on_nonfinite": "skip"},
    "all, bp": {"method": "bp", "max_grad_norm": 0.3, "clip": "global"},
    "all, skip, gpipe": {"method": "gpipe", "max_grad_norm": 0.3, "clip": "global", "on_nonfinite": "skip"},
    "each stage, skip, dgl": {"method": "dgl", "max_grad_norm": 0.3, "on_nonfinite": "skip"},
    "skip, bp": {"method": "bp", "on_nonfinite": "skip"},
    "skip, dtrp": {"method": "dtrp", "on_nonfinite": "skip"},
    "skip, ignored labels, fr": {"method": "fr", "on_nonfinite": "skip"},
    "skip, ignored labels, dgl": {"method": "dgl", "on_nonfinite": "skip"},
}


@special(3, *CLIPPING)
def clips_and_leaves_out(variant: str) -> Result:
    """One mini-batch's input or loss is not finite; its update is left out where the rule says so."""
    options = CLIPPING[variant]
    batches = minibatches(9)
    skips = options.get("on_nonfinite") == "skip"
    if "ignored" in variant:
        batches[5][1].fill_(-100)
    elif skips:
        batches[5] = (batches[5][0] * math.nan, batches[5][1])
    with pipeline(without_noise(), num_stages=3, num_microbatches=2, timeout_s=10.0, **options) as pipe:
        losses = [pipe.step(x, y) for x, y in batches]
        pipe.flush()
        assert all(own == ([5] if skips else []) for own in pipe.skipped_updates().values())
        # Equal to itself, unlike nan; a loss that is not finite is None on all ranks but the last anyway.
        return result(pipe, [None if loss is None else loss.nan_to_num(-1.0) for loss in losses])


REPLICAS: dict[str, tuple[Any, ...]] = {
    f"replicas, {method}, A={a}, {shards}, {optimizer}": (method, a, shards, optimizer)
    for method, a, shards, optimizer in [
        *itertools.product(("bp", "dtrp"), (1, 2), ("equal", "unequal"), ("sgd",)),
        *itertools.product(("fdg", "dtrp"), (2,), ("unequal",), ("adamw",)),
        *itertools.product(("bp", "dtrp", "fdg", "dgl"), (2,), ("fewer than A",), ("sgd",)),
        *itertools.product(("bp", "dtrp", "dgl"), ("auto",), ("fewer than A of two",), ("sgd",)),
    ]
}
REPLICAS |= {
    f"replicas, bp, {shards}, tied": ("bp", 2, shards, "adamw", True) for shards in ("unequal", "fewer than A")
}
SYNCED: dict[str, tuple[Any, ...]] = {  # on a GPU only
    f"replicas, {method}, {shards}, SyncBatchNorm": (method, 2, shards, "sgd", False, True)
    for method, shards in itertools.product(("bp", "dtrp", "fdg"), ("equal", "unequal"))
}
CASES.update({name: Case(4, lambda cell=cell: replicas(*cell)) for name, cell in (REPLICAS | SYNCED).items()})

# -- programs -------------------------------------------------------------------------------------------------


def join() -> None:
    if not dist.is_initialized():
        dist.init_process_group("gloo")


def ready(folder: str) -> None:
    """For `Ranks.await_ready`: this rank is in the middle of its work."""
    path = Path(folder, f"ready{rank()}")
    temporary = path.with_suffix(".new")
    temporary.write_text(str(os.getpid()))
    temporary.replace(path)


def endless() -> Iterator[tuple[int, Tensor, Tensor]]:
    for i in itertools.count():
        generator = torch.Generator().manual_seed(i)
        yield i, torch.randn(32, WIDTH, generator=generator), torch.randint(3, (32,), generator=generator)


def cases(folder: str, *names: str) -> None:
    """Run cases in one process group, each with a Pipeline of its own; results are written even if one fails."""
    os.environ["SCRATCH"] = folder
    results: dict[str, Any] = {}
    try:
        for name in names:
            print(name, flush=True)  # for who looks at a launch that does not end
            try:
                results[name] = run_case(name)
            except BaseException:
                results[name] = traceback.format_exc()
                raise
        if dist.is_initialized():
            dist.barrier()  # rank 0 holds the store, and may have had nothing to do
    finally:
        torch.save(results, Path(folder, f"results{rank()}.pt"))


def train_until_killed(folder: str, method: str, timeout_s: float = 10.0) -> None:
    pipe = pipeline(network(), num_stages=world_size(), method=method, num_microbatches=2, timeout_s=timeout_s)
    for i, x, y in endless():
        pipe.step(x, y)
        if i == 3:
            ready(folder)


class Fails(nn.Module):
    """Raises in the forward, or in the backward, of a micro-batch."""

    def __init__(self, where: str, microbatch: int, recomputes: bool) -> None:
        super().__init__()
        self.where, self.microbatch, self.recomputes, self.calls = where, microbatch, recomputes, 0

    def forward(self, x: Tensor) -> Tensor:
        # A method that recomputes runs a micro-batch without a graph first, and with one in its backward.
        first = not (self.recomputes and torch.is_grad_enabled())
        if self.recomputes and first == (self.where == "backward"):
            return x
        self.calls += 1
        now = self.calls == self.microbatch + 1
        if self.where == "backward":
            out: Tensor = FailsBackward.apply(x, now)
            return out
        if now:
            raise ValueError("the sensor is on fire")
        return x


class FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fails: bool) -> Tensor:
        ctx.fails = fails
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if ctx.fails:
            raise ValueError("the sensor is on fire")
        return grad, None


def fail_in_stage(folder: str, where: str, method: str, stage: int, context: bool) -> None:
    """Training that fails at micro-batch 5 of a stage."""
    del folder
    model = network(8)
    recomputes = dtrp.get_method(method).keep == "input" and stage < 3
    model[2 * stage] = nn.Sequential(model[2 * stage], Fails(where, 5, recomputes))
    pipe = pipeline(model, num_stages=4, method=method, timeout_s=10)
    try:
        with pipe if context else contextlib.nullcontext():
            for _, x, y in endless():
                pipe.step(x, y)
    finally:
        assert all(p.grad is None for p in model.parameters())


class MuteError(Exception):
    """One that cannot even say what it is."""

    def __str__(self) -> str:
        raise self


def fail_at_length(folder: str, how: str) -> None:
    """Stage 1 raises what is hard to tell; each rank writes what it hears."""
    model = without_noise(3)
    errors = {"long": FloatingPointError("overflow in layer 7, " + "\U0001f600" * 35_000), "mute": MuteError("mute")}

    def fail(module: nn.Module, x: Any) -> None:
        raise errors[how]

    model[1].register_forward_pre_hook(fail)
    pipe = pipeline(model, num_stages=3, timeout_s=10)
    try:
        for x, y in minibatches(12):
            pipe.step(x, y)
    except dtrp.StageError as error:
        Path(folder, f"heard{rank()}.json").write_text(
            json.dumps([error.stage, str(error)[:120], len(str(error.__cause__.args))])
        )


def repeats_otherwise(folder: str, name: str) -> None:
    """Stage 1 has a module that is another function when its forward is repeated."""
    del folder
    made = stateful_models.model_of(getattr(stateful_models, name))
    stages = [nn.Linear(4, 4).double(), made[:2], made[2:]]
    with dtrp.Pipeline(
        stages, sgd, nn.functional.cross_entropy, method="dtrp", timeout_s=10, num_microbatches=1
    ) as pipe:
        for x, y in stateful_models.batches():
            pipe.step(x, y)


def nonfinite_gradient(folder: str, stage: int, options: dict[str, Any]) -> None:
    """The gradient of one parameter of ``stage`` is not finite in mini-batch 4; each rank writes what it hears."""
    model = without_noise(3)
    calls = itertools.count()

    def spoil(p: Tensor) -> None:
        if next(calls) == 4:
            p.grad.fill_(math.inf)

    model[stage][0].bias.register_post_accumulate_grad_hook(spoil)
    pipe = pipeline(model, num_stages=3, timeout_s=10, **options)
    try:
        for x, y in minibatches(12):
            pipe.step(x, y)
        pipe.flush()
    except dtrp.StageError as error:
        heard = [error.stage, error.minibatch, type(error.__cause__).__name__, str(error.__cause__)]
        Path(folder, f"heard{rank()}.json").write_text(json.dumps(heard))


def refused_loss(folder: str, case: str, method: str) -> None:
    """A loss that reaches another stage; each rank writes what it hears."""
    model = reaching_losses.model_of()
    loss_fn = reaching_losses.REACHING[case][0](model)
    pipe = dtrp.Pipeline(model, sgd, loss_fn, num_stages=3, method=method, num_microbatches=2, timeout_s=10)
    try:
        for x, y in reaching_losses.batches_of():
            pipe.step(x, y)
        pipe.flush()
    except dtrp.StageError as error:
        Path(folder, f"heard{rank()}.json").write_text(json.dumps(str(error)))


def skips_with_replicas(folder: str, method: str) -> None:
    """In mini-batch 2 the second replica's labels are ignored in a micro-batch; each rank writes what it has left out."""
    join()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "stage"))
    options: dict[str, Any] = {"num_microbatches": 2, "on_nonfinite": "skip", "mesh": mesh, "timeout_s": 10}
    with pipeline(without_noise(), num_stages=2, method=method, **options) as pipe:
        for n, (x, y) in enumerate(minibatches(5)):
            if n == 2 and rank() > 1:
                y[: len(y) // 2] = -100
            pipe.step(x, y)
        pipe.flush()
        (skipped,) = pipe.skipped_updates().values()
    Path(folder, f"skipped{rank()}.json").write_text(json.dumps(skipped))


def weighted_run(
    folder: str, kind: str, method: str, num_replicas: int = 1, loads: str = "", *, on_ranks: bool = True
) -> None:
    """Eight mini-batches of a model that adds terms, by a loss that weighs; saved after the fourth, or taken up there.

    A replica passes each ``num_replicas``-th sample. Each rank writes its losses; the first the model.
    """
    torch.set_default_dtype(torch.float64)
    options: dict[str, Any] = {}
    num_stages = 3
    place = replica = 0
    if on_ranks:
        join()
        place, num_stages = rank(), world_size() // num_replicas
        replica = place // num_stages
    if num_replicas > 1:
        options["mesh"] = init_device_mesh("cpu", (num_replicas, num_stages), mesh_dim_names=("replica", "stage"))
    loss_fn, weigh = weighted_losses.LOSSES["ignored"]
    if kind in adding_models.MODELS:
        model: Any = dtrp.split(
            adding_models.build(kind), points=adding_models.MODELS[kind][1], example=adding_models.inputs()
        )
    else:
        model = weighted_losses.adding(kind)
        options["cuts"] = [2, 5] if num_stages == 3 else [4]
    pipe = dtrp.Pipeline(
        model,
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        loss_fn,
        method=method,
        num_microbatches=3,
        loss_weight=weigh,
        seed=7,
        timeout_s=20,
        **with_aux(method, num_classes=6),
        **options,
    )
    losses = []
    if loads:
        pipe.load(loads)
    for n, (x, y) in enumerate(weighted_losses.labelled("ignored", 8)):
        if n < pipe.num_updates:
            continue
        losses.append(pipe.step(x[replica::num_replicas], y[replica::num_replicas]))
        if n == 3 and not loads:
            pipe.save(Path(folder, "saved"))
    pipe.flush()
    torch.save((losses, pipe.model_state_dict()), Path(folder, f"run{place}.pt"))
    pipe.close()


def trained_loss_run(folder: str, *, on_ranks: bool = True) -> None:
    """A loss with parameters; the ranks begin with other values than the first."""
    torch.set_default_dtype(torch.float64)
    if on_ranks:
        join()
    loss_fn, model = trained_losses.Centers(), trained_losses.network()
    if on_ranks and rank():
        with torch.no_grad():
            loss_fn.centers += rank()
    with dtrp.Pipeline(
        model, trained_losses.sgd, loss_fn, num_stages=3, num_microbatches=2, seed=7, timeout_s=20
    ) as pipe:
        for x, y in trained_losses.batches():
            pipe.step(x, y)
        pipe.flush()
        torch.save(pipe.state_dict(), Path(folder, f"run{rank()}.pt" if on_ranks else "local.pt"))


def weightless_replicas(folder: str, method: str) -> None:
    """In mini-batch 0 one replica has no label, in mini-batch 1 both; each rank writes what it left out, and what it heard."""
    join()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "stage"))
    heard: dict[str, Any] = {}
    for on_nonfinite in ("skip", "stop"):
        loss_fn, weigh = weighted_losses.LOSSES["ignored"]
        pipe = dtrp.Pipeline(
            weighted_losses.adding("penalty"), sgd, loss_fn, cuts=[4], method=method, num_microbatches=2, loss_weight=weigh,
            on_nonfinite=on_nonfinite, mesh=mesh, timeout_s=20,
        )  # fmt: skip
        try:
            for n, (x, y) in enumerate(minibatches(4)):
                if n == 1 or (n == 0 and rank() > 1):
                    y[:] = -100
                pipe.step(x, y)
            pipe.flush()
            (heard["skipped"],) = pipe.skipped_updates().values()
            pipe.close()
        except (dtrp.StageError, dtrp.WorkerError) as error:
            heard["stopped"] = str(error)
    Path(folder, f"heard{rank()}.json").write_text(json.dumps(heard))


def fail_outside(folder: str, culprit: int, how: str) -> None:
    """One rank's own program goes wrong between two steps."""
    del folder
    pipe = pipeline(network(), num_stages=world_size(), timeout_s=10)
    for i, x, y in endless():
        pipe.step(x, y)
        if i == 5 and rank() == culprit:
            if how == "raise":
                raise KeyError("no such column")
            if how == "sys.exit":
                sys.exit(3)
            os._exit(4)


def stall(folder: str, culprit: int) -> None:
    """One rank does something else for longer than the others wait."""
    del folder
    pipe = pipeline(network(), num_stages=world_size(), timeout_s=1)
    for i, x, y in endless():
        pipe.step(x, y)
        if i == 5 and rank() == culprit:
            time.sleep(2)


def end_without_close(folder: str, flush: bool) -> None:
    pipe = pipeline(network(), num_stages=world_size(), timeout_s=10)
    for x, y in minibatches(6):
        pipe.step(x, y)
    if flush:
        pipe.flush()
    print(pipe.num_updates)
    if rank() == 0:
        Path(folder, "through").touch()


def end_in_a_child(folder: str) -> None:
    """The ranks are processes of multiprocessing's; the first ends by sys.exit(), its pipeline still open, the others later."""

    def child() -> None:
        pipe = pipeline(network(), num_stages=world_size(), timeout_s=10)
        for x, y in minibatches(6):
            pipe.step(x, y)
        if rank() == 0:
            sys.exit()
        time.sleep(0.3)
        pipe.close()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    print(process.exitcode)


class Synced(nn.SyncBatchNorm):
    """Where the real one, which works on GPUs alone, would wait for the other replicas."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Far(Tensor):
    """On an accelerator, as far as it says."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda")


def wrong(folder: str, what: str) -> None:
    """Ranks that do not fit together."""
    del folder
    size, last = world_size(), rank() == world_size() - 1
    model, options = network(), {"timeout_s": 2.0}
    if what == "num_stages":
        options["num_stages"] = size + 1
    elif what in ("mesh", "a bad mesh", "an empty shard", "an empty part"):
        join()
        names = ("rows", "columns") if what == "a bad mesh" else ("replica", "stage")
        options["mesh"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
        options["num_stages"] = 3 if what == "mesh" else 2
        if what == "an empty part":
            options["num_microbatches"] = 4
            model = without_noise(6)
            model[4].append(Synced(WIDTH))
    elif what == "names" and last:
        model = nn.Sequential(*model)  # 0, 1, 2 in place of block0, block1, block2
    elif what == "shapes" and last:
        model[-1] = nn.Linear(WIDTH, 4)
    elif what == "dtypes" and last:
        model[3].double()
    elif what == "frozen" and last:
        model[3].requires_grad_(False)
    elif what == "tied":
        options["method"] = "bp"
        if last:
            model[5][0].weight = model[0][0].weight
    elif what == "method":
        options["method"] = "fdg" if last else "dtrp"
    elif what == "num_microbatches":
        options["num_microbatches"] = 2 if last else 4
    pipe = pipeline(model, **options)
    given: Any = minibatches(6)
    if what == "a DistributedSampler":
        data = [(x[i], y[i]) for x, y in given for i in range(len(y))]
        given = DataLoader(data, 16, sampler=DistributedSampler(data, size, rank()))
    for i, (x, y) in enumerate(given):
        if last and (what, i) in (("targets", 4), ("far targets", 2), ("far targets later", 3)):
            y = (y + 1) % 3
        if what.startswith("far targets"):
            y = y.as_subclass(Far)
        if what == "target shapes" and last and i == 4:
            x, y = x[:-1], y[:-1]
        if what == "an empty shard" and rank() >= 2 and i == 4:
            x, y = x[:0], y[:0]
        if what == "an empty part" and rank() >= 2 and i == 4:
            x, y = x[:3], y[:3]
        pipe.step(x, y)
    if what == "flush and state_dict":
        pipe.state_dict() if last else pipe.flush()
    elif what == "infer and flush":
        pipe.flush() if last else pipe.infer(x)
    elif what == "save_model and step":
        pipe.step(x, y) if last else pipe.save_model("never.pt")
    elif what == "one more step, and no flush":  # whose gradients the first rank need not wait for
        if rank() == 0:
            pipe.step(x, y)
    elif what.startswith("steps"):
        more = {"steps: more on the last": last, "steps: more on the first": rank() == 0}[what]
        if more:
            for _ in range(12):
                pipe.step(x, y)
    if what != "one more step, and no flush":
        pipe.flush()
    pipe.close()


def close_too_early(folder: str, culprit: int, closes: bool) -> None:
    """One rank closes its pipeline, or ends without, while the others step on."""
    del folder
    pipe = pipeline(network(), num_stages=world_size(), timeout_s=5)
    for x, y in minibatches(6):
        pipe.step(x, y)
    if rank() != culprit:
        for x, y in minibatches(20):
            pipe.step(x, y)
    if closes:
        pipe.close()


def wait_for_nobody(folder: str) -> None:
    """The Pipeline of a rank that waits for others that never come."""
    del folder
    if rank() == 0:
        pipeline(network(), num_stages=world_size(), timeout_s=1)


def die_at_the_start(folder: str, victim: int, where: str) -> None:
    """One rank is killed before, or while, the backend connects the ranks."""
    del folder

    def die(*given: Any, **named: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if rank() == victim:
        if where == "before it comes":
            die()
        if where == "joining":
            dist.init_process_group = die
        else:
            GroupFactory.group = die if where == "making the first group" else second(die, GroupFactory.group)  # type: ignore[method-assign]
    pipeline(network(), num_stages=world_size(), timeout_s=2)


def second(call: Callable[..., Any], first: Callable[..., Any]) -> Callable[..., Any]:
    """``first`` when it is called once, ``call`` from then on."""
    calls = itertools.chain([first], itertools.repeat(call))
    return lambda *given: next(calls)(*given)


def wait_for_a_late_one(folder: str, late: int) -> None:
    """One rank makes its Pipeline when it is told to; the others, by the time that it is ready, wait for it."""
    join()
    if rank() == late:
        store = dist.distributed_c10d._get_default_store()
        store.wait([f"dtrp/0-1-2/1/here/{other}" for other in range(3) if other != late])
    ready(folder)
    while rank() == late and not Path(folder, "go").exists():
        time.sleep(0.01)
    pipeline(network(), num_stages=world_size(), timeout_s=3)


def told_to_end(folder: str, late: int, where: str) -> None:
    """One rank never makes its Pipeline; the others wait for it, and listen to SIGTERM meanwhile."""

    def tell() -> None:
        while signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            time.sleep(0.01)
        time.sleep(0.3)
        ready(folder)

    if where == "making the first group":
        join()
    if rank() == late:
        ready(folder)
        time.sleep(60)
    threading.Thread(target=tell, daemon=True).start()
    pipeline(network(), num_stages=world_size(), timeout_s=30)


def traced(folder: str) -> None:
    with pipeline(network(), num_stages=3, method="dtrp", num_microbatches=2, trace=True) as pipe:
        for i, (x, y) in enumerate(minibatches(5)):
            pipe.step(x, y)
            if i == 3:
                pipe.save_trace(Path(folder, "in flight.json"))
        pipe.flush()
        pipe.save_trace(Path(folder, "trace.json"))


@functools.cache
def overshoot_s() -> float:
    """How much longer than asked a sleep is here."""
    seconds = []
    for _ in range(20):
        began = time.perf_counter()
        time.sleep(0.01)
        seconds.append(time.perf_counter() - began - 0.01)
    return statistics.median(seconds)


def sleep_until(end: float) -> None:
    time.sleep(max(0.0, end - time.perf_counter() - overshoot_s()))


class SleepBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        sleep_until(time.perf_counter() + ctx.seconds)
        return grad, None


class Sleeps(nn.Module):
    """A stage whose work is to sleep; messages and updates are real."""

    def __init__(self, forward_s: float, backward_s: float) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.forward_s, self.backward_s = forward_s, backward_s

    def forward(self, x: Tensor) -> Tensor:
        end = time.perf_counter() + self.forward_s
        out: Tensor = SleepBackward.apply(self.linear(x), self.backward_s)
        sleep_until(end)
        return out


class SleepInParts(torch.autograd.Function):
    """x + w, whose backward sleeps for the gradient of x, and later for that of w."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: nn.Parameter, input_s: float, weight_s: float) -> Tensor:
        ctx.w, ctx.seconds = w, (input_s, weight_s)
        return x + w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        input_s, weight_s = ctx.seconds
        sleep_until(time.perf_counter() + input_s)

        def weight_gradient() -> Tensor:
            sleep_until(time.perf_counter() + weight_s)
            return grad.sum(0)

        dtrp.defer(ctx.w, weight_gradient)
        return grad, None, None, None


class SleepsInParts(nn.Module):
    """As `Sleeps`, with a backward that is divided."""

    def __init__(self, forward_s: float, input_s: float, weight_s: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(WIDTH))
        self.forward_s, self.parts = forward_s, (input_s, weight_s)

    def forward(self, x: Tensor) -> Tensor:
        end = time.perf_counter() + self.forward_s
        out: Tensor = SleepInParts.apply(x, self.w, *self.parts)
        sleep_until(end)
        return out


def timed_steps(pipe: dtrp.Pipeline, steps: int, warm_up: int) -> list[float]:
    """The seconds of so many steps after those of the warm-up; the pipeline is flushed and closed."""
    overshoot_s()
    seconds, x = [], torch.randn(32, WIDTH)
    with pipe:
        for _ in range(warm_up + steps):
            began = time.perf_counter()
            pipe.step(x, x)
            seconds.append(time.perf_counter() - began)
        pipe.flush()
    return seconds[warm_up:]


def sleeping_in_parts(
    folder: str,
    method: str,
    options: dict[str, Any],
    parts: list[float],
    steps: int,
    warm_up: int,
    num_microbatches: int,
) -> None:
    """Stages whose F, I and W sleep so many seconds; as `sleeping_stages`, and the largest delay of each rank."""
    model = [SleepsInParts(*parts) for _ in range(world_size())]
    row = dtrp.get_method(method, **options)
    pipe = dtrp.Pipeline(
        model, sgd, nn.functional.mse_loss, method=row, num_microbatches=num_microbatches, timeout_s=60
    )
    seconds = timed_steps(pipe, steps, warm_up)
    delays = {int(stage): max(counts) for stage, counts in pipe.delays().items()}
    written = {"seconds": seconds, "delays": delays}
    Path(folder, f"seconds{rank()}.json").write_text(json.dumps(written))


def sleeping_stages(
    folder: str, method: str, steps: int, warm_up: int, forward_s: float, backward_s: float, num_microbatches: int
) -> None:
    """Writes the seconds of each step of each rank."""
    model = [Sleeps(forward_s, backward_s) for _ in range(world_size())]
    pipe = dtrp.Pipeline(
        model, sgd, nn.functional.mse_loss, method=method, num_microbatches=num_microbatches, timeout_s=60
    )
    Path(folder, f"seconds{rank()}.json").write_text(json.dumps(timed_steps(pipe, steps, warm_up)))


def load_and_go_on(folder: str, method: str, num_stages: int, begin: int, then: str) -> None:
    """Take up ``folder/saved`` at mini-batch ``begin``, save again to ``folder/again``, go on to the end."""
    last = world_size() - 1
    with pipeline(network(), adamw, num_stages=num_stages, method=method, num_microbatches=2, timeout_s=10.0) as pipe:
        assert pipe.load(Path(folder, "saved")) == {"sampler": [begin]}
        losses = []
        for i, (x, y) in enumerate(minibatches(10)[begin:]):
            if i == 2:
                pipe.save(Path(folder, "again"), portable=then == "portable", extra={"sampler": [begin + 2]})
            losses.append(pipe.step(x if rank() == 0 else None, y if rank() == last else None))
        pipe.flush()
        state = pipe.state_dict()
        if rank() == last:
            torch.save({"losses": losses, "state": state}, Path(folder, "done.pt"))


def save_to_a_full_disk(folder: str, disk: str) -> None:
    """Fill the disk of the second rank's file, try to save, go on and save elsewhere."""
    first, last = rank() == 0, rank() == world_size() - 1
    with pipeline(network(), sgd, num_stages=world_size(), method="dtrp", timeout_s=10.0) as pipe:
        batches = minibatches(6)
        for x, y in batches[:3]:
            pipe.step(x if first else None, y if last else None)
        pipe.save(Path(disk, "saved"), extra=3)
        from dtrp.saving import tensors

        own = tensors.Writer.write_data

        def full(self: Any, *given: Any) -> Any:
            if rank() == 1:
                raise OSError(28, "No space left on device")
            return own(self, *given)

        tensors.Writer.write_data = full  # type: ignore[method-assign]
        try:
            pipe.save(Path(disk, "saved"), extra=4)
        except dtrp.CheckpointError as error:
            print(error, flush=True)
        tensors.Writer.write_data = own  # type: ignore[method-assign]
        assert not first or os.listdir(disk) == ["saved"], os.listdir(disk)
        assert dtrp.saving.inspect(Path(disk, "saved")).extra == 3
        for x, y in batches[3:]:
            pipe.step(x if first else None, y if last else None)
        pipe.save(Path(disk, "saved"), extra=6)
        assert dtrp.saving.inspect(Path(disk, "saved")).extra == 6


def agree(folder: str, num_replicas: int, proposals: list[list[int]], method: str = "dtrp") -> None:
    """Print what `agreed` says after each of 20 steps; ``proposals`` are (rank, before which step, word).

    At the first word all save together, which they can after the same step alone, and go on after a flush.
    """
    dist.init_process_group("gloo")
    num_stages = world_size() // num_replicas
    replica, stage = divmod(rank(), num_stages)
    mesh = init_device_mesh("cpu", (num_replicas, num_stages), mesh_dim_names=("replica", "stage"))
    options: dict[str, Any] = {"mesh": mesh} if num_replicas > 1 else {}
    with pipeline(
        network(), sgd, num_stages=num_stages, method=method, num_microbatches=2, timeout_s=10.0, **options
    ) as pipe:
        said = []
        for step, (x, y) in enumerate(minibatches(20)):
            time.sleep(0.002 * ((rank() + step) % 3))
            for who, when, word in proposals:
                if (who, when) == (rank(), step):
                    pipe.propose(word)
            x, y = (torch.tensor_split(each, num_replicas)[replica] for each in (x, y))
            reads_y = stage == (0 if method == "dgl" else num_stages - 1)
            pipe.step(x if stage == 0 else None, y if reads_y else None)
            said.append(pipe.agreed)
            if pipe.agreed and sum(map(bool, said)) == 1:
                pipe.save(Path(folder, "saved"))
                pipe.flush()
        pipe.flush()
        print(json.dumps([said, dtrp.saving.inspect(Path(folder, "saved")).num_updates]), flush=True)
    dist.destroy_process_group()


PROGRAMS: dict[str, Callable[..., None]] = {
    function.__name__: function
    for function in (
        cases,
        load_and_go_on,
        save_to_a_full_disk,
        train_until_killed,
        fail_in_stage,
        fail_at_length,
        repeats_otherwise,
        nonfinite_gradient,
        refused_loss,
        skips_with_replicas,
        weighted_run,
        weightless_replicas,
        trained_loss_run,
        fail_outside,
        stall,
        end_without_close,
        end_in_a_child,
        wrong,
        close_too_early,
        wait_for_nobody,
        wait_for_a_late_one,
        die_at_the_start,
        told_to_end,
        traced,
        sleeping_stages,
        sleeping_in_parts,
        agree,
    )
} | DROP_IN_PROGRAMS


def main(program: str, arguments: list[Any]) -> None:
    warnings.simplefilter("error")
    # Of torch 2.6: a folder that it leaves to the interpreter's end, and what its checkpoints read of tensors.
    warnings.filterwarnings("ignore", "Implicitly cleaning up", ResourceWarning)
    warnings.filterwarnings("ignore", "TypedStorage is deprecated", UserWarning)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    PROGRAMS[program](*arguments)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
