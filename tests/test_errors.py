"""What a user can get wrong, and what the pipeline answers."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections import OrderedDict
from typing import Any

import pytest
import torch
from helpers import adamw, assert_same, clone, minibatches, network, pipeline, sgd
from torch import Tensor, nn
from torch.nn.utils import prune

import dtrp
from dtrp import Pipeline, StageError, get_method
from dtrp.engine.base import Losses
from dtrp.planning.profile import Profiler
from dtrp.splitting.stages import check_device, equal_cuts, into_stages
from dtrp.stage.stash import MicroBatch

cross_entropy = nn.functional.cross_entropy


class Halving:
    """A schedule written by hand, whose state nothing can save."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] /= 2


@pytest.mark.parametrize(
    ("options", "kind", "rule"),
    [
        ({"num_stages": 9}, ValueError, "num_stages=9 but the model has 8 layers; pass num_stages<=8"),
        ({"num_stages": 0}, ValueError, "num_stages=0: pass a whole number of at least 1"),
        ({"num_stages": 2.0}, ValueError, "num_stages=2.0"),
        ({"num_microbatches": 1.5}, ValueError, "num_microbatches=1.5"),
        ({"seed": 2**63}, ValueError, "seed=9223372036854775808: pass a whole number from 0"),
        ({"cuts": ["a"]}, ValueError, "pass whole numbers"),
        ({"seed": 1.5}, ValueError, "seed=1.5: pass a whole number"),
        ({"devices": "cpuu"}, ValueError, "devices='cpuu': torch cannot use them"),
        ({"cuts": [3, 3]}, ValueError, "put them in rising order, each once"),
        ({"cuts": [5, 2]}, ValueError, "put them in rising order"),
        ({"cuts": [0, 2]}, ValueError, "0 is out of range; the model has 8 layers, cut at 1..7"),
        ({"cuts": [2, 8]}, ValueError, "8 is out of range"),
        ({"cuts": [2, -1]}, ValueError, "-1 is out of range"),
        ({"cuts": [2], "num_stages": 3}, ValueError, r"cuts=\[2\] make 2 stages but num_stages=3"),
        ({"method": "dtpr"}, ValueError, "unknown method 'dtpr'; did you mean"),
        ({"method": 3}, TypeError, "method is a int; pass a name"),
        ({"num_microbatches": 0}, ValueError, "num_microbatches=0"),
        ({"devices": ["cpu"] * 3, "num_stages": 2}, ValueError, "devices has 3 entries for 2 stages"),
        ({"optimizer": torch.optim.SGD([torch.zeros(1)])}, TypeError, "optimizer is a SGD made already; each stage has"),
        ({"optimizer": "sgd"}, TypeError, "optimizer is a str; pass a function"),
        ({"optimizer": lambda p: None}, TypeError, "optimizer returned a NoneType"),
        ({"optimizer": lambda p: torch.optim.LBFGS(p)}, TypeError, "LBFGS calls the loss many times"),
        ({"optimizer": lambda p: sgd([*p, nn.Parameter(torch.zeros(1))])}, ValueError, "holds others"),
        ({"loss_fn": None}, TypeError, "loss_fn is a NoneType; pass a function"),
        ({"lr_scheduler": 3}, TypeError, "lr_scheduler is a int"),
        ({"lr_scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau}, TypeError, "needs a metric at every step"),
        ({"lr_scheduler": lambda o: 3}, TypeError, "lr_scheduler returned a int without step, state_dict, load_state_dict"),
        ({"lr_scheduler": Halving}, TypeError, "lr_scheduler returned a Halving without state_dict, load_state_dict; it"),
        ({"compiled": True}, TypeError, "unexpected keyword argument 'compiled'"),
        ({"loss_on": "first"}, ValueError, "loss_on='first': choose 'last' or 'all'"),
        ({"timeout_s": 0}, ValueError, "timeout_s=0: pass a number of seconds above 0"),
        ({"group": 3}, TypeError, "group is a int; pass a process group"),
        ({"group": torch.distributed.GroupMember.NON_GROUP_MEMBER}, ValueError, "this process is not in the group"),
        ({"mesh": 3}, TypeError, "mesh is a int; pass init_device_mesh"),
        ({"mesh": 3, "group": 3}, ValueError, "pass one of the two"),
    ],
)  # fmt: skip
def test_what_construction_refuses(options: dict[str, Any], kind: type[Exception], rule: str) -> None:
    arguments = {"optimizer": sgd, "loss_fn": cross_entropy, **options}
    with pytest.raises(kind, match=rule):
        Pipeline(network(), arguments.pop("optimizer"), arguments.pop("loss_fn"), **arguments)


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def with_own_parameter() -> nn.Sequential:
    model = network()
    model.register_parameter("scale", nn.Parameter(torch.ones(1)))
    return model


def frozen() -> nn.Sequential:
    return network().requires_grad_(False)


shared = nn.Linear(5, 5)


@pytest.mark.parametrize(
    ("model", "options", "kind", "rule"),
    [
        (nn.Linear(5, 3), {}, TypeError, "model is a Linear, whose forward cannot be cut"),
        (Residual(nn.Linear(5, 5)), {}, TypeError, "model is a Residual, whose forward cannot be cut"),
        (with_own_parameter(), {}, TypeError, "the nn.Sequential itself has scale"),
        (nn.Sequential(), {}, ValueError, "empty nn.Sequential"),
        ([], {}, ValueError, "empty list"),
        ([nn.Linear(5, 5), 3], {}, TypeError, r"model\[1\] is a int; pass a list of modules, one a stage"),
        (3, {}, TypeError, "model is a int"),
        ([nn.Linear(5, 5), nn.Linear(5, 3)], {"num_stages": 3}, ValueError, "the list has 2 modules, one a stage"),
        ([nn.Linear(5, 5), nn.Linear(5, 3)], {"cuts": [1]}, ValueError, "already is one module a stage"),
        (frozen(), {}, ValueError, "no parameter that requires a gradient"),
        (nn.Sequential(nn.LazyLinear(5)), {}, ValueError, "weight of layer 0 has no shape yet; run the model once"),
        (nn.Sequential(nn.ReLU()), {}, ValueError, "no parameter that requires a gradient"),
        (nn.Sequential(shared, nn.ReLU(), shared), {"num_stages": 3}, ValueError,
         "0.weight of stage 0 and 2.weight of stage 2 are one tensor"),
    ],
)  # fmt: skip
def test_models_that_cannot_be_cut(model: Any, options: dict[str, Any], kind: type[Exception], rule: str) -> None:
    with pytest.raises(kind, match=rule):
        Pipeline(model, sgd, cross_entropy, **options)


def test_one_module_in_two_places_of_one_stage_is_fine() -> None:
    act = nn.Tanh()
    model = nn.Sequential(shared, act, shared, act, nn.Linear(5, 3))
    assert [len(stage) for stage in into_stages(model, 2)] == [3, 2]
    with pytest.raises(ValueError, match="one tensor"):
        pipeline(model, cuts=[2])
    pipe = pipeline(model, num_stages=2, method="dtrp")
    for x, y in minibatches(4):
        pipe.step(x, y)
    pipe.flush()
    model.load_state_dict(pipe.model_state_dict())


@pytest.mark.parametrize(("layers", "num_stages"), [(1, 1), (7, 3), (8, 3), (9, 3), (11, 4), (8, 8)])
def test_equal_cuts_give_every_layer_once(layers: int, num_stages: int) -> None:
    bounds = [0, *equal_cuts(layers, num_stages), layers]
    sizes = [b - a for a, b in itertools.pairwise(bounds)]
    assert sum(sizes) == layers
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("x", "y", "kind", "rule"),
    [
        (torch.zeros(0, 5), torch.zeros(0, dtype=torch.long), ValueError, "an empty mini-batch"),
        (torch.zeros(3, 5), torch.zeros(2, dtype=torch.long), ValueError, "x has 3 samples and y has 2"),
        (torch.zeros(()), torch.zeros(2), ValueError, "x has no dimension"),
        ([1, 2], torch.zeros(2), TypeError, "x is a list; step takes tensors"),
        (torch.zeros(2, 5), None, TypeError, "y is a NoneType"),
    ],
)
def test_a_minibatch_that_does_not_fit_is_refused_before_anything_happens(
    x: Any, y: Any, kind: type[Exception], rule: str
) -> None:
    pipe = pipeline(network(), num_stages=3)
    with pytest.raises(kind, match=rule):
        pipe.step(x, y)
    assert pipe.num_updates == 0
    pipe.step(*minibatches(1)[0])  # and it still works


class Fails(nn.Module):
    def __init__(self, at: int) -> None:
        super().__init__()
        self.calls, self.at = 0, at

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            raise RuntimeError("the disk is on fire")
        return x


class Gives(nn.Module):
    def __init__(self, what: Any) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Any:
        return self.what(x)


def three(middle: nn.Module) -> list[nn.Module]:
    return [nn.Linear(5, 5), middle, nn.Linear(5, 3)]


def test_a_stages_error_says_where_and_why_and_ends_the_pipeline() -> None:
    pipe = pipeline(three(Fails(4)), method="fdg")
    batches = minibatches(6)
    with pytest.raises(
        StageError, match=r"stage 1, forward of micro-batch 3 \(mini-batch 3\): RuntimeError: the disk is on fire"
    ) as caught:
        for x, y in batches:
            pipe.step(x, y)
    error = caught.value
    assert (error.stage, error.microbatch, error.minibatch) == (1, 3, 3)
    assert isinstance(error.__cause__, RuntimeError)
    with pytest.raises(RuntimeError, match=r"this pipeline has failed; make a new one \(it failed with: stage 1"):
        pipe.step(*batches[0])
    assert all(memory["stash"] == 0 for memory in pipe.memory().values())


def test_an_error_in_a_recomputed_forward_is_the_backwards() -> None:
    pipe = pipeline(three(nn.Sequential(nn.Linear(5, 5), Fails(3))), method="dtrp")
    with pytest.raises(StageError, match=r"stage 1, backward of micro-batch 0 \(mini-batch 0\): RuntimeError"):
        for x, y in minibatches(8):
            pipe.step(x, y)


def test_an_error_in_an_update() -> None:
    class Broken(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            raise OSError("no more weights")

    pipe = pipeline(network(), lambda p: Broken(p, lr=0.1), num_stages=2, method="bp")
    with pytest.raises(StageError, match=r"stage 1, update \(mini-batch 0\): OSError: no more weights") as caught:
        pipe.step(*minibatches(1)[0])
    assert caught.value.microbatch is None


@pytest.mark.parametrize("name", ["dtrp", "fdg", "bp"])
@pytest.mark.parametrize(
    ("gives", "rule"),
    [
        (lambda x: {x}, "stage 1, forward of micro-batch 0 .*its output is a set; between stages go tensors"),
        (lambda x: None, "stage 2, forward .*NoneType"),
        (lambda x: x[:, :2], "stage 2, forward .*RuntimeError"),
    ],
)
def test_a_stages_output_is_a_value_that_fits(name: str, gives: Any, rule: str) -> None:
    pipe = pipeline(three(Gives(gives)), method=name)
    with pytest.raises(StageError, match=rule):
        pipe.step(*minibatches(1)[0])


@pytest.mark.parametrize(
    ("loss_fn", "rule"),
    [
        (lambda out, y: cross_entropy(out, y, reduction="none"), r"loss_fn returned a tensor of shape \(25,\)"),
        (lambda out, y: 1.0, "loss_fn returned a float; it returns a scalar tensor"),
        (lambda out, y: cross_entropy(out, y).detach(), "the loss has no gradient"),
        (lambda out, y: cross_entropy(out, y) * float("nan"), "the loss of mini-batch 0 is nan"),
        (lambda out, y: cross_entropy(out, y) / 0, "the loss of mini-batch 0 is inf"),
    ],
)
def test_a_loss_is_a_finite_scalar(loss_fn: Any, rule: str) -> None:
    model = network()
    before = clone(model).state_dict()
    pipe = Pipeline(model, sgd, loss_fn, num_stages=3, num_microbatches=1)
    with pytest.raises(StageError, match=rf"stage 2, forward of micro-batch 0 \(mini-batch 0\): .*{rule}"):
        pipe.step(*minibatches(1)[0])
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), "nothing was learned from it"


def test_a_loss_that_goes_wrong_later_is_named_with_its_minibatch() -> None:
    factors = iter([1.0, 1.0, 1.0, float("inf")])
    pipe = Pipeline(
        network(), sgd, lambda out, y: cross_entropy(out, y) * next(factors), num_stages=2, num_microbatches=1
    )
    x, y = minibatches(1)[0]
    for _ in range(3):
        pipe.step(x, y)
    with pytest.raises(StageError, match=r"the loss of mini-batch 3 is inf; lower .* of this mini-batch$") as caught:
        pipe.step(x, y)
    assert isinstance(caught.value.__cause__, FloatingPointError)


class SometimesInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x.add_(1) if self.calls > 3 else x + 1


@pytest.mark.parametrize("name", ["dtrp", "fdg", "bp"])
def test_a_stage_that_starts_to_write_its_input_later_is_refused(name: str) -> None:
    pipe = pipeline([nn.Linear(5, 5), nn.Sequential(SometimesInPlace(), nn.Linear(5, 3))], method=name)
    with pytest.raises(StageError, match=r"stage 1.*in.?place"):
        for x, y in minibatches(8):
            pipe.step(x, y)


def test_rng_of_a_stage_that_is_not() -> None:
    with pytest.raises(ValueError, match="stage=3: the pipeline has stages 0..2"):
        pipeline(network(), num_stages=3).rng(3, 0)


def test_inference_mode_is_for_infer_and_not_for_step() -> None:
    pipe = pipeline(network(), num_stages=3)
    x, y = minibatches(1)[0]
    with torch.inference_mode():
        with pytest.raises(RuntimeError, match="outside torch.inference_mode"):
            pipe.step(x, y)
        assert pipe.infer(x).shape == (25, 3)
        made_there = x * 1.0
    for _ in range(4):
        pipe.step(made_there, y)
    pipe.flush()


def test_parameters_frozen_or_freed_later_are_refused() -> None:
    model = network()
    pipe = pipeline(model, num_stages=3)
    pipe.step(*minibatches(1)[0])
    next(model.parameters()).requires_grad_(False)
    with pytest.raises(RuntimeError, match="requires_grad of block0.0.weight has changed since the pipeline was made"):
        pipe.step(*minibatches(1)[0])


@pytest.mark.parametrize("how", ["pruned", "wrapped"])
def test_parameters_that_go_by_another_name_later_are_refused(how: str) -> None:
    model = nn.Sequential(*(nn.Linear(5, 5, bias=False) for _ in range(4)))
    pipe = Pipeline(model, sgd, nn.functional.mse_loss, num_stages=2, method="dtrp", num_microbatches=1)
    x = torch.ones(3, 5)
    pipe.step(x, x)
    first = pipe.stages[0]
    if how == "pruned":
        prune.l1_unstructured(model[0], "weight", amount=1)
    else:
        first[0] = nn.Sequential(first[0])
    with pytest.raises(RuntimeError, match=r"0\.\S*weight\S* has changed since the pipeline was made"):
        pipe.step(x, x)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("losses", [1, 3])
def test_losses_that_are_not_finite_are_found_among_others(losses: int, value: float) -> None:
    seen = Losses(2, at_once=False)
    large = torch.tensor(torch.finfo(torch.float16).max, dtype=torch.float16)  # the sum of two is not finite
    for i in range(losses):
        seen.add(MicroBatch(i, 5, 1 / losses), large)
    seen.check()
    for i in range(losses):
        seen.add(MicroBatch(i, 6, 1 / losses), torch.tensor(value if i == losses - 1 else 1.0))
    with pytest.raises(
        StageError, match=f"stage 2, forward of micro-batch {losses - 1} .mini-batch 6.*loss of mini-batch 6 is"
    ):
        seen.check()


def test_a_failed_pipeline_lets_go_of_the_batch() -> None:
    pipe = pipeline(three(Fails(2)), method="fdg")
    x, y = minibatches(1)[0]
    gone = weakref.ref(x)
    pipe.step(x, y)
    with pytest.raises(StageError, match="on fire"):
        pipe.step(x, y)
    del x
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(("kind", "missing"), [("mps", "mps.Stream"), ("meta", "meta.Stream"), ("hpu", "hpu.Stream")])
def test_devices_without_streams_are_refused(kind: str, missing: str) -> None:
    with pytest.raises(
        ValueError, match=f"a stage cannot work on {kind}: torch has no torch.{missing}; put the model on"
    ):
        check_device(torch.device(kind))


@pytest.mark.parametrize("kind", ["cpu", "cuda", "cuda:1", "xpu"])
def test_devices_with_streams_are_not(kind: str) -> None:
    assert check_device(torch.device(kind)) == torch.device(kind)


def test_a_device_is_refused_before_anything_is_moved_there() -> None:
    model = network()
    with pytest.raises(ValueError, match="a stage cannot work on meta: "):
        pipeline(model, num_stages=2, devices=["cpu", "meta"])
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    with pytest.raises(ValueError, match="a stage cannot work on meta: "):
        Profiler(model, minibatches(1)[0], cross_entropy, device="meta")
    with pytest.raises(ValueError, match="a stage cannot work on meta: "):
        Pipeline(model.to("meta"), sgd, cross_entropy, num_stages=2, num_microbatches=1)


class BreaksBackward(nn.Module):
    """Its backward fails when it is told to, after what is behind it has had its gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.broken = nn.Linear(5, 5), False

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(self.check)
        return self.layer(x)

    def check(self, gradient: Tensor) -> None:
        if self.broken:
            raise ValueError("on fire")


@pytest.mark.parametrize("where", ["backward", "update"])
@pytest.mark.parametrize("method", ["bp", "fdg", "dtrp", "spectrain"])
def test_gradients_are_the_engines_after_a_failure_too(method: str, where: str) -> None:
    def broken(*args: Any) -> None:
        raise ValueError("on fire")

    model = nn.Sequential(nn.Linear(5, 5), nn.Sequential(nn.Linear(5, 5), BreaksBackward()), nn.Linear(5, 3))
    pipe = Pipeline(model, sgd, cross_entropy, num_stages=3, method=method, num_microbatches=2)
    for x, y in minibatches(7):
        pipe.step(x, y)
    copies = [held.weights for stage in pipe._engine.stages for held in stage.stash if held.weights is not None]
    if where == "backward":
        model[1][1].broken = True
    else:
        assert pipe.optimizers[1] is not None
        pipe.optimizers[1].register_step_pre_hook(broken)
    with pytest.raises(StageError, match="on fire"):
        for x, y in minibatches(7):
            pipe.step(x, y)
    leaves = [*model.parameters(), *(leaf for version in copies for leaf in version.leaves)]
    assert all(p.grad is None for p in leaves)
    pipe.close()
    assert all(p.grad is None for p in leaves)


def test_a_clean_exit_flushes_and_an_error_does_not() -> None:
    with pipeline(network(), num_stages=4) as pipe:
        for x, y in minibatches(6):
            pipe.step(x, y)
        assert pipe.in_flight > 0
    assert [stage.version for stage in pipe._engine.stages] == [6] * 4
    with pytest.raises(KeyError, match="mine"), pipeline(network(), num_stages=4) as pipe:
        for x, y in minibatches(6):
            pipe.step(x, y)
        raise KeyError("mine")
    assert [stage.version for stage in pipe._engine.stages] == [0, 2, 4, 6]


# -- state dicts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize(("save_at", "load_at"), [(4, 1), (1, 3), (4, 4), (2, 8)])
def test_a_state_dict_does_not_know_k(make: Any, save_at: int, load_at: int) -> None:
    batches = minibatches(12, last=32)
    model = network()
    first = pipeline(model, make, num_stages=save_at, method="dtrp")
    for x, y in batches[:6]:
        first.step(x, y)
    first.flush()
    state = first.state_dict()
    assert set(state) == {"model", "optimizer", "scheduler", "num_updates"}
    assert state["num_updates"] == 6
    names = [name for name, _ in model.named_parameters()]
    assert set(state["optimizer"]["state"]) == set(names)
    assert [group["params"] for group in state["optimizer"]["param_groups"]] == [names]

    def go_on(pipe: Pipeline) -> tuple[list[Tensor], dict[str, Tensor]]:
        pipe.load_state_dict(state)
        assert pipe.num_updates == 6
        losses = [pipe.step(x, y) for x, y in batches[6:]]
        pipe.flush()
        return losses, pipe.model_state_dict()

    def no_dropout() -> nn.Sequential:
        torch.manual_seed(99)
        return network().apply(lambda m: setattr(m, "p", 0.0) if isinstance(m, nn.Dropout) else None)

    # the same optimizer steps, whatever K the state came from: bp at K=1 is the reference
    want = go_on(pipeline(no_dropout(), make, num_stages=1, method="bp"))
    got = go_on(pipeline(no_dropout(), make, num_stages=load_at, method="bp"))
    assert all(torch.equal(a, b) for a, b in zip(got[0], want[0], strict=True))
    assert_same(got[1], want[1])
    rates = {p.param_groups[0]["lr"] for p in first.optimizers if p is not None}
    assert len(rates) == 1


def test_state_dicts_are_snapshots() -> None:
    pipe = pipeline(network(), num_stages=2)
    x, y = minibatches(1)[0]
    pipe.step(x, y)
    pipe.flush()
    state = pipe.state_dict()
    copy = clone_state(state["model"])
    pipe.step(x, y)
    pipe.flush()
    assert_same(state["model"], copy)


def clone_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state.items()}


def test_state_dicts_of_another_model_are_refused_before_anything_is_written() -> None:
    pipe = pipeline(network(), num_stages=2)
    before = pipe.model_state_dict()
    other = pipeline(network(5), num_stages=2).state_dict()
    with pytest.raises(ValueError, match=r"another model's: it lacks block4\."):
        pipe.load_state_dict(other)
    narrow = pipe.state_dict()
    narrow["model"]["head.bias"] = torch.zeros(4)
    with pytest.raises(ValueError, match=r"head.bias has shape \(4,\) there, \(3,\) here"):
        pipe.load_state_dict(narrow)
    with pytest.raises(TypeError, match="the state is a NoneType"):
        pipe.load_state_dict(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lacks optimizer, scheduler, num_updates"):
        pipe.load_state_dict({"model": {}})
    with pytest.raises(ValueError, match="it was saved with another optimizer"):
        pipe.load_state_dict(pipeline(network(), adamw, num_stages=2).state_dict())
    plain = Pipeline(network(), sgd, cross_entropy, num_microbatches=1).state_dict()
    with pytest.raises(ValueError, match="differ in having a learning-rate scheduler"):
        pipe.load_state_dict(plain)
    assert_same(pipe.model_state_dict(), before)


def test_loading_with_batches_in_flight_is_refused() -> None:
    pipe = pipeline(network(), num_stages=4)
    state = pipe.state_dict()
    pipe.step(*minibatches(1)[0])
    with pytest.raises(RuntimeError, match=r"call flush\(\) before load_state_dict"):
        pipe.load_state_dict(state)


def test_the_saved_model_loads_into_the_plain_model(tmp_path: Any) -> None:
    model = network()
    with pipeline(model, num_stages=4, method="dtrp") as pipe:
        for x, y in minibatches(5):
            pipe.step(x, y)
    pipe.save_model(tmp_path / "model.pt")
    plain = network()
    plain.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert_same(plain.state_dict(), model.state_dict())
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_rates_that_differ_by_stage_survive_loading() -> None:
    """A scheduler's state tells the time; the base rates are each stage's own."""

    def make(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        matrices = [p for p in params if p.dim() > 1]
        vectors = [p for p in params if p.dim() == 1]
        groups = [{"params": matrices, "lr": 0.1}, {"params": vectors, "lr": 0.01}]
        return torch.optim.SGD([group for group in groups if group["params"]], lr=1.0)

    def run(pipe: Pipeline, count: int) -> list[list[float]]:
        for x, y in minibatches(count):
            pipe.step(x, y)
        pipe.flush()
        return [[group["lr"] for group in o.param_groups] for o in pipe.optimizers if o is not None]

    parts = [nn.Linear(5, 5), nn.LayerNorm(5), nn.Linear(5, 3)]
    first = pipeline(parts, make)
    run(first, 3)
    state = first.state_dict()
    second = pipeline([clone(part) for part in parts], make)
    second.load_state_dict(state)
    assert run(second, 2) == run(first, 2)


def test_a_model_that_cannot_be_written_leaves_the_old_one(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline(network(), num_stages=2)
    pipe.save_model(tmp_path / "model.pt")
    before = (tmp_path / "model.pt").read_bytes()

    def full(*args: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space left"):
        pipe.save_model(tmp_path / "model.pt")
    assert (tmp_path / "model.pt").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.undo()
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        pipe.save_model(tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "model.pt"]


def test_groups_of_different_options_by_parameter_name() -> None:
    def make(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        vectors = [p for p in params if p.dim() < 2]
        groups = [{"params": [p for p in params if p.dim() > 1]}, {"params": vectors, "weight_decay": 0.0}]
        return torch.optim.SGD([g for g in groups if g["params"]], lr=0.05, momentum=0.9, weight_decay=0.1)

    model = nn.Sequential(OrderedDict(a=nn.Linear(5, 5), b=nn.Linear(5, 5), c=nn.Linear(5, 3)))
    state = pipeline(model, make, num_stages=3).state_dict()
    groups = [group["params"] for group in state["optimizer"]["param_groups"]]
    assert groups == [["a.weight", "b.weight", "c.weight"], ["a.bias", "b.bias", "c.bias"]]
    pipeline(clone(model), make, num_stages=2).load_state_dict(state)
    with pytest.raises(ValueError, match="make the optimizer with the same parameter groups"):
        pipeline(clone(model), sgd, num_stages=2).load_state_dict(state)
    assert get_method("bp").flush
    assert dtrp.__all__
