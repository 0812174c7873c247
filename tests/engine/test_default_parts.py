"""`num_microbatches="auto"`, the default: as many micro-batches as stages, of at least two samples each.

On ranks, replicas too: the cases of that name in `rank_programs`, which test_distributed runs.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import dtrp
from dtrp.models import auxiliary, get_model
from dtrp.saving import manifest
from dtrp.schedule import num_parts

SIZES = (16, 7, 12, 3, 5, 1, 16, 2, 9)


def model_of(layers: int = 4) -> nn.Sequential:
    return nn.Sequential(*(nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(layers)))


def sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def batches(sizes: tuple[int, ...] = SIZES) -> list[tuple[Tensor, Tensor]]:
    draws = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 5, generator=draws), torch.randint(5, (n,), generator=draws)) for n in sizes]


def make(model: nn.Module, **options: Any) -> dtrp.Pipeline:
    return dtrp.Pipeline(model, sgd, cross_entropy, **{"num_stages": 4, "seed": 3, **options})


def counted(pipe: dtrp.Pipeline) -> int:
    (number,) = {sum(counts.values()) for counts in pipe.delays().values()}
    return number


@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_as_many_as_stages_and_at_least_two_samples_in_each(num_stages: int) -> None:
    for samples in range(1, 12):
        pipe = make(model_of(), num_stages=num_stages)
        assert type(pipe.num_microbatches) is int
        assert (pipe.num_microbatches, pipe.microbatch_samples) == (num_stages, 2)
        pipe.step(*batches((samples,))[0])
        pipe.flush()
        assert counted(pipe) == max(1, min(num_stages, samples // 2))


@pytest.mark.parametrize("given", [{"num_microbatches": 4}, {"num_microbatches": 4, "microbatch_samples": 1}])
def test_a_number_means_what_it_did(given: dict[str, Any]) -> None:
    for samples in range(1, 12):
        pipe = make(model_of(), **given)
        pipe.step(*batches((samples,))[0])
        pipe.flush()
        assert counted(pipe) == min(4, samples)


def test_a_list_and_a_split_model_have_as_many_as_stages_too() -> None:
    layers = list(model_of(3))
    assert make(layers, num_stages=None).num_microbatches == 3
    assert make(model_of(5), num_stages=None, cuts=[1, 2, 3, 4]).num_microbatches == 5
    assert make(dtrp.split(model_of(4), num_stages=2, example=torch.randn(4, 5)), num_stages=None).num_microbatches == 2


def test_bp_is_a_plain_loop_over_the_same_parts() -> None:
    model = model_of().double()
    plain = copy.deepcopy(model)
    optimizer = sgd(list(plain.parameters()))
    pipe = make(model, method="bp")
    for x, y in batches():
        optimizer.zero_grad()
        loss = pipe.step(x.double(), y)
        terms = []
        for a, b in zip(*(t.tensor_split(max(1, min(4, len(x) // 2))) for t in (x.double(), y)), strict=True):
            terms.append(cross_entropy(plain(a), b) * (len(a) / len(x)))
            terms[-1].backward()
        optimizer.step()
        assert torch.equal(loss, sum(term.detach() for term in terms))
    pipe.flush()
    assert_same(pipe.model_state_dict(), plain.state_dict())


@pytest.mark.parametrize("method", ["dtrp", "fdg", "dgl"])
def test_what_weighs_the_loss_is_cut_alike(method: str) -> None:
    """`loss_weight` by samples is no weight at all."""
    options = {"aux": [nn.Linear(5, 5) for _ in range(3)]} if method == "dgl" else {}
    runs = []
    for more in ({}, {"loss_weight": len}):
        torch.manual_seed(2)
        pipe = make(model_of(), method=method, **copy.deepcopy(options), **more)
        for batch in batches():
            pipe.step(*batch)
        pipe.flush()
        runs.append(pipe.model_state_dict())
    assert_same(*runs)


def test_dgl_trains_on_batch_norm_down_to_two_samples() -> None:
    images = torch.randn(2, 3, 8, 8)
    model = get_model("resnet14-8", num_classes=3)
    pipe = make(model, method="dgl", aux=auxiliary(images, num_classes=3))
    for n in (16, 7, 2, 9):
        pipe.step(torch.randn(n, 3, 8, 8), torch.randint(3, (n,)))
    pipe.flush()
    assert counted(pipe) == 4 + 3 + 1 + 4


# -- checkpoints -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"num_microbatches": 4}])
@pytest.mark.parametrize("method", ["dtrp", "spectrain"])
def test_a_run_that_goes_on_cuts_small_minibatches_as_before(
    tmp_path: Path, options: dict[str, Any], method: str
) -> None:
    """Whoever gives the number alone goes on by the rule of the checkpoint."""
    whole = make(model_of(), method=method)
    first = copy.deepcopy(whole.model_state_dict())
    for i, batch in enumerate(batches()):
        if i == 3:
            whole.save(tmp_path / "checkpoint")
        whole.step(*batch)
    whole.flush()
    saved = manifest.inspect(tmp_path / "checkpoint")
    assert (saved.num_microbatches, saved.microbatch_samples) == (4, 2)
    model = model_of()
    model.load_state_dict(first)
    pipe = make(model, method=method, **options)
    pipe.load(tmp_path / "checkpoint")
    assert (pipe.num_microbatches, pipe.microbatch_samples) == (4, 2)
    for batch in batches()[3:]:
        pipe.step(*batch)
    pipe.flush()
    assert_same(pipe.model_state_dict(), whole.model_state_dict())


def without_the_rule(folder: Path) -> None:
    """As an older version has written it."""
    content = json.loads((folder / manifest.NAME).read_text())
    content = {name: value for name, value in content.items() if name not in ("microbatch_samples", "checksum")}
    (folder / manifest.NAME).write_bytes(manifest.written(content))


@pytest.mark.parametrize("number", [1, 4])
def test_a_checkpoint_of_an_older_version_goes_on_as_it_was(tmp_path: Path, number: int) -> None:
    whole = make(model_of(), num_microbatches=number)
    for i, batch in enumerate(batches()):
        if i == 3:
            whole.save(tmp_path / "checkpoint")
        whole.step(*batch)
    whole.flush()
    without_the_rule(tmp_path / "checkpoint")
    assert manifest.inspect(tmp_path / "checkpoint").microbatch_samples == 1
    for options in ({}, {"num_microbatches": number}, {"num_microbatches": number, "microbatch_samples": 1}):
        pipe = make(model_of(), **options)
        pipe.load(tmp_path / "checkpoint")
        assert (pipe.num_microbatches, pipe.microbatch_samples) == (number, 1)
        for batch in batches()[3:]:
            pipe.step(*batch)
        pipe.flush()
        assert_same(pipe.model_state_dict(), whole.model_state_dict())


def test_what_is_given_must_be_the_checkpoints(tmp_path: Path) -> None:
    pipe = make(model_of())
    pipe.step(*batches()[0])
    pipe.save(tmp_path / "checkpoint")
    for options, rule in (
        ({"num_microbatches": 2}, "4 micro-batches, and this pipeline has 2"),
        ({"num_microbatches": 4, "microbatch_samples": 1}, "microbatch_samples=2, and this pipeline has .*=1"),
        ({"microbatch_samples": 3}, "microbatch_samples=2, and this pipeline has .*=3"),
    ):
        with pytest.raises(dtrp.saving.CheckpointError, match=rule):
            make(model_of(), **options).load(tmp_path / "checkpoint")
    content = json.loads((tmp_path / "checkpoint" / manifest.NAME).read_text())
    del content["checksum"]
    for damaged in (0, "2", -1, None, 2.0):
        (tmp_path / "checkpoint" / manifest.NAME).write_bytes(
            manifest.written({**content, "microbatch_samples": damaged})
        )
        with pytest.raises(dtrp.saving.CheckpointError, match="'microbatch_samples' is missing or not of its type"):
            make(model_of()).load(tmp_path / "checkpoint")


def test_a_portable_checkpoint_leaves_the_number_to_the_pipeline(tmp_path: Path) -> None:
    pipe = make(model_of())
    pipe.step(*batches()[0])
    pipe.save(tmp_path / "checkpoint", portable=True)
    other = make(model_of(), num_stages=2)
    other.load(tmp_path / "checkpoint")
    assert (other.num_microbatches, other.microbatch_samples) == (2, 2)
    other.step(*batches()[0])


# -- refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"num_microbatches": "Auto"}, "num_microbatches='Auto': pass a whole number of at least 1, or 'auto'"),
        ({"num_microbatches": 0}, "num_microbatches=0: pass a whole number"),
        ({"microbatch_samples": 0}, "microbatch_samples=0: pass a whole number of at least 1"),
        ({"microbatch_samples": "auto"}, "microbatch_samples='auto': pass"),
    ],
)
def test_numbers_that_mean_nothing(options: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        make(model_of(), **options)


def test_the_number_of_parts() -> None:
    for samples in range(1, 40):
        for most in range(1, 9):
            assert num_parts(samples, most) == min(most, samples)
            assert num_parts(samples, most, 2) == max(1, min(most, samples // 2))
