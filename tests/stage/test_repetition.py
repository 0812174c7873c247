"""A forward that a backward repeats gives again what it gave, or is refused."""

from __future__ import annotations

import copy
import random
import re
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import stateful_models as models
import torch
from launching import Server, run_ranks
from stateful_models import (
    FLUSHING,
    KEEPING,
    RECOMPUTING,
    Stateful,
    batches,
    check_gradients,
    model_of,
    pipeline_gradients,
    plain_gradients,
    reseed,
    unchanged,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.checkpoint import checkpoint

import dtrp
from dtrp.stage.repetition import _close
from dtrp.tensors.module_mode import slow_attention

CURE = r"keep this stage's graphs, which repeats nothing: Pipeline\(keep='graph'\)"
OTHER_OUTPUT = rf"gives another output.*a counter or a hidden state in an attribute.*{CURE}"
STATEFUL = [
    models.Counter, models.Toggle, models.ToggleInList, models.ToggleInObject, models.Annealed, models.Recurrent,
    models.InPlace, models.SameRoom,
]  # fmt: skip
DRAWING = {
    models.OwnGenerator: "the generator 0.state", models.OwnPython: "the generator 0.state",
    models.OwnNumPy: "the generator 0.state", models.OldNumPy: "the generator 0.state",
    models.GeneratorInList: r"the generator 0.state\[0\]", models.NumPyInDict: r"the generator 0.state\['drop'\]",
    models.OfPython: "Python's random", models.OfNumPy: "NumPy's random",
}  # fmt: skip


def refused(model: nn.Module, match: str, where: str = "forward", **options: Any) -> None:
    reseed()
    error = rf"stage 0, {where} of micro-batch 0 \(mini-batch 0\): RuntimeError: .*{match}"
    with pytest.raises(dtrp.StageError, match=re.compile(error, re.DOTALL)):
        pipeline_gradients(model, batches(size=options.pop("size", 8)), **options)


@pytest.mark.parametrize("method", RECOMPUTING)
@pytest.mark.parametrize("make", STATEFUL)
def test_state_that_a_repetition_does_not_know_is_refused_before_any_update(make: Any, method: str) -> None:
    model = model_of(make)
    is_unchanged = unchanged(model)
    pipe = dtrp.Pipeline(
        model, lambda p: torch.optim.SGD(p, lr=0.1), cross_entropy, num_stages=3, method=method, num_microbatches=1
    )
    with pytest.raises(dtrp.StageError, match=rf"stage 0, forward of micro-batch 0 .*{OTHER_OUTPUT}"):
        pipe.step(*batches(size=4)[0])
    assert is_unchanged()


@pytest.mark.parametrize("num_microbatches", [1, 3])
@pytest.mark.parametrize("method", ["dtrp", "bp", "gpipe", "pipedream"])
def test_whatever_the_method_that_repeats(method: str, num_microbatches: int) -> None:
    refused(
        model_of(models.Counter),
        OTHER_OUTPUT,
        num_stages=4,
        method=method,
        num_microbatches=num_microbatches,
        keep="input",
    )


@pytest.mark.parametrize("num_stages", [2, 3, 4])
@pytest.mark.parametrize("method", RECOMPUTING)
def test_state_that_no_attribute_shows_is_refused_where_it_is_repeated(method: str, num_stages: int) -> None:
    refused(model_of(models.Bank), OTHER_OUTPUT, "backward", num_stages=num_stages, method=method)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("method", FLUSHING + KEEPING)
@pytest.mark.parametrize("make", [*STATEFUL, models.Bank, *DRAWING])
def test_where_graphs_are_kept_it_is_right(make: Any, method: str) -> None:
    model = model_of(make)
    reseed()
    data = batches(5, size=4)
    want = plain_gradients(copy.deepcopy(model), data) if make is not models.Bank else None
    reseed()
    got = pipeline_gradients(copy.deepcopy(model), data, num_stages=2, method=method)
    check_gradients(got, want or plain_gradients(model_of(make), data))
    reseed()
    kept = pipeline_gradients(model_of(make), data, num_stages=2, method="dtrp", keep=["graph", "input"])
    check_gradients(kept, want or got)


@pytest.mark.parametrize("make", DRAWING)
def test_draws_that_a_repetition_would_go_on_with_are_refused_though_two_agree(make: Any) -> None:
    model = model_of(make)
    is_unchanged = unchanged(model)
    refused(model, f"draws from {DRAWING[make]}, and its repetition .*{CURE}", num_stages=2)
    assert is_unchanged()


def test_draws_from_a_generator_that_no_attribute_shows_are_refused() -> None:
    generator = torch.Generator().manual_seed(3)

    class Global(models.OwnGenerator):
        def draw(self) -> float:
            return float(torch.rand((), generator=generator))

    refused(model_of(Global), f"draws from a generator that rand is given, and its repetition .*{CURE}", num_stages=2)


def test_draws_that_are_not_the_modules_are_left_alone() -> None:
    """Another thread's, or the caller's between steps; and a generator that nobody draws from."""

    class Elsewhere(Stateful):
        def begin(self) -> Any:
            self.unused, self.others = torch.Generator(), iter([True])
            return 0

        def forward(self, x: Tensor) -> Tensor:
            if next(self.others, False):
                thread = threading.Thread(target=random.random)
                thread.start()
                thread.join()
            return self.linear(x)

    random.seed(0)
    model = model_of(Elsewhere)
    pipeline_gradients(model, batches(), num_stages=2, after=lambda: random.random() and None)
    draws = random.Random(0)
    assert random.random() == [draws.random() for _ in range(9)][-1], "as many as were drawn"


@pytest.mark.parametrize("method", RECOMPUTING)
def test_what_is_remembered_and_not_read_is_fine_and_counts_as_it_did(method: str) -> None:
    class Remembers(Stateful):
        def forward(self, x: Tensor) -> Tensor:
            self.state += 1
            self.last = self.linear(x)
            self.seen = [*getattr(self, "seen", []), self.state]
            return self.last * 1

    model = model_of(Remembers)
    check_gradients(
        pipeline_gradients(model, batches(), num_stages=3, method=method),
        plain_gradients(model_of(Remembers), batches()),
    )
    assert model[0].state == len(model[0].seen) == 14, "each forward and its repetition"


@pytest.mark.parametrize("method", RECOMPUTING)
@pytest.mark.parametrize("make", [models.WithoutGradients, models.RequiresGradient])
def test_another_output_where_gradients_are_off_is_refused(make: Any, method: str) -> None:
    refused(model_of(make), f"does otherwise where gradients are off.*{CURE}", "backward", num_stages=3, method=method)


@pytest.mark.parametrize("method", RECOMPUTING)
@pytest.mark.parametrize(
    ("make", "error"),
    [
        (models.Forces, "does not require grad"),
        (models.Asserts, "AssertionError"),
        (models.ReadsNode, "has no attribute 'metadata'"),
        (models.Raises, "train me"),
    ],
)
def test_a_forward_that_needs_gradients_says_what_to_change(make: Any, error: str, method: str) -> None:
    match = rf"{error}.* \(this stage's forward runs with gradients, and not without.*{CURE}"
    refused(model_of(make), match, num_stages=2, method=method)


@pytest.mark.parametrize("method", [*FLUSHING, *KEEPING, "dtrp"])
def test_forces(method: str) -> None:
    """Right where graphs are kept, in a front part that is frozen, and in `infer`."""
    want = plain_gradients(model_of(models.Forces), batches())
    kept = {"keep": "graph"} if method == "dtrp" else {}
    check_gradients(pipeline_gradients(model_of(models.Forces), batches(), num_stages=2, method=method, **kept), want)
    model = model_of(models.Forces)
    model[0].requires_grad_(False)
    pipe = dtrp.Pipeline(
        model,
        lambda p: torch.optim.SGD(p, lr=0.0),
        cross_entropy,
        num_stages=2,
        cuts=[1],
        method=method,
        num_microbatches=1,
    )
    x, y = batches()[0]
    assert torch.equal(pipe.step(x, y), cross_entropy(model(x), y).detach())
    assert torch.equal(pipe.infer(x), model(x).detach())
    with torch.inference_mode():
        assert torch.equal(pipe.infer(x), pipe.infer(x.clone()))
    pipe.flush()


def test_an_error_that_is_not_about_gradients_is_told_as_it_is() -> None:
    class Broken(Stateful):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("the gradient descent has ended in a ditch")

    refused(model_of(Broken), "has ended in a ditch$", num_stages=2)


# -- torch's inference fast paths -------------------------------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor, padded: Tensor) -> Any:
        return self.encoder(x, src_key_padding_mask=padded), padded


class Layer(Encoder):
    def forward(self, x: Tensor, padded: Tensor) -> Any:
        return self.encoder.layers[0](x, src_key_padding_mask=padded), padded


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor, padded: Tensor) -> Any:
        return self.attention(x, x, x, key_padding_mask=padded)[0], padded


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 3)

    def forward(self, h: Tensor, padded: Tensor) -> Tensor:
        out: Tensor = self.linear(h)
        return out


class Both(nn.Sequential):
    def forward(self, x: Any) -> Tensor:
        out: Tensor = self[1](*self[0](*x))
        return out


def padded_batches(dtype: torch.dtype) -> list[Any]:
    result = []
    for _ in range(4):
        padded = torch.zeros(4, 6, dtype=torch.bool)
        padded[:, 5:], padded[1, 3:] = True, True
        result.append(((torch.randn(4, 6, 8, dtype=dtype), padded), torch.randn(4, 6, 3, dtype=dtype)))
    return result


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("method", RECOMPUTING)
@pytest.mark.parametrize("make", [Encoder, Layer, Attention])
def test_attention_in_eval_mode_with_padding(make: Any, method: str, dtype: torch.dtype) -> None:
    model = Both(make(), Head()).to(dtype).eval()
    data = padded_batches(dtype)
    want = plain_gradients(model, data, mse_loss)
    got = pipeline_gradients([model[0], model[1]], data, mse_loss, method=method)
    check_gradients(got, want, 1e-13 if dtype is torch.float64 else 1e-6)
    assert torch.backends.mha.get_fastpath_enabled()


class Adapted(nn.Module):
    """Trained on a frozen encoder, whose padded places it reads."""

    def __init__(self, below: bool) -> None:
        super().__init__()
        self.below = nn.Linear(8, 8) if below else nn.Identity()
        self.encoder = Encoder().requires_grad_(False)
        self.above = nn.Linear(8, 8)

    def forward(self, x: Tensor, padded: Tensor) -> Any:
        return self.above(self.encoder(self.below(x), padded)[0]), padded


@pytest.mark.parametrize("method", [*FLUSHING, *KEEPING, *RECOMPUTING])
@pytest.mark.parametrize("below", [False, True], ids=["nothing is trained below", "something is trained below"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_frozen_encoder_takes_the_path_that_it_takes_in_a_plain_loop(below: bool, method: str) -> None:
    """In the first mini-batch too; without anything trained below it, that of inference."""
    model = Both(Adapted(below), Head()).double().eval()
    data = padded_batches(torch.float64)
    want = plain_gradients(model, data, mse_loss)
    got = pipeline_gradients([model[0], model[1]], data, mse_loss, method=method)
    check_gradients(got, [{name: g for name, g in here.items() if g is not None} for here in want])
    model[0].requires_grad_(False)
    pipe = dtrp.Pipeline(
        [model[0], model[1]], lambda p: torch.optim.SGD(p, lr=0.0), mse_loss, method=method, num_microbatches=1
    )
    x, y = data[0]
    assert torch.equal(pipe.step(x, y), mse_loss(model(x), y).detach())
    pipe.flush()


def test_the_switch_of_the_fast_path_is_put_back() -> None:
    enabled = torch.backends.mha.get_fastpath_enabled
    torch.backends.mha.set_fastpath_enabled(False)
    with slow_attention():
        pass
    assert not enabled()
    torch.backends.mha.set_fastpath_enabled(True)
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with slow_attention():
            inside.set()
            leave.wait()

    with slow_attention():
        thread = threading.Thread(target=other)
        thread.start()
        inside.wait()
    assert not enabled(), "the other is inside"
    leave.set()
    thread.join()
    assert enabled()


# -- what is the same -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", RECOMPUTING)
def test_what_the_caller_changes_between_steps_is_the_callers(method: str) -> None:
    """Weights, or a temperature, while the pipeline fills."""

    class Heated(Stateful):
        temperature = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) / self.temperature

    model = model_of(Heated)

    @torch.no_grad()
    def anneal() -> None:
        model[0].temperature *= 0.8
        for p in model.parameters():
            p.data.clamp_(-0.2, 0.2)

    pipeline_gradients(model, batches(), num_stages=3, method=method, after=anneal)


def test_in_half_precision_the_tolerance_is_wider() -> None:
    class Shaky(Stateful):
        def __init__(self, by: float) -> None:
            super().__init__()
            self.by = by

        def forward(self, x: Tensor) -> Tensor:
            h: Tensor = self.linear(x)
            return h if torch.is_grad_enabled() else h * (1 + self.by)

    def run(by: float, dtype: torch.dtype, autocast: bool = False) -> None:
        pipe = dtrp.Pipeline(
            nn.Sequential(Shaky(by), nn.Linear(5, 3)).to(dtype), lambda p: torch.optim.SGD(p, lr=0.1), cross_entropy,
            num_stages=2, method="dtr", num_microbatches=1,
        )  # fmt: skip
        with torch.autocast("cpu", enabled=autocast):
            for x, y in batches():
                pipe.step(x.to(dtype), y)

    for by in (5e-4, -5e-4):
        run(by, torch.float32)
    run(5e-3, torch.float32, autocast=True)
    run(8e-3, torch.bfloat16)
    for by, dtype, autocast in (
        (2e-3, torch.float32, False),
        (0.05, torch.float32, True),
        (0.05, torch.bfloat16, False),
    ):
        with pytest.raises(dtrp.StageError, match="stage 0, backward .*gives another output"):
            run(by, dtype, autocast)


def test_trees_with_whole_numbers_are_compared_exactly() -> None:
    class Ids(Stateful):
        def forward(self, x: Tensor) -> Any:
            self.state += 1
            return {"h": (self.linear(x), None), "ids": torch.full((len(x),), self.state % 2), "n": 3}

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(5, 3)

        def forward(self, v: Any) -> Tensor:
            out: Tensor = self.linear(v["h"][0])
            return out

    x, y = batches()[0]
    pipe = dtrp.Pipeline(
        [Ids().double(), Last().double()], lambda p: torch.optim.SGD(p, lr=0.1), cross_entropy, num_microbatches=1
    )
    with pytest.raises(dtrp.StageError, match=f"stage 0, forward .*{OTHER_OUTPUT}"):
        pipe.step(x, y)


class Listens(nn.Linear):
    """Notes which run each of its forwards is in, also under an activation checkpoint."""

    calls: Counter[bool]
    checkpointed = False

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._run, x, use_reentrant=False) if self.checkpointed else self._run(x)  # type: ignore[no-any-return]

    def _run(self, x: Tensor) -> Tensor:
        self.calls[dtrp.recomputing()] += 1
        return super().forward(x)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("method", "options", "repetitions"),
    [
        ("bp", {}, 0),
        ("spectrain", {}, 0),
        ("dtrp", {}, 12),
        ("gpipe", {"keep": "input"}, 12),
        ("dtrp", {"keep": "auto", "memory_limit_bytes": 10**8}, 2),  # trials
        ("dtrp", {"compile": {"backend": "eager"}}, 12),
        ("bp", {"checkpointed": True}, 12),
        ("dtrp", {"checkpointed": True}, 24),
    ],
)
def test_a_module_and_a_hook_know_a_repetition(method: str, options: dict[str, Any], repetitions: int) -> None:
    layer, heard = Listens(4, 4), Counter[bool]()
    Listens.calls, Listens.checkpointed = Counter(), options.pop("checkpointed", False)
    layer.register_forward_hook(lambda module, x, out: heard.update([dtrp.recomputing()]))
    pipe = dtrp.Pipeline(
        [layer.double(), nn.Linear(4, 3).double()], lambda p: torch.optim.SGD(p, lr=0.1), cross_entropy,
        method=method, num_microbatches=2, **options,
    )  # fmt: skip
    for x, y in batches()[:6]:
        pipe.step(x, y)
    pipe.flush()
    assert Listens.calls == Counter({False: 12, True: repetitions})
    if "compile" not in options and not Listens.checkpointed:  # the compiler calls hooks as it likes
        assert heard == Listens.calls
    Listens.calls.clear()
    pipe.infer(x)
    layer(x)
    assert Listens.calls == Counter({False: 2})


@pytest.mark.parametrize("method", ["bp", "dtrp"])
@pytest.mark.parametrize("samples", [1, 7])
def test_a_single_sample_for_batch_norm_names_the_way_out(method: str, samples: int) -> None:
    model = [
        nn.Linear(4, 4).double(),
        nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)).double(),
        nn.Linear(3, 3).double(),
    ]
    pipe = dtrp.Pipeline(model, lambda p: torch.optim.SGD(p, lr=0.1), cross_entropy, method=method, num_microbatches=4)
    x, y = batches()[0]
    way_out = "size.*: the micro-batch has one sample.*a num_microbatches of at most half.*or leave out the last samples.*drop_last"
    with pytest.raises(dtrp.StageError, match=rf"stage 1, forward .*Expected more than 1 value per channel.*{way_out}"):
        pipe.step(x[:samples], y[:samples])


def test_close() -> None:
    nan, inf = float("nan"), float("inf")
    a = torch.tensor([nan, inf, 1.0, -2.0])
    assert _close(a, a.clone(), 1e-3)
    assert _close(a, torch.tensor([nan, inf, 1.0, -2.001]), 1e-3)
    for other in (
        [nan, inf, 1.0, -2.01],
        [1.0, inf, 1.0, -2.0],
        [nan, -inf, 1.0, -2.0],
        [nan, 1.0, 1.0, -2.0],
        [nan, inf, nan, -2.0],
    ):
        assert not _close(a, torch.tensor(other), 1e-3), other
        assert not _close(torch.tensor(other), a, 1e-3), other
    assert not _close(a, a[:3], 1e-3)
    assert not _close(a, a.double(), 1e-3)
    assert _close(torch.zeros(0), torch.zeros(0), 1e-3)
    assert _close(torch.zeros(3), torch.zeros(3), 1e-3)
    assert not _close(torch.zeros(3), torch.full((3,), 1e-10), 1e-3)
    assert _close(torch.ones(2, dtype=torch.complex64), torch.full((2,), 1 + 1e-4j), 1e-3)
    assert not _close(torch.ones(2, dtype=torch.complex64), torch.full((2,), 1 + 1e-2j), 1e-3)
    assert _close(torch.tensor([True, False]), torch.tensor([True, False]), 1e-3)
    assert not _close(torch.tensor([7, 10**6]), torch.tensor([7, 10**6 + 1]), 1e-3)
    assert _close(torch.eye(3).to_sparse(), torch.eye(3).to_sparse(), 1e-3)


# -- on ranks ---------------------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.sampled(4)
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("Counter", f"StageError: stage 1, forward of micro-batch 0 .*{OTHER_OUTPUT}"),
        ("WithoutGradients", f"StageError: stage 1, backward of micro-batch 0 .*{OTHER_OUTPUT}"),
        ("Forces", f"StageError: stage 1, forward of micro-batch 0 .*does not require grad.*{CURE}"),
        ("OfPython", f"StageError: stage 1, forward of micro-batch 0 .*draws from Python's random.*{CURE}"),
    ],
)
def test_every_rank_hears_the_same_error(server: Server, tmp_path: Path, name: str, error: str) -> None:
    for rank, outcome in enumerate(run_ranks(server, tmp_path, 3, "repeats_otherwise", name, timeout_s=30)):
        assert outcome.returncode == 1, f"rank {rank}"
        assert re.search(error, outcome.last_line), f"rank {rank}: {outcome.err}"
