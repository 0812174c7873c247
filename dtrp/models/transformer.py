"""A decoder-only transformer for text, of GPT-2's blocks."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import check_positive


class Embedding(nn.Module):
    """Tokens (N, T), int64, to features (N, T, width): each token's vector, plus that of its place."""

    def __init__(self, num_tokens: int, width: int, context: int) -> None:
        super().__init__()
        self.context = context
        self.token = nn.Embedding(num_tokens, width)
        self.place = nn.Embedding(context, width)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        if length > self.context:
            raise ValueError(f"{length} tokens but the context is {self.context}; pass at most as many")
        out: Tensor = self.token(tokens) + self.place(torch.arange(length, device=tokens.device))
        return out


class Attention(nn.Module):
    """Causal self-attention: every place looks at itself and at those before it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(n, length, width))
        return out


class Block(nn.Module):
    """x + attention(norm(x)), then x + linear(gelu(linear(norm(x)))), of 4 * width hidden units; (N, T, width) to the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(up=nn.Linear(width, 4 * width), gelu=nn.GELU(), down=nn.Linear(4 * width, width))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


def gpt(num_tokens: int, *, layers: int = 6, width: int = 128, heads: int = 4, context: int = 64) -> nn.Sequential:
    """Tokens (N, T), int64, T up to ``context``, to the logits of the next token at each place (N, T, num_tokens).

    Source: Radford et al., Language models are unsupervised multitask learners, 2019 (GPT-2), without dropout, and with
    a head of its own: the embedding and the head lie in different stages, so that they are not one tensor. Weights are
    not drawn as there, with deviation 0.02, which is for a width of 768 and more: those of linear layers are normal with
    deviation sqrt(2 / (inputs + outputs)) (Glorot and Bengio 2010), divided by sqrt(2 layers) where a block adds to its
    input, as there; the embeddings have deviation 0.5, so that an update moves what the blocks read by little.

    Args:
        num_tokens: of the vocabulary.
        layers: blocks.
        width: features of a token, a multiple of ``heads``.
        heads: of each attention.
        context: T at most.

    Raises:
        ValueError: a number below 1, or a width that the heads do not divide.
    """
    check_positive(num_tokens=num_tokens, layers=layers, width=width, heads=heads, context=context)
    if width % heads:
        nearest = max(heads, round(width / heads) * heads)
        raise ValueError(f"width={width} but {heads} heads share it in equal parts; pass width={nearest}")
    blocks: OrderedDict[str, nn.Module] = OrderedDict(embedding=Embedding(num_tokens, width, context))
    for i in range(1, layers + 1):
        blocks[f"block{i}"] = Block(width, heads)
    blocks["head"] = nn.Sequential(
        OrderedDict(norm=nn.LayerNorm(width), linear=nn.Linear(width, num_tokens, bias=False))
    )
    model = nn.Sequential(blocks)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(p)
        elif name.startswith("embedding"):
            nn.init.normal_(p, std=0.5)
        elif p.dim() > 1:
            adds = name.endswith(("attention.out.weight", "mlp.down.weight"))
            nn.init.xavier_normal_(p, gain=1 / math.sqrt(2 * layers) if adds else 1.0)
    return model
