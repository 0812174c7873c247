"""Stages with losses of their own (dgl): what they learn, their auxiliary networks, and what is saved of them."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    Mean,
    assert_same,
    classifiers,
    clone,
    means,
    minibatches,
    network,
    pipeline,
    scheduler,
    sgd,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import dtrp
from dtrp.cli import run
from dtrp.models import auxiliary, get_model
from dtrp.saving import CheckpointError, read_state
from dtrp.splitting.stages import equal_cuts


def trained(aux: Any, num_stages: int = 4, batches: int = 6, **options: Any) -> dtrp.Pipeline:
    torch.manual_seed(0)
    pipe = pipeline(network(), num_stages=num_stages, method="dgl", aux=aux, **options)
    for x, y in minibatches(batches):
        pipe.step(x, y)
    return pipe


# -- what the stages learn ------------------------------------------------------------------------------------


@pytest.mark.sampled(8)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("num_microbatches", [1, 3])
def test_it_is_a_plain_loop_over_the_stages_to_the_bit(num_microbatches: int, dtype: torch.dtype) -> None:
    """Each stage is trained by its own optimizer on what the one before passes on; the equations are in `oracles`."""
    torch.set_default_dtype(dtype)
    model = network()
    networks = classifiers([0, 1, 2])
    bounds = [0, *equal_cuts(8, 3), 8]
    parts = [clone(model)[a:b] for a, b in itertools.pairwise(bounds)]
    plain = list(zip(parts, [*clone(networks), nn.Identity()], strict=True))
    pipe = pipeline(model, num_stages=3, method="dgl", aux=networks, num_microbatches=num_microbatches)
    optimizers = [sgd([p for part in pair for p in part.parameters()]) for pair in plain]
    schedules = [scheduler(optimizer) for optimizer in optimizers]
    m = 0
    for x, y in minibatches(20):
        losses = []
        for h, target in zip(x.tensor_split(num_microbatches), y.tensor_split(num_microbatches), strict=True):
            for k, (own, aux) in enumerate(plain):
                with pipe.rng(k, m):
                    out = own(h)
                    loss = cross_entropy(aux(out), target) * (len(target) / len(y))
                loss.backward()
                h = out.detach()
            losses.append(loss.detach())
            m += 1
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        assert torch.equal(pipe.step(x, y), sum(losses[1:], losses[0]))
    for stage, aux, pair in zip(pipe.stages, pipe.aux, plain, strict=True):
        assert_same(stage.state_dict(), pair[0].state_dict())
        assert_same({} if aux is None else aux.state_dict(), pair[1].state_dict())
    assert pipe.in_flight == 0


def test_no_stage_learns_from_a_later_one() -> None:
    a, b = trained(means), trained(lambda stages: [*means(stages)[:-1], nn.Sequential(nn.Tanh(), Mean(4))])
    for k, same in enumerate([True, True, False, True]):
        name = next(name for name, _ in a.stages[k].named_parameters())
        mine, other = a.stages[k].get_parameter(name), b.stages[k].get_parameter(name)
        assert torch.equal(mine, other) == (k < 2), same


def test_a_loss_that_is_not_finite_at_one_stage_leaves_out_its_update_alone() -> None:
    class Spoils(Mean):
        calls = 0

        def forward(self, out: Any) -> Tensor:
            self.calls += 1
            return super().forward(out) * (math.nan if self.calls == 3 else 1.0)

    pipe = trained(lambda stages: [Mean(), Spoils(), Mean()], on_nonfinite="skip")
    assert pipe.skipped_updates() == {0: [], 1: [2], 2: [], 3: []}
    with pytest.raises(
        dtrp.StageError, match=r"stage 1, forward of micro-batch 2 .* the loss of mini-batch 2 is nan.* \(stage 1\)"
    ):
        trained(lambda stages: [Mean(), Spoils(), Mean()])


def test_an_output_that_the_network_writes_is_refused() -> None:
    with pytest.raises(dtrp.StageError, match="stage 0, forward .* the auxiliary network changed its input in place"):
        trained(lambda stages: [nn.Sequential(nn.ReLU(inplace=True), Mean()), Mean(), Mean()])


def test_it_is_weighed_with_its_stage() -> None:
    pipe, bp = trained(classifiers), pipeline(network(), num_stages=4, method="bp")
    for k, own in enumerate(pipe.aux):
        more = sum(t.nbytes for t in [*own.parameters(), *own.buffers()]) if own is not None else 0
        assert pipe.memory()[k]["weights"] == bp.memory()[k]["weights"] + more
    assert pipe.infer(minibatches(1)[0][0]).shape == (25, 3)
    assert all(p.grad is None for own in pipe.aux if own is not None for p in own.parameters())


# -- what is refused ------------------------------------------------------------------------------------------


def own_layer(stages: Any) -> list[nn.Module]:
    return [stages[1], *classifiers(stages)[1:]]


@pytest.mark.parametrize(
    ("method", "aux", "rule"),
    [
        ("dgl", None, r"method='dgl' trains each stage by a loss of its own: pass aux=.* each of the 3 stages before"),
        ("bp", means, r"aux= with method='bp', whose stages learn from the last one's loss alone; leave it out"),
        ("dgl", [Mean(), Mean()], r"aux has 2 networks for the 3 stages before the last"),
        ("dgl", [Mean(), None, Mean()], r"aux\[1\] is None, and stage 1 has parameters to train"),
        ("dgl", Mean(), r"aux is a Mean; pass a list of modules"),
        ("dgl", [1, 2, 3], r"aux is a list; pass a list of modules"),
        ("dgl", [Mean()] * 3, r"weight of aux\[1\] is a tensor of stage 0 too"),
        ("dgl", own_layer, r"block2.0.weight of aux\[0\] is a tensor of stage 1 too"),
    ],
)
def test_networks_that_do_not_fit(method: str, aux: Any, rule: str) -> None:
    with pytest.raises((TypeError, ValueError), match=rule):
        pipeline(network(), num_stages=4, method=method, aux=aux)


def test_names_that_would_be_two_and_targets_that_are_missing() -> None:
    model = nn.Sequential()
    model.add_module("aux", nn.Linear(5, 5))
    model.add_module("head", nn.Linear(5, 3))
    with pytest.raises(ValueError, match="stage 0 has a layer named 'aux'"):
        pipeline(model, num_stages=2, method="dgl")
    with pytest.raises(TypeError, match="y is None; by method 'dgl' each stage has a loss of its own"):
        trained(means, batches=0).step(torch.randn(4, 5), None)
    with pytest.raises(ValueError, match="method='dgl': a plan is made of the layers' costs"):
        dtrp.plan(network(), minibatches(1)[0], cross_entropy, num_workers=2, method="dgl")
    from dtrp.pipelining import ScheduleDTRP

    with pytest.raises(ValueError, match="method='dgl' needs auxiliary networks, and targets on the first rank"):
        ScheduleDTRP(None, sgd, 2, cross_entropy, method="dgl")


# -- what is saved --------------------------------------------------------------------------------------------


def test_the_networks_are_no_part_of_the_model(tmp_path: Path) -> None:
    pipe = trained(classifiers)
    state = pipe.state_dict()
    assert state["model"].keys() == state["optimizer"]["state"].keys() | dict(network().named_buffers()).keys()
    for layer, aux in zip(("block1", "block3", "block5"), pipe.aux, strict=False):
        assert aux is not None
        mine = {f"aux.{layer}.{name}": t for name, t in aux.state_dict().items()}
        assert_same({name: state["aux"]["model"][name] for name in mine}, mine)
    trained_names = {name for name in state["aux"]["model"] if name.endswith(("weight", "bias"))}
    assert state["aux"]["optimizer"]["state"].keys() == trained_names
    network().load_state_dict(pipe.model_state_dict())
    pipe.save_model(tmp_path / "model.pt")
    network().load_state_dict(torch.load(tmp_path / "model.pt"))
    pipe.save(tmp_path / "saved", portable=True)
    read = read_state(tmp_path / "saved")
    assert_same(read["model"], state["model"])
    assert_same(read["aux"]["model"], state["aux"]["model"])
    assert read["aux"]["optimizer"]["param_groups"] == state["aux"]["optimizer"]["param_groups"]


@pytest.mark.parametrize("on_disk", [True, False])
def test_at_other_cuts_a_network_is_found_by_its_layer(tmp_path: Path, on_disk: bool) -> None:
    pipe = trained(classifiers)
    pipe.flush()
    pipe.save(tmp_path, portable=True)
    state = pipe.state_dict()

    def loaded(**options: Any) -> dtrp.Pipeline:
        other = pipeline(network(), **options)
        if on_disk:
            other.load(tmp_path)
        else:
            other.load_state_dict(state)
        assert_same(other.model_state_dict(), pipe.model_state_dict())
        return other

    halves = loaded(num_stages=2, method="dgl", aux=classifiers)  # cut where the second stage of four ends
    assert pipe.aux[1] is not None
    assert halves.aux[0] is not None
    assert_same(halves.aux[0].state_dict(), pipe.aux[1].state_dict())
    momentum = halves.optimizers[0].state[halves.aux[0][1].weight]["momentum_buffer"]  # type: ignore[union-attr, index]
    assert torch.equal(momentum, state["aux"]["optimizer"]["state"]["aux.block3.1.weight"]["momentum_buffer"])
    with pytest.warns(UserWarning, match="no auxiliary network like that of stage 0, which stays as it is"):
        loaded(cuts=[3], method="dgl", aux=classifiers)
    with pytest.warns(UserWarning, match="like that of stage 0"):
        loaded(num_stages=2, method="dgl", aux=means)
    bp = loaded(num_stages=3, method="bp")
    assert "aux" not in bp.state_dict()
    bp.save(tmp_path, portable=True)
    state = bp.state_dict()
    with pytest.warns(UserWarning, match="like that of stage 0"):
        again = loaded(num_stages=2, method="dgl", aux=classifiers)
    again.step(*minibatches(1)[0])


def test_an_exact_checkpoint_is_of_the_same_networks(tmp_path: Path) -> None:
    trained(classifiers).save(tmp_path)
    with pytest.raises(CheckpointError, match=r"parameters of stage 0, aux\.block1\.weight is only here"):
        pipeline(network(), num_stages=4, method="dgl", aux=means).load(tmp_path)


# -- the networks that are made -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 9, 1])
def test_of_images_it_is_the_papers(size: int) -> None:
    stage = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6))
    before = clone(stage).state_dict()
    own, none = auxiliary(torch.randn(2, 3, size, size), 7)([stage, nn.Sequential(nn.Flatten()), nn.Linear(6, 7)])
    assert none is None
    assert_same(stage.state_dict(), before)
    assert stage.training
    assert own is not None
    shrunk = math.ceil(size / 4)
    x = torch.randn(4, 6, size, size)
    assert own.shrink(x).shape == (4, 6, shrunk, shrunk)
    h = nn.functional.adaptive_avg_pool2d(x, shrunk)
    for name in ("block1", "block2", "block3"):
        conv, norm, _ = own.get_submodule(name)
        assert conv.weight.shape == (6, 6, 1, 1)
        h = norm(conv(h)).relu()
    h = nn.functional.adaptive_avg_pool2d(h, 2).flatten(1)
    for name in ("hidden1", "hidden2", "hidden3"):
        linear, norm, _ = own.get_submodule(name)
        assert linear.weight.shape == (24, 24)
        h = norm(linear(h)).relu()
    assert torch.equal(own(x), own.linear(h))
    assert own(x).shape == (4, 7)


def test_of_features_and_text() -> None:
    flat, tokens = nn.Linear(5, 8, dtype=torch.float64), nn.Embedding(11, 8)
    own = auxiliary(torch.randn(2, 5, dtype=torch.float64), 3)([flat, nn.Identity()])[0]
    assert own is not None
    assert [name for name, _ in own.named_children()] == ["hidden1", "hidden2", "hidden3", "linear"]
    assert own(flat(torch.randn(4, 5, dtype=torch.float64))).shape == (4, 3)
    own = auxiliary(torch.zeros(2, 6, dtype=torch.int64), 11)([tokens, nn.Identity()])[0]
    assert own is not None
    assert own(tokens(torch.zeros(4, 6, dtype=torch.int64))).shape == (4, 6, 11)


class Pair(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


@pytest.mark.parametrize(
    ("stage", "rule"),
    [
        (Pair(5, 5), "stage 0 passes on a tuple, and the auxiliary networks made here take features"),
        (nn.Sequential(nn.Linear(5, 5), nn.Unflatten(1, (5, 1, 1, 1))), r"torch.float32 of shape \(2, 5, 1, 1, 1\)"),
    ],
)
def test_outputs_that_none_is_made_for(stage: nn.Module, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        auxiliary(torch.randn(2, 5), 3)([stage, nn.Identity()])
    with pytest.raises(ValueError, match="num_classes=0"):
        auxiliary(torch.randn(2, 5), 0)


# -- the command line -----------------------------------------------------------------------------------------

SMALL = ["--data", "digits", "--limit-train", "90", "--limit-test", "50", "--batch-size", "32", "--epochs", "2",
         "--threads", "1", "--method", "dgl"]  # fmt: skip


def test_it_trains_stops_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    small = ["train", "--model", "mlp", "--stages", "3", "--num-microbatches", "2", "--lr-schedule", "constant", *SMALL]
    assert run([*small, "--out", str(tmp_path / "whole")]) == 0
    assert run([*small, "--epochs", "1", "--out", str(out)]) == 0
    assert run(["train", "--resume", str(out), "--epochs", "2"]) == 0
    saved = [torch.load(folder / "model.pt", weights_only=True) for folder in (tmp_path / "whole", out)]
    assert_same(*saved)
    get_model("mlp", 1, 10, image_size=8).load_state_dict(saved[0])
    capsys.readouterr()
    for name, parts, rule in (
        ("mlp", 26, "last mini-batch has 26 samples, and its micro-batches one"),
        ("gpt", 1, "text"),
    ):
        assert run(["train", "--model", name, "--stages", "2", *SMALL, "--num-microbatches", str(parts)]) == 2
        assert rule in capsys.readouterr().err
    assert run(["schedule", "--method", "dgl", "--stages", "2", "--minibatches", "2"]) == 0
    assert "local losses" in capsys.readouterr().out
    assert run(["methods", "dgl"]) == 0
    assert "arXiv:1901.08164" in capsys.readouterr().out


def test_images_and_text_too(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question " * 40)
    for options in (
        ["--model", "resnet14-8", "--max-updates", "2"],
        ["--model", "gpt", "--data", "text", "--data-dir", str(text), "--layers", "2", "--width", "16", "--heads", "2",
         "--context", "8", "--limit-test", "20"],
    ):  # fmt: skip
        assert run(["train", *SMALL, "--stages", "3", *options]) == 0


def test_it_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = [word for word in SMALL if word not in ("--method", "dgl")]
    command = [
        "compare",
        *small,
        "--model",
        "mlp",
        "--methods",
        "bp,dgl",
        "--stages",
        "2",
        "--seeds",
        "1",
        "--one-process",
    ]
    assert run([*command, "--epochs", "1", "--out", str(tmp_path / "grid")]) == 0
    assert "dgl" in capsys.readouterr().out
