"""Hugging Face models from their configuration, tiny and with random weights: split, they are what they were."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from unsplit import (
    assert_trained_alike,
    call,
    check_outputs,
    check_pipeline,
    check_recomputed_under_autocast,
    copied_from_the_first,
    logits,
    loss_fn,
    minibatches,
    sgd,
    train_chain,
    train_plain,
)

import dtrp

pytest.importorskip("transformers", reason="transformers is not installed; pip install 'dtrp[transformers]'")

from hugging_face_models import MODELS, gpt2, tokens
from transformers import BatchEncoding

CASES = [(kind, how) for kind in MODELS for how in (2, 4, "points")]


@copied_from_the_first
def make(kind: str, how: int | str) -> tuple[Any, Any, dtrp.Stages]:
    """The model, what it is called with, and its stages."""
    build, data, block = MODELS[kind]
    model, x = build().train(), data()
    how_to: dict[str, Any] = (
        {"num_stages": how} if how != "points" else {"points": [block.format(i) for i in (1, 2, 3)]}
    )
    stages = dtrp.split(model, example=x, **how_to)
    assert len(stages) == (4 if how == "points" else how)
    return model, x, stages


@pytest.mark.full
@pytest.mark.sampled(12)
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("kind", "how"),
    [
        case if case in [("vit", "points"), ("t5", "points")] else pytest.param(*case, marks=pytest.mark.full)
        for case in CASES
        if case[1] == "points"
    ]
    + [pytest.param(*case, marks=pytest.mark.full) if case[0] == "t5" else case for case in CASES if case[1] == 4],
)
def test_stages_are_the_model(kind: str, how: int | str) -> None:
    model, x, stages = make(kind, how)
    check_outputs(model, stages, x)
    assert kind.startswith("t5") or all(
        "." in point and point.rpartition(".")[2].isdigit() for point in stages.points
    ), "cut between blocks"


@pytest.mark.full
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("kind", "how"), CASES)
def test_they_train_as_the_model(kind: str, how: int | str) -> None:
    model, x, stages = make(kind, how)
    plain = copy.deepcopy(model)
    batches = minibatches(x, logits(call(plain.eval(), x)).shape[1])
    want = train_plain(plain.train(), stages.points, batches, 3)
    assert_trained_alike(model, plain, train_chain(stages, batches, 3), want)


@pytest.mark.sampled(2)
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("how", [pytest.param(2, marks=pytest.mark.full), 4])
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.full) if kind in ("gpt2", "gpt2, mask") or "t5" in kind else kind
        for kind in MODELS
    ],
)
def test_a_pipeline_of_them_trains_as_the_model(kind: str, how: int) -> None:
    check_pipeline(*make(kind, how), 3, tied=kind.endswith("tied"))


@pytest.mark.full
@pytest.mark.sampled(8)
@pytest.mark.parametrize(("kind", "num"), [("gpt2", 1), ("vit", 1), ("bert", 2), ("llama", 3)])
def test_masks_that_follow_from_sizes_do_not_travel(kind: str, num: int) -> None:
    """Hidden states and the caller's mask do, and Llama's rotations; not a causal mask, nor sizes."""
    model, x, stages = make(kind, 4)
    if kind == "llama":
        x = {"input_ids": x["input_ids"]}
        stages = dtrp.split(model, num_stages=4, example=x)
    for stage in stages[:-1]:
        x = stage(x)
        passed = x if isinstance(x, tuple) else (x,)
        assert len(passed) == num
        assert all(isinstance(value, torch.Tensor) for value in passed)


@pytest.mark.full
@pytest.mark.sampled(12)
@pytest.mark.parametrize(
    "kind", ["gpt2, mask", *(pytest.param(kind, marks=pytest.mark.full) for kind in ("bert", "t5")), "llama", "vit"]
)
def test_recomputed_under_autocast(kind: str) -> None:
    _, x, stages = make(kind, 4)
    y = torch.zeros(len(next(iter(x.values())) if isinstance(x, dict) else x), dtype=torch.int64)
    check_recomputed_under_autocast(stages, [(x, y)] * 2, loss_fn)


def test_labels_travel_to_where_the_model_reads_them() -> None:
    """Keyword arguments are those of the example; the model computes its loss itself, in the last stage."""
    model, ids = gpt2(), tokens()
    x = {"input_ids": ids, "labels": ids}
    stages = dtrp.split(model, num_stages=2, example=x)
    pipe = dtrp.Pipeline(stages, sgd, lambda out, y: out["loss"], method="dtrp", num_microbatches=1)
    with torch.no_grad():
        want = copy.deepcopy(model).eval()(**x).loss
    torch.testing.assert_close(pipe.infer(x)["loss"], want)
    for _ in range(3):
        pipe.step(x, ids)
    pipe.flush()


@pytest.mark.usefixtures("float64")
def test_tied_embeddings_are_one_tensor_under_both_names() -> None:
    model = gpt2(tied=True).train()
    x = tokens()
    stages = dtrp.split(model, num_stages=2, example=x)
    assert stages[0].transformer.wte.weight is stages[1].lm_head.weight is model.lm_head.weight
    check_outputs(model, stages, x)


@pytest.mark.full
@pytest.mark.usefixtures("float64")
def test_a_cache_is_left_out() -> None:
    """As a configuration comes, and as a tokenizer's output is given."""
    model, ids = gpt2(), tokens()
    model.config.use_cache = True
    example = BatchEncoding({"input_ids": ids})
    stages = dtrp.split(model, points=["transformer.h.2"], example=example)
    assert model.config.use_cache
    pipe = dtrp.Pipeline(stages, sgd, loss_fn, method="bp", num_microbatches=1)
    got = pipe.infer(example)
    with torch.no_grad():
        want = model.eval()(ids)
    assert torch.equal(got.logits, want.logits)
    assert set(want) - set(got) == {"past_key_values"}
    with pytest.raises(
        ValueError, match="it returns a DynamicCache; a model in stages returns tensors.* use_cache=False"
    ):
        dtrp.split(model, num_stages=2, example={"input_ids": ids, "use_cache": True})


@pytest.mark.full
def test_outputs_captured_by_hooks_are_traced() -> None:
    """A first forward leaves the library's hooks on the model, and the trace removes none of them."""
    model, ids = gpt2().eval(), tokens()
    model.config.output_hidden_states = True
    want = model(ids).hidden_states
    for _ in range(2):
        stages = dtrp.split(model, points=["transformer.h.2"], example=ids)
        for out in (stages[1](stages[0](ids)), model(ids)):
            assert len(out.hidden_states) == len(want)
            assert all(torch.equal(a, b) for a, b in zip(out.hidden_states, want, strict=True))


@pytest.mark.full
def test_a_name_without_the_models_own_part_is_answered_with_the_whole() -> None:
    build, data, _ = MODELS["bert"]
    with pytest.raises(ValueError, match=r"'encoder.layer.2'; did you mean 'bert.encoder.layer.2'\? known"):
        dtrp.split(build(), points=["encoder.layer.2"], example=data())
