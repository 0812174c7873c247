"""A decoder-only transformer for text, with the blocks of GPT-2."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Named, check_positive


class Embedding(nn.Module):
    """Tokens (N, T), int64, to features (N, T, width): the embedding of the token plus that of its position."""

    def __init__(self, num_tokens: int, width: int, context: int) -> None:
        super().__init__()
        self.context = context
        self.token = nn.Embedding(num_tokens, width)
        self.place = nn.Embedding(context, width)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        if length > self.context:
            raise ValueError(f"{length} tokens but the context is {self.context}; pass at most as many")
        return torch.add(self.token(tokens), self.place(torch.arange(length, device=tokens.device)))


class Attention(nn.Module):
    """Causal self-attention: a position attends to itself and to those before it. (N, T, width) to the same."""

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
    """x + attention(norm(x)), then x + linear(gelu(linear(norm(x)))) of 4 * width hidden units.

    (N, T, width) to the same.
    """

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
        return torch.add(x, self.mlp(self.norm2(x)))


def gpt(num_tokens: int, *, layers: int = 6, width: int = 128, heads: int = 4, context: int = 64) -> nn.Sequential:
    """Tokens (N, T), int64, with T <= ``context``, to the logits of the next token at each position (N, T, num_tokens).

    Source: Radford et al., Language models are unsupervised multitask learners, 2019 (GPT-2), with two differences.
    There is no dropout, and the head does not share the weight of the embedding, which lies in another stage. GPT-2's
    initialization with deviation 0.02 suits a width of 768 and more. Here the weights of linear layers are normal with
    deviation sqrt(2 / (inputs + outputs)) (Glorot and Bengio 2010), divided by sqrt(2 layers) where a block adds to its
    input, as in GPT-2; the embeddings have deviation 0.5, so that an update changes the input of the blocks by little.

    Args:
        num_tokens: size of the vocabulary.
        layers: number of blocks.
        width: features of a token, a multiple of ``heads``.
        heads: number of attention heads.
        context: largest T.

    Raises:
        ValueError: a number below 1, or a width that the heads do not divide.
    """
    check_positive(num_tokens=num_tokens, layers=layers, width=width, heads=heads, context=context)
    if width % heads:
        nearest = max(heads, round(width / heads) * heads)
        raise ValueError(f"width={width} but {heads} heads share it in equal parts; pass width={nearest}")
    blocks: Named = OrderedDict(embedding=Embedding(num_tokens, width, context))
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
