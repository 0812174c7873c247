"""Weight prediction against the optimizers themselves."""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import minibatches, network, pipeline, sgd
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

import dtrp
from dtrp.engine.consistency import method_values
from dtrp.predict import as_predictor, batches, informed, linear, rollout

Make = Callable[[list[Tensor]], Optimizer]


def sgd_options() -> list[dict[str, Any]]:
    rows = []
    for momentum, dampening, nesterov, decay, maximize in itertools.product(
        (0.0, 0.9), (0.0, 0.3), (False, True), (0.0, 0.05), (False, True)
    ):
        if not (nesterov and (momentum == 0 or dampening)):
            rows.append({"lr": 0.1, "momentum": momentum, "dampening": dampening, "nesterov": nesterov,
                         "weight_decay": decay, "maximize": maximize})  # fmt: skip
    return rows


def adam_options(flag: str) -> list[dict[str, Any]]:
    return [
        {"lr": 0.01, "betas": (0.8, 0.98), "eps": 1e-4, "weight_decay": decay, flag: on, "maximize": maximize}
        for decay, on, maximize in itertools.product((0.0, 0.05), (False, True), (False, True))
    ]


OPTIMIZERS = [
    *((torch.optim.SGD, options) for options in sgd_options()),
    *((cls, options) for cls in (torch.optim.Adam, torch.optim.AdamW) for options in adam_options("amsgrad")),
    *((torch.optim.NAdam, options) for options in adam_options("decoupled_weight_decay")),
]


def weights() -> list[Tensor]:
    """Several shapes, one scalar, one in channels-last order."""
    return [
        torch.randn(7, 3).requires_grad_(),
        torch.randn(5).requires_grad_(),
        torch.randn(()).requires_grad_(),
        torch.randn(4, 2, 3, 3).to(memory_format=torch.channels_last).requires_grad_(),
    ]


def trained(parameters: list[Tensor], make: Make, steps: int = 4) -> Optimizer:
    optimizer = make(parameters)
    for _ in range(steps):
        for p in parameters:
            p.grad = torch.randn_like(p)
        optimizer.step()
    return optimizer


def stepped_with_zero_gradients(parameters: list[Tensor], optimizer: Optimizer, make: Make, steps: int) -> list[Tensor]:
    """The oracle: a copy of the optimizer itself."""
    copies = [p.detach().clone().requires_grad_() for p in parameters]
    shadow = make(copies)
    shadow.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(steps):
        for c in copies:
            c.grad = torch.zeros_like(c)
        shadow.step()
    return [c.detach() for c in copies]


def close(got: list[Tensor], want: list[Tensor], bound: float = 1e-12) -> None:
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= bound * b.abs().max()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("horizon", [1, 2, 5, 15])
@pytest.mark.parametrize(("cls", "options"), OPTIMIZERS)
def test_rollout_is_the_optimizer_with_zero_gradients(cls: Any, options: dict[str, Any], horizon: int) -> None:
    parameters = weights()
    optimizer = trained(parameters, lambda p: cls(p, **options))
    before = [p.detach().clone() for p in parameters], copy.deepcopy(optimizer.state_dict())
    gradients = [p.grad.clone() for p in parameters]  # type: ignore[union-attr]
    out = [torch.full_like(p, torch.nan) for p in parameters]
    rollout(parameters, optimizer, horizon, out)
    if options.get("momentum") == 0:
        want = [p.detach() for p in parameters]  # no state: unchanged, weight decay included
    else:
        want = stepped_with_zero_gradients(parameters, optimizer, lambda p: cls(p, **options), horizon)
        assert not all(torch.equal(a, p) for a, p in zip(want, parameters, strict=True))
    close(out, want)
    # nothing of the caller's has moved
    assert all(torch.equal(p, b) for p, b in zip(parameters, before[0], strict=True))
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, gradients, strict=True))  # type: ignore[arg-type]
    after = optimizer.state_dict()
    assert after["param_groups"] == before[1]["param_groups"]
    for i, entry in before[1]["state"].items():
        for key, value in entry.items():
            same = torch.equal(after["state"][i][key], value) if isinstance(value, Tensor) else True
            assert same, key


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("horizon", [1, 3, 10])
@pytest.mark.parametrize(("cls", "options"), OPTIMIZERS)
def test_linear_is_the_last_step_over_and_over(cls: Any, options: dict[str, Any], horizon: int) -> None:
    parameters = weights()
    optimizer = trained(parameters, lambda p: cls(p, **options))
    out = [torch.full_like(p, torch.nan) for p in parameters]
    linear(parameters, optimizer, horizon, out)
    want = []
    one_step = stepped_with_zero_gradients(parameters, optimizer, lambda p: cls(p, **options), 1)
    for parameter, stepped in zip(parameters, one_step, strict=True):
        p, state, lr = parameter.detach(), optimizer.state.get(parameter, {}), options["lr"]
        if cls is torch.optim.SGD:
            v = state.get("momentum_buffer")
            want.append(p if v is None else p - horizon * lr * v)
        elif cls is torch.optim.NAdam or options["amsgrad"]:
            want.append(p + horizon * (stepped - p))
        else:
            t = state["step"].item()
            m_hat, v_hat = state["exp_avg"] / (1 - 0.8**t), state["exp_avg_sq"] / (1 - 0.98**t)
            decay = options["weight_decay"] * p if cls is torch.optim.AdamW else 0
            want.append(p - horizon * lr * (m_hat / (v_hat.sqrt() + 1e-4) + decay))
    close(out, want)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("share", [0.25, 1.0])
@pytest.mark.parametrize(("cls", "options"), OPTIMIZERS)
def test_informed_is_linear_after_the_gradient_that_is_known(cls: Any, options: dict[str, Any], share: float) -> None:
    """The oracle: the optimizer's own step with the known part of the gradient and, for the rest, what its momentum is."""
    parameters = weights()
    optimizer = trained(parameters, lambda p: cls(p, **options))
    known = [share * torch.randn_like(p) for p in parameters]
    out = [torch.full_like(p, torch.nan) for p in parameters]
    before = [g.clone() for g in known]
    where = {"stage": 0, "microbatch": 5, "version": 4}
    informed(parameters, optimizer, 3, out, gradients=known, share=share, **where)
    assert all(torch.equal(a, b) for a, b in zip(known, before, strict=True))
    if options.get("momentum") == 0:
        assert all(torch.equal(o, p) for o, p in zip(out, parameters, strict=True))
        return
    copies = [p.detach().clone().requires_grad_() for p in parameters]
    shadow = cls(copies, **options)
    shadow.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    sign = -1 if options["maximize"] else 1
    coupled = (
        options["weight_decay"] if cls is not torch.optim.AdamW and not options.get("decoupled_weight_decay") else 0
    )
    for c, p, a in zip(copies, parameters, known, strict=True):
        state = optimizer.state[p]
        if cls is torch.optim.SGD:
            mean = state["momentum_buffer"] * (1 - 0.9) / (1 - options["dampening"])
        else:
            mean = state["exp_avg"] / (1 - 0.8 ** state["step"].item())
        c.grad = a + (1 - share) * sign * (mean - coupled * p.detach())  # the optimizer adds the decay of all of it
    shadow.step()
    moved = cls([p.detach().clone().requires_grad_() for p in parameters], **options)
    moved.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for c, p in zip(copies, moved.param_groups[0]["params"], strict=True):
        if cls is torch.optim.SGD:
            moved.state[p]["momentum_buffer"] = shadow.state[c]["momentum_buffer"]
        else:
            t = moved.state[p]["step"].item()
            moved.state[p]["exp_avg"] = shadow.state[c]["exp_avg"] / (1 - 0.8 ** (t + 1)) * (1 - 0.8**t)
            moved.state[p]["exp_avg_sq"] = shadow.state[c]["exp_avg_sq"] / (1 - 0.98 ** (t + 1)) * (1 - 0.98**t)
            if options.get("amsgrad"):
                moved.state[p]["max_exp_avg_sq"] = shadow.state[c]["max_exp_avg_sq"]
    want = [torch.empty_like(p) for p in parameters]
    linear(moved.param_groups[0]["params"], moved, 3, want)
    close(out, want)
    nothing = [torch.empty_like(p) for p in parameters]
    informed(parameters, optimizer, 3, nothing, gradients=[None] * len(parameters), share=0.0, **where)
    linear(parameters, optimizer, 3, want)
    assert all(torch.equal(a, b) for a, b in zip(nothing, want, strict=True))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam])
def test_informed_moves_a_weight_that_had_no_gradient_before_by_one_step(cls: Any) -> None:
    """The embedding of a token that is seen for the first time: its second moment is 0, and so would be the denominator."""
    weight = torch.randn(4).requires_grad_()
    optimizer = cls([weight], lr=0.01)
    for _ in range(5):
        weight.grad = torch.tensor([1.0, -1.0, 1.0, 0.0])
        optimizer.step()
    out = [torch.empty(4)]
    gradient = torch.tensor([0.5, -0.5, 0.5, 0.5])
    where = {"stage": 0, "microbatch": 5, "version": 5}
    informed([weight], optimizer, 1, out, gradients=[gradient], share=0.5, **where)
    assert 0 < weight[3] - out[0][3] < 0.02


@pytest.mark.usefixtures("float64")
def test_a_predictor_is_told_the_gradient_as_far_as_it_is_known() -> None:
    """Against a count over the schedule."""
    num, parts, samples = 3, 4, (0, 5, 9, 13, 17)  # a mini-batch of 17: parts of 5, 4, 4 and 4
    seen: dict[tuple[int, int], tuple[int, float, list[Tensor | None]]] = {}

    class Told:
        uses_gradients = True

        def __call__(self, parameters: Any, optimizer: Any, horizon: int, out: Any, **told: Any) -> None:
            gradients = [None if g is None else g.clone() for g in told["gradients"]]
            seen[told["stage"], told["microbatch"]] = told["version"], told["share"], gradients

    pipe = pipeline(network(), num_stages=num, method=dtrp.get_method("dtrp", predict=Told()), num_microbatches=parts)
    for x, y in minibatches(5, 17, 17):
        pipe.step(x, y)
    pipe.flush()
    want = {}
    for stage, actions in enumerate(dtrp.Schedule.build("dtrp", num, 5, parts).stages[:-1]):
        version, through = 0, 0
        for action in actions:
            if action.kind == "B":
                through += 1
            elif action.kind == "U":
                version, through = version + 1, 0
            elif action.index // parts > version:
                want[stage, action.index] = version, samples[through] / 17
    assert {key: version for key, (version, _, _) in seen.items()} == {
        key: version for key, (version, _) in want.items()
    }
    assert {share for _, share in want.values()} == {5 / 17, 9 / 17, 13 / 17}
    for key, (_, share, gradients) in seen.items():
        assert share == pytest.approx(want[key][1], abs=1e-12), key
        assert all((g is None) == (share == 0) for g in gradients)


def test_informed_is_nearer_where_gradients_are_known() -> None:
    """Four micro-batches: the distance that is left, against `linear`'s."""
    left = {}
    for predictor in (linear, informed):
        torch.manual_seed(0)
        method = dtrp.get_method("dtrp", predict=predictor)
        pipe = pipeline(network(), num_stages=3, method=method, num_microbatches=4)
        pipe.watch_prediction()
        for x, y in minibatches(20):
            pipe.step(x, y)
        pipe.flush()
        errors = pipe.prediction_errors()
        left[predictor] = sum(error.read for error in errors) / sum(error.stale for error in errors)
    assert left[informed] < 0.85 * left[linear]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("rule", [linear, rollout])
def test_several_groups_and_weights_without_state(rule: Any) -> None:
    a, b, unseen, outside = (torch.randn(4).requires_grad_() for _ in range(4))
    optimizer = torch.optim.SGD(
        [{"params": [a], "lr": 0.1, "momentum": 0.9}, {"params": [b, unseen], "lr": 0.01, "momentum": 0.5}], lr=1.0
    )
    a.grad, b.grad = torch.randn(4), torch.randn(4)
    optimizer.step()
    out = [torch.empty(4) for _ in range(4)]
    rule([a, b, unseen, outside], optimizer, 3, out)
    sums = {linear: (3.0, 3.0), rollout: (0.9 + 0.81 + 0.729, 0.5 + 0.25 + 0.125)}[rule]
    close(out[:2], [(a - 0.1 * sums[0] * a.grad).detach(), (b - 0.01 * sums[1] * b.grad).detach()])
    assert torch.equal(out[2], unseen)
    assert torch.equal(out[3], outside)
    assert set(optimizer.state) == {a, b}, "asking makes no state"


def test_nadam_whose_product_is_float32_while_the_weights_are_float64() -> None:
    parameters = [torch.randn(6, dtype=torch.float64).requires_grad_()]
    make: Make = lambda p: torch.optim.NAdam(p, lr=0.01, weight_decay=0.1)  # noqa: E731
    optimizer = trained(parameters, make)
    assert optimizer.state[parameters[0]]["mu_product"].dtype == torch.float32
    out = [torch.empty_like(p) for p in parameters]
    rollout(parameters, optimizer, 5, out)
    close(out, stepped_with_zero_gradients(parameters, optimizer, make, 5))


@pytest.mark.parametrize("rule", [linear, rollout])
@pytest.mark.parametrize("cls", [torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adamax])
def test_an_unknown_optimizer_is_refused_when_the_pipeline_is_made(rule: Any, cls: Any) -> None:
    with pytest.raises(
        TypeError, match=rf"{rule.name}.* does not know the update rule of {cls.__name__} .*predict=None"
    ):
        pipeline(network(), lambda p: cls(p, lr=0.1), num_stages=2, method=dtrp.get_method("dtrp", predict=rule.name))
    pipeline(network(), lambda p: cls(p, lr=0.1), num_stages=2, method="dtr")
    pipeline(network(), lambda p: cls(p, lr=0.1), num_stages=1, method="dtrp")  # nothing to predict


def test_a_subclass_may_step_otherwise_and_is_refused() -> None:
    class Mine(torch.optim.SGD):
        pass

    with pytest.raises(TypeError, match="update rule of Mine .*not their subclasses"):
        pipeline(network(), lambda p: Mine(p, lr=0.1), num_stages=2)


def test_a_predictor_of_ones_own_is_told_where_and_when() -> None:
    calls: list[dict[str, Any]] = []

    def predictor(parameters: Any, optimizer: Any, horizon: int, out: Any, **where: int) -> None:
        assert [p.shape for p in parameters] == [o.shape for o in out]
        assert all(not o.requires_grad for o in out)
        calls.append({"horizon": horizon, "lr": optimizer.param_groups[0]["lr"], **where})
        for o, p in zip(out, parameters, strict=True):
            o.copy_(p)

    method = dtrp.get_method("dtrp", predict=predictor, lr_shrink=0.5)
    pipe = dtrp.Pipeline(
        network(), sgd, torch.nn.functional.cross_entropy, num_stages=3, method=method, num_microbatches=1
    )
    plain = dtrp.Pipeline(
        network(), sgd, torch.nn.functional.cross_entropy, num_stages=3, method="dtr", num_microbatches=1
    )
    assert plain.method.predict is None
    for x, y in minibatches(6):
        pipe.step(x, y)
    pipe.flush()
    first = [call for call in calls if call["stage"] == 0]
    assert [(c["microbatch"], c["version"], c["horizon"]) for c in first] == [
        (1, 0, 1), (2, 0, 2), (3, 0, 3), (4, 1, 3), (5, 2, 3),
    ]  # fmt: skip
    assert {c["lr"] for c in first} == {0.05 * 0.25}, "the stage's own rate"
    assert {c["stage"] for c in calls} == {0, 1}, "never at the last stage"


class LargestScratch(TorchDispatchMode):
    """The most bytes of tensors that are alive at once among those made inside it."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known = known
        self.alive: dict[int, Any] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(t, Tensor) and not any(t is a for a in (*args, *(kwargs or {}).values())):
                storage = t.untyped_storage()
                if storage.data_ptr() not in self.known:
                    self.alive[storage.data_ptr()] = (weakref.ref(t), storage.nbytes())
        total = sum(size for ref, size in self.alive.values() if ref() is not None)
        self.peak = max(self.peak, total)
        return out


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("rule", [linear, rollout])
@pytest.mark.parametrize(("cls", "options"), OPTIMIZERS)
def test_scratch_is_no_larger_than_the_largest_weight(
    cls: Any, options: dict[str, Any], rule: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or than `SCRATCH_BYTES`, here 0; and what is done in pieces has the bits of what is not."""
    parameters = [
        torch.randn(100, 100).requires_grad_(),
        torch.randn(2000).requires_grad_(),
        torch.randn(50, 50).requires_grad_(),
    ]
    optimizer = trained(parameters, lambda p: cls(p, **options), steps=2)
    out = [torch.empty_like(p) for p in parameters]
    held = [*parameters, *out, *(t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor))]
    at_once = [torch.empty_like(p) for p in parameters]
    rule(parameters, optimizer, 4, at_once)
    monkeypatch.setattr(batches, "SCRATCH_BYTES", 0)
    with LargestScratch({t.untyped_storage().data_ptr() for t in held}) as counter:
        rule(parameters, optimizer, 4, out)
    assert counter.peak <= max(p.nbytes for p in parameters) + 64
    assert all(map(torch.equal, out, at_once))


def test_a_large_sparse_gradient_is_taken_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, other = torch.randn(40, 3).requires_grad_(), torch.randn(3, 3).requires_grad_()
    optimizer = torch.optim.SGD([weight, other], lr=0.1, momentum=0.9)
    rows = torch.sparse_coo_tensor(torch.tensor([[1, 5]]), torch.randn(2, 3), (40, 3), check_invariants=True)
    weight.grad, other.grad = rows, torch.randn(3, 3)
    optimizer.step()
    optimizer.state[weight]["momentum_buffer"] = optimizer.state[weight]["momentum_buffer"].to_dense()
    out = [torch.empty_like(weight), torch.empty_like(other)]
    at_once = [torch.empty_like(weight), torch.empty_like(other)]
    for into, scratch in ((at_once, 2**20), (out, 0)):
        monkeypatch.setattr(batches, "SCRATCH_BYTES", scratch)
        informed([weight, other], optimizer, 2, into, gradients=[rows, other.grad], share=0.5)
    assert all(map(torch.equal, out, at_once))


def test_objects_of_the_library_are_told_apart_by_their_names() -> None:
    assert repr(informed) == "<predictor informed>"
    methods = [dtrp.get_method("dtrp", predict=predictor) for predictor in (linear, informed)]
    assert [method_values(method)["predict"] for method in methods] == ["linear", "informed"]


def test_every_predictor_goes_by_its_name() -> None:
    for predictor in (linear, rollout, informed):
        assert as_predictor(predictor.name) is predictor
        assert dtrp.get_method("dtrp", predict=predictor.name).predict == predictor.name
