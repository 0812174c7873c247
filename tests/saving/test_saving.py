"""Checkpoints: exact ones go on to the bit, portable ones at any number of stages, in both engines and in plain PyTorch.

The ranks' own runs of saving and loading are cases in `rank_programs`, compared in `test_distributed`; those that other
processes take up are in `test_going_on`.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoints import OPTIMIZERS, check_equal, check_states, data, run
from helpers import Scale, adamw, assert_same, minibatches, network, pipeline, scheduler, sgd
from launching import Server, run_ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict
from torch.utils.data import DataLoader, Dataset, TensorDataset

import dtrp
from dtrp.data import batches, load_data
from dtrp.models import cifar_resnet
from dtrp.saving import inspect, read_state
from dtrp.saving.manifest import PartlyLoadedError

MATRIX = list(itertools.product(dtrp.list_methods(), (1, 2, 4), (1, 4), OPTIMIZERS))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


# -- exact ----------------------------------------------------------------------------------------------------

# In start-up (1), with some stage within a mini-batch (2, 5), right before and right after a flush (6, 7), in steady state.
# A third of the cells, in which every method meets every K, both A and both optimizers.
SOME = [cell for n, cell in enumerate(MATRIX) if n % 3 == sum(map(ord, cell[0])) % 3]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("cell", SOME, ids=str)
def test_an_exact_checkpoint_goes_on_to_the_bit(tmp_path: Path, cell: tuple[str, int, int, str]) -> None:
    check_equal(run(*cell, tmp_path / "saved", (1, 2, 5, 6, 7, 9)), run(*cell, tmp_path))


@pytest.mark.full
@pytest.mark.parametrize("cell", MATRIX, ids=str)
def test_an_exact_checkpoint_at_every_step(tmp_path: Path, cell: tuple[str, int, int, str]) -> None:
    want = run(*cell, tmp_path)
    for stop in range(10):
        check_equal(run(*cell, tmp_path / "saved", (stop,)), want)


class InPlace(nn.Module):
    """Writes its input, so that the stage gives it a copy every time."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(0.5)


def in_place() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5), InPlace(), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 3))


def frozen() -> nn.Sequential:
    model = network()
    for p in model[:3].parameters():
        p.requires_grad_(False)
    return model


class Hidden(Scale):
    """Its buffer is not in its state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()), persistent=False)


def hidden() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 5), Hidden(), nn.Tanh(), nn.Linear(5, 3))


def channels_last() -> nn.Sequential:
    images = nn.Sequential(nn.Linear(5, 108), nn.Unflatten(1, (3, 6, 6)))
    return nn.Sequential(images, *cifar_resnet(8, width=4, num_classes=3).to(memory_format=torch.channels_last))


@pytest.mark.parametrize("method", ["dtrp", "fdg", "bp"])
@pytest.mark.parametrize("model", [in_place, frozen, hidden, channels_last], ids=lambda make: make.__name__)
def test_models_of_other_kinds(tmp_path: Path, model: Any, method: str) -> None:
    cell = (method, 3, 2, "sgd")
    check_equal(run(*cell, tmp_path / "saved", (1, 4, 8), model), run(*cell, tmp_path, model=model))


@pytest.mark.parametrize(
    "options",
    [
        {"keep": ["input", "graph", "graph"]},
        {"keep": "auto", "memory_limit_bytes": 10**9},
        {"keep": "auto", "memory_limit_bytes": 10_000},
        {"max_grad_norm": 0.1},
        {"on_nonfinite": "skip"},
    ],
    ids=str,
)
def test_options_that_change_what_is_held(tmp_path: Path, options: dict[str, Any]) -> None:
    cell = ("dtrp", 3, 2, "adamw")
    check_equal(run(*cell, tmp_path / "saved", (0, 1, 4, 8), **options), run(*cell, tmp_path, **options))


ROWS = [
    {"name": "fdg", "grad_shrink": 0.5},
    {"name": "dtrp", "lr_shrink": 0.7},
    {"name": "pipedream", "keep": "input"},
]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_field_of_the_row(tmp_path: Path, row: dict[str, Any]) -> None:
    options = dict(row)
    method = dtrp.get_method(options.pop("name"), **options)
    cell = (method, 3, 2, "sgd")
    check_equal(run(*cell, tmp_path / "saved", (2, 5, 8)), run(*cell, tmp_path))


class Counting:
    """A predictor whose answer depends on how often it has been asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, parameters: Any, optimizer: Any, horizon: int, out: Any, **where: int) -> None:
        self.asked += 1
        for o, p in zip(out, parameters, strict=True):
            o.copy_(p * (1 + 0.01 / self.asked))

    def state_dict(self) -> dict[str, Any]:
        return {"asked": self.asked, "tensor": torch.tensor(self.asked)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["tensor"] == state["asked"]
        self.asked = state["asked"]


def test_the_state_of_a_predictor_of_the_users(tmp_path: Path) -> None:
    def go(stops: tuple[int, ...]) -> Any:
        losses, pipe = [], None
        for i, (x, y) in enumerate(data()):
            if pipe is None or i in stops:
                fresh = pipeline(network(), num_stages=2, method=dtrp.get_method("dtrp", predict=Counting()))
                if pipe is not None:
                    pipe.save(tmp_path / "saved")
                    fresh.load(tmp_path / "saved")
                else:
                    fresh.load_state_dict(start)
                pipe = fresh
            losses.append(pipe.step(x, y))
        assert pipe is not None
        pipe.flush()
        return losses, pipe.state_dict(), pipe.delays()

    start = pipeline(network(), num_stages=2).state_dict()
    check_equal(go((1, 5, 8)), go(()))


def test_it_is_loaded_into_a_pipeline_that_has_trained(tmp_path: Path) -> None:
    pipe = pipeline(network(), num_stages=3, method="fdg", num_microbatches=2)
    for x, y in data()[:5]:
        pipe.step(x, y)
    pipe.save(tmp_path / "saved")
    first = [pipe.step(x, y) for x, y in data()[5:]]
    assert pipe.in_flight
    assert pipe.load(tmp_path / "saved") is None
    again = [pipe.step(x, y) for x, y in data()[5:]]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len(first) == 5


def test_saving_changes_nothing(tmp_path: Path) -> None:
    want = run("dtrp", 4, 4, "adamw", tmp_path)
    torch.manual_seed(0)
    pipe = pipeline(network(), adamw, num_stages=4, method="dtrp", num_microbatches=4)
    losses = []
    for i, (x, y) in enumerate(data()):
        if i == 6:
            pipe.flush()
        pipe.save(tmp_path / "saved")
        losses.append(pipe.step(x, y))
    pipe.flush()
    check_equal((losses, pipe.state_dict(), pipe.delays()), want)


def test_another_thread_count_is_a_warning(tmp_path: Path) -> None:
    pipe = pipeline(network(), num_stages=2)
    pipe.save(tmp_path / "saved")
    torch.set_num_threads(2)
    try:
        with pytest.warns(UserWarning, match=r"saved with threads=1, and it is 2 now.*set_num_threads"):
            pipe.load(tmp_path / "saved")
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_stages": 3}, "was saved with 4 stages, and this pipeline has 3.*portable=True"),
        ({"num_microbatches": 1}, "was saved with 2 micro-batches, and this pipeline has 1"),
        ({"method": "fr"}, "saved by method 'dtrp' with name='dtrp', and this pipeline has 'fr'"),
        (
            {"method": dtrp.get_method("dtrp", lr_shrink=0.5)},
            "lr_shrink=1.0, and this pipeline has 'dtrp' with lr_shrink=0.5",
        ),
        (
            {"num_stages": None, "cuts": [1, 2, 3]},
            "cut elsewhere: stage 0 has the layers block0, block1 there and block0 here",
        ),
        ({"keep": "graph"}, "keep=None, and this pipeline has keep=graph"),
        (
            {"max_grad_norm": 0.5},
            "saved with max_grad_norm=None, and this pipeline has max_grad_norm=0.5.*portable=True",
        ),
        ({"optimizer": adamw}, "trained by SGD and this pipeline has AdamW"),
        ({"model": nn.Sequential(*[nn.Linear(5, 5) for _ in range(8)])}, "another model's"),
    ],
    ids=["stages", "parts", "method", "row", "cuts", "keep", "clipping", "optimizer", "model"],
)
def test_an_exact_checkpoint_of_another_pipeline_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    pipe = pipeline(network(), num_stages=4, num_microbatches=2)
    for x, y in data()[:3]:
        pipe.step(x, y)
    pipe.save(tmp_path / "saved")
    change = dict(change)
    options = {"num_stages": 4, "num_microbatches": 2, **change}
    model, optimizer = options.pop("model", network()), options.pop("optimizer", sgd)
    other = pipeline(model, optimizer, **options)
    before = other.state_dict()
    with pytest.raises(dtrp.CheckpointError, match=message):
        other.load(tmp_path / "saved")
    check_states({"": before["model"]}, {"": other.model_state_dict()})
    other.step(*data()[0])


def test_whose_norm_is_clipped_is_compared(tmp_path: Path) -> None:
    options = {"num_stages": 2, "method": "bp", "max_grad_norm": 0.1}
    pipeline(network(), clip="global", **options).save(tmp_path / "saved")
    with pytest.raises(dtrp.CheckpointError, match="saved with clip=global, and this pipeline has clip=stage"):
        pipeline(network(), **options).load(tmp_path / "saved")


def other_sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.8, weight_decay=0.01)


def test_what_may_be_otherwise_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the checkpoint's options are those that go on."""
    pipe = pipeline(network(), num_stages=2)
    for x, y in data()[:3]:
        pipe.step(x, y)
    pipe.save(tmp_path / "exact")
    pipe.save(tmp_path / "portable", portable=True)
    with pytest.warns(UserWarning, match="saved with on_nonfinite='stop', and this pipeline has 'skip'"):
        pipeline(network(), num_stages=2, on_nonfinite="skip").load(tmp_path / "exact")
    for kind in ("exact", "portable"):
        for make, message in (
            (other_sgd, "stage [01] was made with momentum=0.8, and the checkpoint has 0.9, which goes on"),
            (
                lambda params: torch.optim.SGD(params, lr=0.06, momentum=0.9, weight_decay=0.01),
                "made with initial_lr=0.06, and the checkpoint has 0.05",
            ),
        ):
            other = pipeline(network(), make, num_stages=2)
            with pytest.warns(UserWarning, match=message):
                other.load(tmp_path / kind)
            groups = [optimizer.param_groups[0] for optimizer in other.optimizers if optimizer is not None]
            assert [(group["momentum"], group["initial_lr"]) for group in groups] == [(0.9, 0.05)] * 2
    monkeypatch.setattr(torch, "__version__", "99.0")
    with pytest.warns(UserWarning, match=r"saved with torch=2.*, and it is 99\.0 now.*last bits"):
        pipeline(network(), num_stages=2).load(tmp_path / "exact")


def test_a_cycled_momentum_is_no_other_option(tmp_path: Path) -> None:
    def make() -> dtrp.Pipeline:
        return dtrp.Pipeline(
            network(), sgd, nn.functional.cross_entropy, num_stages=2, seed=7,
            lr_scheduler=lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=20), num_microbatches=1,
        )  # fmt: skip

    pipe = make()
    for x, y in data()[:3]:
        pipe.step(x, y)
    pipe.save(tmp_path / "saved")
    other = make()
    other.load(tmp_path / "saved")
    assert all(torch.equal(pipe.step(x, y), other.step(x, y)) for x, y in data()[3:])


# -- on ranks -------------------------------------------------------------------------------------------------


@pytest.mark.sampled(3)
@pytest.mark.parametrize("method", ["dtrp", "fdg", "gpipe"])
def test_from_one_process_to_ranks_and_back(tmp_path: Path, server: Server, method: str) -> None:
    def make() -> dtrp.Pipeline:
        return pipeline(network(), adamw, num_stages=3, method=method, num_microbatches=2, timeout_s=10.0)

    pipe = make()
    for x, y in minibatches(10)[:4]:
        pipe.step(x, y)
    pipe.save(tmp_path / "saved", extra={"sampler": [4]})
    want = [pipe.step(x, y) for x, y in minibatches(10)[4:]]
    pipe.flush()
    outcomes = run_ranks(server, tmp_path, 3, "load_and_go_on", method, 3, 4, "exact")
    assert [outcome.returncode for outcome in outcomes] == [0] * 3, outcomes
    done = torch.load(tmp_path / "done.pt", weights_only=False)
    assert all(torch.equal(a, b) for a, b in zip(done["losses"], want, strict=True))
    assert_same(done["state"]["model"], pipe.model_state_dict())
    back = make()
    assert back.load(tmp_path / "again") == {"sampler": [6]}
    assert all(torch.equal(back.step(x, y), b) for (x, y), b in zip(minibatches(10)[6:], want[2:], strict=True))
    back.flush()
    check_states(back.state_dict()["optimizer"]["state"], pipe.state_dict()["optimizer"]["state"])
    assert_same(back.model_state_dict(), pipe.model_state_dict())


def test_a_disk_that_is_full_on_one_rank(tmp_path: Path, server: Server) -> None:
    (tmp_path / "disk").mkdir()
    outcomes = run_ranks(server, tmp_path, 3, "save_to_a_full_disk", str(tmp_path / "disk"))
    for outcome in outcomes:
        assert outcome.returncode == 0, outcome
        assert (
            "on rank 1: OSError: [Errno 28] No space left on device; what was there before is as it was" in outcome.out
        )


# -- portable -------------------------------------------------------------------------------------------------


def plain(parts: int = 8) -> nn.Sequential:
    """No random draws, which depend on the stage."""
    return nn.Sequential(
        *[nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Tanh()) for _ in range(7)], nn.Linear(5, 3)
    )


def test_a_portable_checkpoint_at_any_number_of_stages_and_in_plain_pytorch(
    tmp_path: Path, server: Server, float64: None
) -> None:
    model = plain()
    pipe = pipeline(model, adamw, num_stages=4, method="dtrp", num_microbatches=2)
    for x, y in data()[:5]:
        pipe.step(x, y)
    pipe.save(tmp_path / "saved", portable=True, extra=[1, {"a": None}])
    assert not pipe.in_flight
    found = inspect(tmp_path / "saved")
    assert (found.kind, found.num_stages, found.num_updates, found.method) == ("portable", 4, 5, "dtrp")
    assert found.extra == [1, {"a": None}]
    state = pipe.state_dict()

    def next_losses(other: dtrp.Pipeline) -> list[Tensor | None]:
        return [other.step(x, y) for x, y in data()[5:]]

    for num_stages, method in ((1, "bp"), (2, "fdg"), (3, "dtrp"), (4, "gpipe")):
        want = pipeline(plain(), adamw, num_stages=num_stages, method=method)
        want.load_state_dict(state)
        torch.manual_seed(9)
        other = pipeline(plain(), adamw, num_stages=num_stages, method=method)
        other.step(*data()[0])  # in flight, and dropped
        assert other.load(tmp_path / "saved") == [1, {"a": None}]
        assert other.num_updates == 5
        assert all(torch.equal(a, b) for a, b in zip(next_losses(other), next_losses(want), strict=True))

    drained = pipeline(plain(), adamw, num_stages=1, method="bp")
    drained.load_state_dict(state)
    losses = next_losses(drained)

    bare = plain()
    loaded = {"model": bare.state_dict()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(loaded, checkpoint_id=tmp_path / "saved")
    bare.load_state_dict(loaded["model"])
    assert_same(bare.state_dict(), state["model"])
    optimizer = adamw(list(bare.parameters()))
    lr = scheduler(optimizer)
    own = read_state(tmp_path / "saved")
    assert own["num_updates"] == 5
    set_optimizer_state_dict(bare, optimizer, own["optimizer"])
    lr.load_state_dict(own["scheduler"])
    for n, ((x, y), want_loss) in enumerate(zip(data()[5:], losses, strict=True)):
        loss = nn.functional.cross_entropy(bare(x), y)
        assert torch.equal(loss, want_loss), n
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        lr.step()


def test_a_portable_checkpoint_goes_on_as_the_flushed_run(tmp_path: Path) -> None:
    """With dropout: the count of micro-batches and the seed go on too."""

    def go(saves: bool) -> tuple[list[Any], dict[str, Any], Any]:
        torch.manual_seed(0)
        pipe = pipeline(network(), sgd, num_stages=4, method="dtrp", num_microbatches=4)
        losses = [pipe.step(x, y) for x, y in data()[:5]]
        if saves:
            pipe.save(tmp_path / "saved", portable=True)
            torch.manual_seed(1)
            pipe = dtrp.Pipeline(
                network(), sgd, nn.functional.cross_entropy, num_stages=4, num_microbatches=4, lr_scheduler=scheduler
            )
            pipe.load(tmp_path / "saved")
        pipe.flush()
        losses += [pipe.step(x, y) for x, y in data()[5:]]
        pipe.flush()
        return losses, pipe.state_dict(), None

    check_equal(go(True), go(False))


def test_a_portable_checkpoint_from_ranks(tmp_path: Path, server: Server) -> None:
    pipe = pipeline(network(), adamw, num_stages=3, method="dtrp", num_microbatches=2)
    pipe.save(tmp_path / "saved", portable=True, extra={"sampler": [0]})
    outcomes = run_ranks(server, tmp_path, 2, "load_and_go_on", "dtrp", 2, 0, "portable")
    assert [outcome.returncode for outcome in outcomes] == [0] * 2, outcomes
    want = pipeline(network(), adamw, num_stages=2, method="dtrp", num_microbatches=2)
    want.load(tmp_path / "saved")
    for x, y in minibatches(10)[:2]:
        want.step(x, y)
    want.flush()
    assert_same(read_state(tmp_path / "again")["model"], want.model_state_dict())
    check_states(read_state(tmp_path / "again")["optimizer"]["state"], want.state_dict()["optimizer"]["state"])


def test_a_portable_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    pipeline(network(), num_stages=2).save(tmp_path / "saved", portable=True)
    other = pipeline(network(6), num_stages=2)
    other.step(*data()[0])
    with pytest.warns(UserWarning, match=r"call flush\(\) before it"):
        before = other.state_dict()["model"]
    with pytest.raises(dtrp.CheckpointError, match=r"the state dict is another model's: it has block5\.0\.weight"):
        other.load(tmp_path / "saved")
    assert_same(before, other.model_state_dict())
    assert other.in_flight == 1
    with pytest.raises(dtrp.CheckpointError, match="is an exact checkpoint"):
        pipe = pipeline(network(), num_stages=2)
        pipe.save(tmp_path / "exact")
        read_state(tmp_path / "exact")


# -- the folder -----------------------------------------------------------------------------------------------


def test_a_save_that_dies_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline(network(), num_stages=2)
    pipe.save(tmp_path / "saved", extra=1)
    rename = Path.rename

    def dying(self: Path, target: Path) -> Path:
        if self.name == ".saved.new":
            raise SystemExit("killed between two renames")
        return rename(self, target)

    other = pipeline(network(), num_stages=2)
    monkeypatch.setattr(Path, "rename", dying)
    monkeypatch.setattr("dtrp.saving.folder.Replacement._back", lambda self: None)
    with pytest.raises(SystemExit, match="killed between two renames"):
        other.save(tmp_path / "saved", extra=2)
    monkeypatch.undo()
    assert not (tmp_path / "saved").exists()
    assert inspect(tmp_path / "saved").extra == 1
    assert pipe.load(tmp_path / "saved") == 1
    pipe.save(tmp_path / "saved", extra=3)
    assert inspect(tmp_path / "saved").extra == 3
    assert os.listdir(tmp_path) == ["saved"]


def test_a_checkpoint_that_fails_while_it_is_put_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline(network(), num_stages=2)
    pipe.save(tmp_path / "saved")

    def failing(self: Any, seed: int) -> None:
        raise ValueError("a module refuses it")

    monkeypatch.setattr("dtrp.saving.exact.SavedStage.put", failing)
    with pytest.raises(PartlyLoadedError, match=r"cannot be put in place \(ValueError: a module refuses it\)"):
        pipe.load(tmp_path / "saved")
    with pytest.raises(RuntimeError, match="this pipeline has failed; make a new one"):
        pipe.step(*minibatches(1)[0])


def test_what_is_no_checkpoint_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").write_text("words")
    pipe = pipeline(network(), num_stages=2)
    with pytest.raises(dtrp.CheckpointError, match="exists and is no checkpoint"):
        pipe.save(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis").read_text() == "words"
    pipe.step(*data()[0])
    (tmp_path / "empty").mkdir()
    pipe.save(tmp_path / "empty")


@pytest.mark.parametrize("extra", [{1, 2}, {1: 2}, (1,), float("nan"), torch.zeros(1)], ids=lambda e: type(e).__name__)
def test_extra_is_json(tmp_path: Path, extra: Any) -> None:
    pipe = pipeline(network(), num_stages=2)
    with pytest.raises(TypeError, match="extra cannot be written as JSON"):
        pipe.save(tmp_path / "saved", extra=extra)
    assert os.listdir(tmp_path) == []
    pipe.step(*data()[0])


def test_optimizer_state_that_no_checkpoint_can_hold(tmp_path: Path) -> None:
    pipe = pipeline(network(), num_stages=2)
    pipe.step(*data()[0])
    pipe.flush()
    (optimizer, _) = pipe.optimizers
    assert optimizer is not None
    optimizer.state[optimizer.param_groups[0]["params"][0]]["history"] = {"a": object()}
    for portable in (False, True):
        with pytest.raises(dtrp.CheckpointError, match=r"history\.a is a object, which no checkpoint can hold"):
            pipe.save(tmp_path / "saved", portable=portable)
    assert os.listdir(tmp_path) == []


def test_the_manifest_is_json_and_says_nothing_of_the_machine(tmp_path: Path) -> None:
    pipe = pipeline(network(), num_stages=2)
    pipe.save(tmp_path / "saved")
    text = (tmp_path / "saved" / "manifest.json").read_text()
    assert json.loads(text)["kind"] == "exact"
    for path in (tmp_path / "saved").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path


# -- the order of samples -------------------------------------------------------------------------------------


def test_a_resumed_sampler_sees_what_was_left() -> None:
    dataset = TensorDataset(torch.arange(23))
    whole = dtrp.ResumableSampler(dataset, seed=4)
    seen: list[list[int]] = [[], [], []]
    for epoch in range(3):
        for (x,) in DataLoader(dataset, batch_size=5, sampler=whole):
            seen[epoch] += x.tolist()
            whole.advance(len(x))
    assert all(sorted(epoch) == list(range(23)) for epoch in seen)
    assert seen[0] != seen[1]
    for stop in range(15):  # mini-batches
        first = dtrp.ResumableSampler(23, seed=4)
        got: list[int] = []
        sampler, loaded = first, False
        while sampler.epoch < 3:
            for (x,) in DataLoader(dataset, batch_size=5, sampler=sampler):
                if len(got) == sum(map(len, seen[: stop // 5])) + 5 * (stop % 5) and not loaded:
                    loaded = True
                    state = json.loads(json.dumps(sampler.state_dict()))
                    sampler = dtrp.ResumableSampler(23)
                    sampler.load_state_dict(state)
                    break
                got += x.tolist()
                sampler.advance(len(x))
        assert loaded
        assert got == seen[0] + seen[1] + seen[2]


def test_a_sampler_that_nobody_advances_says_so() -> None:
    sampler = dtrp.ResumableSampler(4)
    assert sorted(sampler) == [0, 1, 2, 3]
    with pytest.raises(RuntimeError, match=r"call sampler.advance\(len\(y\)\)"):
        list(sampler)
    with pytest.raises(ValueError, match="5.*with 4 samples left"):
        sampler.advance(5)
    with pytest.raises(ValueError, match="that of 5 samples, and there are 4"):
        sampler.load_state_dict(dtrp.ResumableSampler(5).state_dict())
    with pytest.raises(ValueError, match="no state of a sampler"):
        sampler.load_state_dict({"epoch": 1})
    with pytest.raises(ValueError, match="position 9: no place"):
        sampler.load_state_dict({**sampler.state_dict(), "position": 9})


class Habits(Dataset[Any]):
    """A data set that draws from the global generators, as augmentations do."""

    def __len__(self) -> int:
        return 23

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([index, torch.rand(()).item(), random.gauss(0, 1), np.random.randn()], dtype=torch.float64)


def draws(sampler: dtrp.ResumableSampler, *, workers: int = 0, stop: int = 99) -> list[Tensor]:
    """The batches of three epochs and what the loop itself draws, until ``stop`` of them have been seen."""
    loader = DataLoader(Habits(), batch_size=6, sampler=sampler, num_workers=workers)
    seen: list[Tensor] = []
    while sampler.epoch < 3:
        for batch in loader:
            seen.append(torch.cat([batch.flatten(), torch.rand(1, dtype=torch.float64)]))
            sampler.advance(len(batch))
            if len(seen) == stop:
                return seen
    return seen


def reseed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_data_set_draws_goes_on_to_the_bit(workers: int) -> None:
    """With workers of the loader at the end of an epoch."""
    reseed(1)
    whole = draws(dtrp.ResumableSampler(23, seed=4), workers=workers)
    for stop in range(1, 13) if not workers else [4, 8]:
        reseed(1)
        first = dtrp.ResumableSampler(23, seed=4)
        draws(first, workers=workers, stop=stop)
        state = json.loads(json.dumps(first.state_dict()))
        reseed(2)
        sampler = dtrp.ResumableSampler(23)
        sampler.load_state_dict(state)
        assert all(map(torch.equal, draws(sampler, workers=workers), whole[stop:]))


def test_a_sampler_s_state_of_other_random_generators_is_refused() -> None:
    sampler = dtrp.ResumableSampler(4)
    state = sampler.state_dict()
    before = torch.get_rng_state(), random.getstate()
    python, numpy = state["random"]["python"], state["random"]["numpy"]
    for wrong in (
        None, {}, {"torch": 1}, {"torch": "AAAA"}, {"torch": "A" * 6744}, {"python": ["AAAA", 3, None]},
        {"python": [python[0], 625, None]}, {"python": [python[0], 3, "x"]}, {"numpy": [numpy[0], 10**6, 0, 0.0]},
        {"numpy": [numpy[0], -1, 0, 0.0]}, {"numpy": [1]}, {"numpy": [numpy[0], 3, 5, 0.0]},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="no states of random generators"):
            sampler.load_state_dict({**state, "random": wrong and {**state["random"], **wrong}, "position": 2})
        assert sampler.position == 0
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    del state["random"]  # as versions wrote it that kept none
    sampler.load_state_dict({**state, "position": 2})
    assert len(list(sampler)) == 2
    assert torch.equal(before[0], torch.get_rng_state())


def test_batches_from_the_middle_of_an_epoch() -> None:
    own = load_data("random", image_size=8).limit(50, None)
    options: dict[str, Any] = {"dataset": own, "seed": 1, "epoch": 2, "augment": True}
    whole = list(batches(own.train_x, own.train_y, 16, **options))
    for n in range(5):
        start = min(16 * n, 50)
        rest = list(batches(own.train_x, own.train_y, 16, start=start, **options))
        targets = list(batches(own.train_x, own.train_y, 16, start=start, images=False, **options))
        assert len(rest) == len(targets) == len(whole) - n
        for (x, y), (_, z), (a, b) in zip(rest, targets, whole[n:], strict=True):
            assert x is not None
            assert a is not None
            assert torch.equal(x, a)
            assert torch.equal(y, b)
            assert torch.equal(z, b)
    with pytest.raises(ValueError, match="start=7 with 50 images in batches of 16"):
        batches(own.train_x, own.train_y, 16, start=7, **options)
