"""On a CUDA device: the same promises, where a device's own generators, kernels and launches come in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_same, check_perfect_prediction, clone, minibatches, network, pipeline, plain_loop, sgd
from torch import Tensor, nn

import dtrp
from dtrp.models import cifar_resnet
from dtrp.splitting import equal_cuts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def _deterministic() -> Any:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.matmul.allow_tf32 = before


def on_gpu(batches: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [(x.cuda(), y.cuda()) for x, y in batches]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("num_microbatches", [1, 4])
@pytest.mark.parametrize("num_stages", [1, 4])
def test_without_delay_it_is_a_plain_loop(num_stages: int, num_microbatches: int) -> None:
    model = network().cuda()
    plain, batches = clone(model), on_gpu(minibatches(20))
    pipe = pipeline(model, num_stages=num_stages, method="bp", num_microbatches=num_microbatches)
    losses = [pipe.step(x, y) for x, y in batches]
    cuts = equal_cuts(8, num_stages)
    want = plain_loop(plain, batches, sgd, pipe.rng, cuts=cuts, num_microbatches=num_microbatches)
    assert all(torch.equal(a, b) for a, b in zip(losses, want, strict=True))
    assert_same(model.state_dict(), plain.state_dict())


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("num_microbatches", [1, 4])
def test_with_perfect_prediction_it_is_backpropagation(num_microbatches: int) -> None:
    check_perfect_prediction(network().cuda(), on_gpu(minibatches(20)), 4, num_microbatches=num_microbatches)


@pytest.mark.parametrize("method", dtrp.list_methods())
def test_the_global_generators_are_left_alone(method: str) -> None:
    pipe = pipeline(network().cuda(), num_stages=4, method=method)
    before = torch.get_rng_state(), torch.cuda.get_rng_state()
    for x, y in on_gpu(minibatches(6)):
        pipe.step(x, y)
    pipe.flush()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.equal(torch.cuda.get_rng_state(), before[1])


def test_the_model_is_moved_and_inputs_follow() -> None:
    pipe = pipeline(network(), num_stages=4, devices="cuda")
    for x, y in minibatches(6):  # on the CPU
        loss = pipe.step(x, y)
    pipe.flush()
    assert loss.is_cuda
    assert pipe.infer(torch.randn(3, 5)).is_cuda


def test_half_of_the_stages_on_the_cpu() -> None:
    """Stages on two devices equal the same on one, up to the devices' rounding."""
    results = []
    for devices in ("cuda", ["cuda", "cpu", "cuda", "cpu"]):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(3)), nn.Linear(5, 3)).double()
        pipe = pipeline(model, num_stages=4, devices=devices)
        results.append([pipe.step(x.double(), y).item() for x, y in minibatches(12)])
        pipe.flush()
    assert results[0] == pytest.approx(results[1], rel=1e-9)


def test_peak_memory_of_kept_graphs_and_of_inputs() -> None:
    peaks = {}
    for method in ("fdg", "dtrp"):
        torch.manual_seed(0)
        model = cifar_resnet(56).cuda()
        pipe = dtrp.Pipeline(model, sgd, nn.functional.cross_entropy, num_stages=8, method=method)
        x, y = torch.randn(128, 3, 32, 32, device="cuda"), torch.randint(10, (128,), device="cuda")
        torch.cuda.reset_peak_memory_stats()
        for _ in range(20):
            pipe.step(x, y)
        peaks[method] = torch.cuda.max_memory_allocated()
        pipe.close()
        del pipe, model
        torch.cuda.empty_cache()
    assert peaks["dtrp"] < 0.5 * peaks["fdg"]
