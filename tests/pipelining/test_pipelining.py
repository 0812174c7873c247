"""`ScheduleDTRP` next to torch's `Schedule1F1B`, and next to `dtrp.Pipeline`; the scripts are in `drop_in_programs`."""

from __future__ import annotations

import operator
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from drop_in_programs import (
    AS_TORCH,
    CASES,
    EVERY_KIND,
    KEYWORDS,
    LEFT_OVER,
    METHODS,
    SAVED,
    WIDTH,
    Blocks,
    cross_entropy,
    launched_with,
    sequential,
)
from helpers import assert_close, assert_same
from launching import Server, results_of_cases, run_ranks, shared_folder
from torch import Tensor, fx, nn

from dtrp.pipelining.routes import Route

Ranks = list[dict[str, Any]]


@pytest.fixture(scope="session")
def ranks_of(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Ranks]:
    """What each rank came to in a case."""
    folder = shared_folder(tmp_path_factory.getbasetemp())

    def ranks_of(name: str) -> Ranks:
        launch, names = launched_with(name)
        found = results_of_cases(server, folder / launch, CASES[name][0], "drop_in_cases", names)[name]
        texts = [result for result in found if isinstance(result, str)]
        assert not texts, "\n\n".join(texts)
        return found

    return ranks_of


def as_dict(values: list[Any]) -> dict[str, Tensor]:
    return dict(enumerate(values))  # type: ignore[arg-type]


def check_losses(ours: dict[str, Any], torchs: dict[str, Any], bound: float) -> None:
    assert len(ours["losses"]) == len(torchs["losses"])
    for a, b in zip(ours["losses"], torchs["losses"], strict=True):
        assert_close(as_dict(a), as_dict(b), bound)


def check_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Weights and losses, to the bit."""
    assert_same(a["weights"], b["weights"])
    for own, other in zip(a["losses"], b["losses"], strict=True):
        assert_same(as_dict(own), as_dict(other))


# -- next to torch's schedule ---------------------------------------------------------------------------------


@pytest.mark.sampled(24)
@pytest.mark.parametrize("name", AS_TORCH)
def test_bp_is_schedule_1f1b(ranks_of: Callable[[str], Ranks], name: str) -> None:
    """Losses, outputs and weights: 1e-12 in float64, 1e-6 in float32."""
    if torch.__version__.startswith("2.6.") and "1 ranks" not in name:
        pytest.skip("ranks of torch 2.6's own Schedule1F1B wait for each other without end over gloo")
    bound = 1e-6 if "float32" in name else 1e-12
    ranks = ranks_of(name)
    for rank, result in enumerate(ranks):
        ours, torchs = result["ours"], result["torch"]
        last = rank == len(ranks) - 1
        assert [len(each) for each in torchs["losses"]] == [len(each) for each in ours["losses"]]
        assert bool(ours["losses"][0]) == last
        check_losses(ours, torchs, bound)
        for a, b in zip(ours["outputs"], torchs["outputs"], strict=True):
            assert (a is None) == (b is None) == (not last)
            if last:
                assert_close({"output": a}, {"output": b.detach()}, bound)
                assert not a.requires_grad
        assert_close(ours["weights"], torchs["weights"], 100 * bound)
        assert torch.equal(ours["rng"], torchs["rng"]), "the script's own draws are as they were"
        assert ours["gradients"] == []
        assert torchs["gradients"] != []
        assert not ours["graph"]


@pytest.mark.full
@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", ["a value that skips a stage", "uneven parts", "terms of the loss"])
def test_bp_is_a_plain_loop_where_torchs_schedule_cannot_run(ranks_of: Callable[[str], Ranks], name: str) -> None:
    ranks = ranks_of(name)
    weights = {name: t for result in ranks for name, t in result["ours"]["weights"].items()}
    assert_close(dict(sorted(weights.items())), dict(sorted(ranks[0]["plain"]["weights"].items())), 1e-10)
    check_losses(ranks[-1]["ours"], ranks[0]["plain"], 1e-12)
    assert ranks[0]["dtrp"]["delays"][0].keys() == {0, 1}
    assert ranks[-1]["dtrp"]["losses"] != ranks[-1]["ours"]["losses"]
    if name == "terms of the loss":
        forwards = 2 * 6 * 4  # of two blocks in a stage, for 24 micro-batches
        assert [result["calls"] for result in ranks] == [*[{False: forwards, True: forwards}] * 2, {False: forwards}]


def test_values_travel_through_the_stages_in_between() -> None:
    """Stage 0 makes a and b, 1 takes a and makes c, 2 takes c and b."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    mask = graph.placeholder("mask")
    first = graph.call_module("submod_0", (x,))
    a, b = (graph.call_function(operator.getitem, (first, i)) for i in range(2))
    second = graph.call_module("submod_1", (a, mask))
    third = graph.call_module("submod_2", (second, b))
    graph.output(third)
    assert Route.from_graph(graph, 0) == Route((), ((True, 0), (True, 1)))
    assert Route.from_graph(graph, 1) == Route((0,), ((False, 1), (True, 0)))
    assert Route.from_graph(graph, 2) == Route((1, 0), ())


# -- next to Pipeline -----------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.sampled(12)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_pipelines_to_the_bit(ranks_of: Callable[[str], Ranks], name: str) -> None:
    """Three stages with dropout: on ranks, and all in this process."""
    kind, _, method = name.partition(", ")
    ranks = ranks_of(name)
    local = sequential_here(kind, method)
    for rank, result in enumerate(ranks):
        ours, there = result["ours"], result["pipeline"]
        assert ours["weights"].items()
        own = {key: t for key, t in local["weights"].items() if key in ours["weights"]}
        assert_same(ours["weights"], own)
        assert_same(ours["weights"], {key: t for key, t in there["weights"].items() if key in own})
        assert ours["delays"] == there["delays"] == {rank: local["delays"][rank]}
    means = [sum(loss * 0.25 for loss in each) for each in ranks[-1]["ours"]["losses"]]
    assert all(torch.equal(a, b) for a, b in zip(means, local["losses"], strict=True))


def sequential_here(kind: str, method: str) -> dict[str, Any]:
    try:
        return sequential(kind, method)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", EVERY_KIND)
def test_every_kind_of_stage_by_methods_that_do_not_wait(ranks_of: Callable[[str], Ranks], name: str) -> None:
    """A traced stage is that by hand, to the bit; all have the delays that the method has."""
    kind, _, method = name.rpartition(" by ")
    ranks = ranks_of(name)
    for rank, result in enumerate(ranks):
        assert result["delays"] == {rank: ranks_of(f"blocks by {method}")[rank]["delays"][rank]}
        assert result["gradients"] == []
        if kind.startswith("traced"):
            by_hand = ranks_of(f"{kind.removeprefix('traced ')} by {method}")[rank]
            check_same(result, by_hand)
    assert ranks[0]["delays"][0] != Counter({0: 24})
    means = [sum(each).item() for each in ranks[-1]["losses"]]
    assert all(map(torch.isfinite, map(torch.tensor, means)))
    assert len(set(means)) == 6
    if kind.endswith("transformer"):
        assert max(means[-2:]) < means[0], "it learns"


@pytest.mark.full
@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", KEYWORDS)
def test_a_micro_batch_meets_its_own_keyword_arguments(ranks_of: Callable[[str], Ranks], name: str) -> None:
    for result in ranks_of(name):
        assert_same(result["weights"], result["carried"])


# -- what a script has left -----------------------------------------------------------------------------------


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", LEFT_OVER)
def test_what_the_script_does_with_its_optimizer_does_nothing(ranks_of: Callable[[str], Ranks], name: str) -> None:
    """zero_grad, clip_grad_norm_ and step between steps, with micro-batches in flight: the same bits as without."""
    for result in ranks_of(name):
        script, clean = result["script"], result["clean"]
        check_same(script, clean)
        assert script["gradients"] == clean["gradients"] == []


# -- eval -----------------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("name", ["eval, dtrp", "eval, bp"])
def test_eval(ranks_of: Callable[[str], Ranks], name: str) -> None:
    """The modules in eval mode, with their weights and statistics as they are, in a plain loop."""
    ranks = ranks_of(name)
    for n in ("2", "5"):
        seen = [result["modes"][n] for result in ranks]
        x, y = seen[0]["x"], seen[0]["y"]
        model = nn.Sequential(*(plain_stage(own["module"]) for own in seen)).double().eval()
        want = torch.cat([model(part) for part in x.tensor_split(4)])
        assert seen[0]["out"] is None
        assert_close({"out": seen[1]["out"]}, {"out": want.detach()})
        assert torch.equal(seen[1]["out"], seen[1]["again"])
        losses = [cross_entropy(a, b) for a, b in zip(want.tensor_split(4), y.tensor_split(4), strict=True)]
        assert_close(as_dict(seen[1]["losses"]), as_dict([loss.detach() for loss in losses]))
        assert all(all(own["training"]) for own in seen), "train mode is back"
        assert (seen[0]["in_flight"] > 0) == (name == "eval, dtrp")


def plain_stage(state: dict[str, Tensor]) -> nn.Module:
    from drop_in_programs import Block

    stage = nn.Sequential(Block(0.5), nn.BatchNorm1d(WIDTH)).double()
    stage.load_state_dict(state)
    return stage


def test_what_is_refused_and_harms_nothing(ranks_of: Callable[[str], Ranks]) -> None:
    for result in ranks_of("refusals"):
        said = result["said"]
        assert re.match(
            r"NotImplementedError: .*traced.*dropout and batch statistics.*dtrp\.split", said["traced eval"]
        )
        assert re.match(r"RuntimeError: this pipeline is closed", said["closed"])


# -- saving ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAVED)
def test_saved_in_flight_and_taken_up(ranks_of: Callable[[str], Ranks], name: str) -> None:
    for result in ranks_of(name):
        check_same(result["stopped"], result["whole"])


def test_the_whole_model_under_its_names(ranks_of: Callable[[str], Ranks]) -> None:
    ranks = ranks_of("whole models")
    together = {name: t for result in ranks for name, t in result["own"].items()}
    model = Blocks().double()
    for result in ranks:
        assert_same(dict(sorted(result["saved"].items())), dict(sorted(together.items())))
        model.load_state_dict(result["saved"])
        assert result["state"]["optimizer"]["state"].keys() == dict(model.named_parameters()).keys()
        assert result["state"]["num_updates"] == 4
        for text in result["refused"]:
            assert re.match(r"\w+\(\) needs the names of one model, and two stages have a linear\.weight", text)
    assert ranks[1]["text"] == (
        "ScheduleDTRP(method='dtrp', stage=1, num_stages=2, n_microbatches=2, num_updates=4, in_flight=0)"
    )


# -- mistakes -------------------------------------------------------------------------------------------------


MISTAKES: list[tuple[str, list[str]]] = [
    ("a stage", ["StageError: stage 1, forward of micro-batch 4", "the sensor is on fire"]),
    ("stage_index", ["ValueError: stage_index=0 on rank 1", "0, 1, 2"]),
    ("num_stages", ["ValueError: num_stages=3", "2 ranks"]),
    ("a list", ["TypeError: stage is a list without submod", "PipelineStage"]),
    ("method", ["rank 1 has method=", "make the same ScheduleDTRP"]),
    ("n_microbatches", ["rank 1 has n_microbatches=3, rank 0 has 2"]),
    ("loss_fn", ["target or losses, and the schedule was made without loss_fn"]),
    ("loss_fn of one rank", ["rank 1 has loss_fn=None, rank 0 has a function"]),
    ("loss_fn is no function", ["loss_fn is a str"]),
    ("trained loss", ["ValueError: loss_fn has parameters to train", r"dtrp\.Pipeline, which trains them"]),
    (
        "another's optimizer",
        [
            "ValueError: 2 of the optimizer's 2 tensors are no parameters of stage.submod",
            r"stage\.submod\.parameters\(\)",
        ],
    ),
    ("no optimizer", ["optimizer is None", "pass an optimizer"]),
    ("lbfgs", ["TypeError: LBFGS calls the loss many times", "another optimizer"]),
    ("frozen", ["nothing to train"]),
    ("wrapped", ["TypeError: stage.submod is wrapped for data or tensor parallelism", "dtrp.Pipeline"]),
    ("meta", ["ValueError: linear.weight is on meta", "cpu", "move the module"]),
    ("target", [r"target to step\(\)"]),
    ("losses", ["losses is a tuple", "pass a list"]),
    ("few samples", ["n_microbatches=2", "at least 2 samples"]),
    ("few targets", ["target has 1 samples"]),
    ("loss_kwargs", [r"loss_kwargs\['weight'\] is a object"]),
    ("no input", ["the model's input"]),
    ("arg_mbs", [r"arg_mbs has 3 entries and n_microbatches=2"]),
    ("no tuples", [r"arg_mbs\[0\] is a Tensor; pass a list of tuples"]),
    ("both", ["target beside micro-batches.*target_mbs"]),
    ("finalize_gradients", ["ValueError: finalize_gradients=False adds up the gradients of several steps"]),
    ("gradients of inputs", ["ValueError: the input requires a gradient"]),
    ("gradients of targets", ["ValueError: target requires a gradient"]),
    ("freezes", ["RuntimeError: requires_grad of linear.bias has changed"]),
    ("assigns", ["RuntimeError: linear.(weight|bias) is another tensor than when"]),
    ("forward context", ["ValueError: the stage has a forward context"]),
    ("order", ["AttributeError: 'ScheduleDTRP' object has no attribute 'pipeline_order'"]),
    ("graph", ["RuntimeError: element 0 of tensors does not require grad"]),
    ("tied", ["ValueError: head.weight of stage 0 and head.weight of stage 1 are one tensor", "method='bp'"]),
    ("counts", ["ValueError: the buffer norm.running_mean is in stages 0 and 1"]),
    ("dw_builder", ["ValueError: the stage has a dw_builder"]),
    ("dgl", ["method='dgl' needs auxiliary networks"]),
    ("stalls", ["waited 2 s for rank 1"]),
]


@pytest.mark.sampled(8)
@pytest.mark.parametrize(("what", "patterns"), MISTAKES)
def test_a_mistake_ends_all_ranks(server: Server, tmp_path: Path, what: str, patterns: list[str]) -> None:
    for rank, outcome in enumerate(run_ranks(server, tmp_path, 2, "goes_wrong", what, timeout_s=40)):
        assert outcome.returncode == 1, f"rank {rank}: {outcome.returncode}\n{outcome.err}"
        for pattern in patterns:
            assert re.search(pattern, outcome.last_line), f"rank {rank}: {pattern!r} is not in\n{outcome.err}"


def test_the_documented_errors_are_those_that_come() -> None:
    """Each of the table's is a pattern of the test above, or of one in `test_forms`."""
    page = Path(__file__).parents[2] / "docs" / "pipelining.md"
    table = page.read_text().partition("## What it does not have")[2].partition("## ")[0]
    errors = re.findall(r"(?m)^\| .* \| `(\w+: .*)` \|$", table)
    assert len(errors) == table.count("\n|") - 2
    seen = [pattern for _, patterns in MISTAKES for pattern in patterns if re.match(r"\w+(Error|Warning): ", pattern)]
    seen += [
        r"UserWarning: SGD\.step\(\) after 2 calls of step\(\)",  # test_accumulation_over_steps_is_told
        # test_eval_of_traced_stages_that_know_no_mode
        r"NotImplementedError: eval\(\) .* has traced: aten\.dropout\.default draws random numbers in stage 1",
    ]
    assert [error for error in errors if not any(re.match(pattern, error) for pattern in seen)] == []


def test_ranks_that_never_come(server: Server, tmp_path: Path) -> None:
    first, _ = run_ranks(server, tmp_path, 2, "goes_wrong", "nobody", timeout_s=40)
    assert first.returncode == 1
    assert re.search(r"rank 0\b.*\b2 s\b", first.last_line), first.err


def test_dtrp_alone_imports_no_pipelining() -> None:
    code = "import sys, dtrp; sys.exit('torch.distributed.pipelining' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
