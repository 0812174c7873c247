"""Hugging Face models from their configuration, tiny and with random weights: split, they are what they were."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from unsplit import assert_trained_alike, call, check_outputs, logits, minibatches, train_chain, train_plain

import dtrp

hf = pytest.importorskip("transformers", reason="transformers is not installed; pip install 'dtrp[transformers]'")

SIZE = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
TOKENS = {"vocab_size": 30, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def tokens(length: int = 7) -> torch.Tensor:
    return torch.randint(3, 30, (5, length))


def mask() -> torch.Tensor:
    return (torch.arange(7) < torch.tensor([7, 5, 6, 7, 4])[:, None]).long()


def gpt2(tied: bool = False) -> Any:
    config = hf.GPT2Config(
        **TOKENS, n_positions=16, n_embd=16, n_layer=4, n_head=2, use_cache=False, tie_word_embeddings=tied
    )
    return hf.GPT2LMHeadModel(config)


def bert() -> Any:
    return hf.BertForSequenceClassification(
        hf.BertConfig(**SIZE, vocab_size=30, max_position_embeddings=16, num_labels=3)
    )


def llama() -> Any:
    config = hf.LlamaConfig(**SIZE, **TOKENS, num_key_value_heads=1, max_position_embeddings=16, use_cache=False,
                            attention_dropout=0.1, tie_word_embeddings=False)  # fmt: skip
    return hf.LlamaForCausalLM(config)


def vit() -> Any:
    config = hf.ViTConfig(**SIZE, image_size=8, patch_size=4, num_labels=3, hidden_dropout_prob=0.1)
    return hf.ViTForImageClassification(config)


def t5() -> Any:
    config = hf.T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=4, num_heads=2,
                         use_cache=False, tie_word_embeddings=False, decoder_start_token_id=0)  # fmt: skip
    return hf.T5ForConditionalGeneration(config)


MODELS: dict[str, tuple[Callable[[], Any], Callable[[], Any], str]] = {
    "gpt2": (gpt2, tokens, "transformer.h.{}"),
    "gpt2, mask": (gpt2, lambda: {"input_ids": tokens(), "attention_mask": mask()}, "transformer.h.{}"),
    "bert": (bert, lambda: {"input_ids": tokens(), "attention_mask": mask()}, "bert.encoder.layer.{}"),
    "llama": (llama, lambda: {"input_ids": tokens(), "attention_mask": mask()}, "model.layers.{}"),
    "vit": (vit, lambda: torch.randn(5, 3, 8, 8), "vit.layers.{}"),
    "t5": (
        t5,
        lambda: {"input_ids": tokens(), "attention_mask": mask(), "decoder_input_ids": tokens(5)},
        "decoder.block.{}",
    ),
}
CASES = [(kind, how) for kind in MODELS for how in (2, 4, "points")]


def make(kind: str, how: int | str) -> tuple[Any, Any, dtrp.Stages]:
    build, data, block = MODELS[kind]
    model, x = build().train(), data()
    how_to: dict[str, Any] = (
        {"num_stages": how} if how != "points" else {"points": [block.format(i) for i in (1, 2, 3)]}
    )
    stages = dtrp.split(model, example=x, **how_to)
    assert len(stages) == (4 if how == "points" else how)
    return model, x, stages


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("kind", "how"), CASES)
def test_stages_are_the_model(kind: str, how: int | str) -> None:
    model, x, stages = make(kind, how)
    check_outputs(model, stages, x)
    assert kind == "t5" or all("." in point and point.rpartition(".")[2].isdigit() for point in stages.points), (
        "cut between blocks"
    )


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("kind", "how"), CASES)
def test_they_train_as_the_model(kind: str, how: int | str) -> None:
    model, x, stages = make(kind, how)
    plain = copy.deepcopy(model)
    batches = minibatches(x, logits(call(plain.eval(), x)).shape[1])
    want = train_plain(plain.train(), stages.points, batches, 3)
    assert_trained_alike(model, plain, train_chain(stages, batches, 3), want)


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


@pytest.mark.usefixtures("float64")
def test_tied_embeddings_are_one_tensor_under_both_names() -> None:
    model = gpt2(tied=True).train()
    x = tokens()
    stages = dtrp.split(model, num_stages=2, example=x)
    assert stages[0].transformer.wte.weight is stages[1].lm_head.weight is model.lm_head.weight
    check_outputs(model, stages, x)
    with pytest.raises(ValueError, match="is a DynamicCache|DynamicCache"):
        model.config.use_cache = True
        dtrp.split(model, num_stages=2, example=x)
