"""Hugging Face models of tiny configurations with random weights, what they are called with, and their blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

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
    """Encoder and decoder read one embedding; the head, which T5 ties to it too, has a tensor of its own."""
    config = hf.T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=4, num_heads=2,
                         use_cache=False, decoder_start_token_id=0)  # fmt: skip
    model = hf.T5ForConditionalGeneration(config)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    return model


MODELS: dict[str, tuple[Callable[[], Any], Callable[[], Any], str]] = {
    "gpt2": (gpt2, tokens, "transformer.h.{}"),
    "gpt2, mask": (gpt2, lambda: {"input_ids": tokens(), "attention_mask": mask()}, "transformer.h.{}"),
    "gpt2, tied": (lambda: gpt2(tied=True), tokens, "transformer.h.{}"),
    "bert": (bert, lambda: {"input_ids": tokens(), "attention_mask": mask()}, "bert.encoder.layer.{}"),
    "llama": (llama, lambda: {"input_ids": tokens(), "attention_mask": mask()}, "model.layers.{}"),
    "vit": (vit, lambda: torch.randn(5, 3, 8, 8), "vit.layers.{}"),
    "t5": (
        t5,
        lambda: {"input_ids": tokens(), "attention_mask": mask(), "decoder_input_ids": tokens(5)},
        "decoder.block.{}",
    ),
    "t5, labels": (
        t5,
        lambda: {"input_ids": tokens(), "attention_mask": mask(), "labels": tokens(5)},
        "decoder.block.{}",
    ),
}
