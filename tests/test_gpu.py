"""On a CUDA device: the same promises, where a device's own generators, kernels and launches come in."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    DEVICE_VARIABLE,
    adamw,
    assert_close,
    assert_same,
    check_perfect_prediction,
    clone,
    minibatches,
    network,
    pipeline,
    plain_loop,
    sgd,
)
from launching import Server, of_ranks, results_of_cases, shared_folder
from rank_programs import CASES, REPLICAS, SYNCED, matrix_case, run_case
from torch import Tensor, nn

import dtrp
from dtrp.cli import run
from dtrp.models import cifar_resnet
from dtrp.splitting.stages import equal_cuts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic products need


@pytest.fixture(autouse=True)
def _deterministic() -> Any:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


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
        pipe = dtrp.Pipeline(model, sgd, nn.functional.cross_entropy, num_stages=8, method=method, num_microbatches=1)
        x, y = torch.randn(128, 3, 32, 32, device="cuda"), torch.randint(10, (128,), device="cuda")
        torch.cuda.reset_peak_memory_stats()
        for _ in range(20):
            pipe.step(x, y)
        peaks[method] = torch.cuda.max_memory_allocated()
        pipe.close()
        del pipe, model
        torch.cuda.empty_cache()
    assert peaks["dtrp"] < 0.5 * peaks["fdg"]


def test_infer_under_no_grad_moves_from_device_to_device() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(3)), nn.Linear(5, 3)).double()
    want = clone(model)
    pipe = pipeline(model, num_stages=4, devices=["cuda", "cpu", "cuda", "cpu"])
    x = torch.randn(9, 5, dtype=torch.float64)
    with torch.no_grad():
        out = pipe.infer(x)
    assert out.device.type == "cpu"
    torch.testing.assert_close(out, want(x), rtol=1e-12, atol=1e-12)
    assert not out.requires_grad


@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_bfloat16_a_repeated_forward_is_the_first_one(num_microbatches: int) -> None:
    """Convolutions, BatchNorm and dropout under autocast, where each forward is repeated with a graph."""
    results = []
    for keep in ("graph", "input"):
        torch.manual_seed(0)
        resnet = cifar_resnet(14, width=8)
        model = nn.Sequential(*resnet[:4], nn.Dropout2d(0.2), *resnet[4:])
        row = dtrp.get_method("bp", keep=keep)
        pipe = pipeline(model, num_stages=4, method=row, num_microbatches=num_microbatches, devices="cuda")
        losses = []
        for _ in range(5):
            x, y = torch.randn(16, 3, 32, 32), torch.randint(10, (16,))
            with torch.autocast("cuda", dtype=torch.bfloat16):
                losses.append(pipe.step(x, y))
        pipe.flush()
        results.append((losses, pipe.model_state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(results[0][0], results[1][0], strict=True))
    assert_same(results[0][1], results[1][1])


@pytest.mark.parametrize("num_microbatches", [1, 4])
def test_bfloat16_with_perfect_prediction_it_is_backpropagation(num_microbatches: int) -> None:
    # Without the cache, whose casts the plain loop would use past an update.
    with torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False):
        check_perfect_prediction(network().cuda(), on_gpu(minibatches(20)), 4, num_microbatches=num_microbatches)


@pytest.mark.parametrize("method", ["dtrp", "fdg", "spectrain"])
def test_a_run_that_is_taken_up_equals_one_that_never_stopped(method: str, tmp_path: Path) -> None:
    """Saved with micro-batches in flight, and dropout drawn by the device."""
    options: dict[str, Any] = {"num_stages": 4, "method": method, "num_microbatches": 2, "devices": "cuda"}
    results = []
    for stops in (False, True):
        torch.manual_seed(0)
        pipe = pipeline(network(), adamw, **options)
        losses = []
        for i, (x, y) in enumerate(minibatches(9)):
            if i == 5 and stops:
                pipe.save(tmp_path)
                pipe = pipeline(network(), adamw, **options)
                pipe.load(tmp_path)
            losses.append(pipe.step(x, y))
        pipe.flush()
        results.append((losses, pipe.model_state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(results[0][0], results[1][0], strict=True))
    assert_same(results[0][1], results[1][1])


def test_what_a_device_has_saved_goes_on_on_the_cpu(tmp_path: Path) -> None:
    def make(device: str) -> dtrp.Pipeline:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(3)), nn.Linear(5, 3)).double()
        return pipeline(model, adamw, num_stages=4, devices=device)

    batches = [(x.double(), y) for x, y in minibatches(9)]
    pipe = make("cuda")
    for x, y in batches[:5]:
        pipe.step(x, y)
    pipe.save(tmp_path)
    want = [pipe.step(x, y).item() for x, y in batches[5:]]
    other = make("cpu")
    with pytest.warns(UserWarning, match="devices="):
        other.load(tmp_path)
    assert [other.step(x, y).item() for x, y in batches[5:]] == pytest.approx(want, rel=1e-9)


def test_a_plan_from_the_devices_own_times() -> None:
    model = cifar_resnet(14, width=8)
    x, y = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
    plan = dtrp.plan(
        model, (x, y), nn.functional.cross_entropy, num_workers=4, optimizer=sgd, device="cuda", latency_s=1e-5,
        bandwidth_bytes_s=1e10, repeats=3,
    )  # fmt: skip
    pipe = dtrp.Pipeline(model, sgd, nn.functional.cross_entropy, plan=plan, devices="cuda", seed=0)
    losses = [float(pipe.step(x, y)) for _ in range(12)]
    pipe.flush()
    assert losses[-1] < losses[0]


def test_a_trace_of_a_device(tmp_path: Path) -> None:
    pipe = pipeline(network(), num_stages=4, devices="cuda", trace=True)
    for x, y in minibatches(6):
        pipe.step(x, y)
    pipe.flush()
    pipe.save_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert sum(event["ph"] == "X" for event in events) >= 4 * 6 * 2


def test_what_is_not_finite_is_refused_with_its_stage_and_minibatch() -> None:
    """The answer comes late, and still names the right place."""
    pipe = pipeline(network(), num_stages=4, devices="cuda", method="dtrp")
    with pytest.raises(dtrp.StageError, match="mini-batch 3"):
        for i, (x, y) in enumerate(minibatches(20)):
            pipe.step(x * float("nan") if i == 3 else x, y)
        pipe.flush()


# -- a process a stage, which share the device --------------------------------------------------------------------

EQUAL_TO_ONE_PROCESS = [
    *(matrix_case(method, 2, 2, "sgd") for method in dtrp.list_methods()),
    *(matrix_case(method, 4, a, "adamw") for method in ("bp", "dtrp", "fdg", "spectrain") for a in (1, 4)),
    *(name for name in CASES if name.startswith(("autocast, ", "everything is on the device, "))),
    *(f"{kind}, dtrp" for kind in (
        "image sizes and batch sizes change", "fewer samples than microbatches", "frozen front stage",
        "a list of modules", "the loss on all ranks", "an output with holes", "saved and loaded", "state dicts and infer",
        "infer in inference mode and out of it", "expanded output",
    )),
    *(f"tied parameters, {kind}" for kind in ("embedding and head", "all clip", "skip")),
    *(f"clips and leaves out, {kind}" for kind in ("each stage, skip, fdg", "all, skip, gpipe", "skip, dtrp")),
    "dtype, torch.bfloat16", "stages compiled as by default",
]  # fmt: skip


@pytest.fixture(scope="session")
def on_ranks(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, list[Any]]]:
    """What ranks on the device came to in a group of cases."""
    shared = shared_folder(tmp_path_factory.getbasetemp())
    environment = {DEVICE_VARIABLE: "cuda:0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}

    @functools.cache
    def results_of(group: str, names: tuple[str, ...]) -> dict[str, list[Any]]:
        num_ranks = CASES[names[0]].num_ranks
        folder = shared / f"gpu-{group}-{num_ranks}"
        return results_of_cases(server, folder, num_ranks, "cases", names, **environment)

    return lambda group, names: results_of(group, tuple(names))


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    monkeypatch.setenv(DEVICE_VARIABLE, "cuda:0")
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    return run_case


def on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Where ranks bring their weights together."""
    return {name: tensor.cpu() for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", EQUAL_TO_ONE_PROCESS)
def test_ranks_equal_one_process_to_the_bit(
    on_ranks: Callable[..., Any], one_process: Callable[[str], dict[str, Any]], name: str
) -> None:
    """What goes from rank to rank goes through pinned host memory."""
    together = [other for other in EQUAL_TO_ONE_PROCESS if CASES[other].num_ranks == CASES[name].num_ranks]
    ranks, want = of_ranks(on_ranks("equal", together)[name]), one_process(name)
    for a, b in zip(ranks[-1]["losses"], want["losses"], strict=True):
        assert torch.equal(a.cpu(), b.cpu())
    for rank in ranks:
        assert_same(on_cpu(rank["weights"]), on_cpu(want["weights"]))


@pytest.mark.parametrize("name", [*REPLICAS, *SYNCED])
def test_replicas_equal_one_process(
    on_ranks: Callable[..., Any], one_process: Callable[[str], dict[str, Any]], name: str
) -> None:
    ranks, want = of_ranks(on_ranks("replicas", [*REPLICAS, *SYNCED])[name]), one_process(name)
    for rank in ranks:
        assert_close(on_cpu(rank["weights"]), on_cpu(want["weights"]), bound=1e-11)


def test_the_command_line_in_one_process_and_in_two(tmp_path: Path) -> None:
    words = ["train", "--data", "random", "--model", "mlp", "--device", "cuda:0", "--epochs", "2", "--limit-train", "512",
             "--num-microbatches", "2", "--seed", "3"]  # fmt: skip
    lines = []
    for name, how in (("one", ["--stages", "2"]), ("two", ["--workers", "2"])):
        command = [sys.executable, "-m", "dtrp", *words, *how, "--out", str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        metrics = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        lines.append([{key: line[key] for key in ("train_loss", "test_loss", "test_accuracy")} for line in metrics])
    assert lines[0] == lines[1]


def test_the_command_line_trains_in_bfloat16(tmp_path: Path) -> None:
    assert not run(["train", "--data", "random", "--model", "resnet14-8", "--device", "cuda", "--dtype", "bfloat16",
                    "--epochs", "1", "--limit-train", "256", "--stages", "4", "--out", str(tmp_path / "run")])  # fmt: skip
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["environment"]["gpu"]
