"""A model of texts for batches padded to the longest, and such batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, scaled_dot_product_attention

LONGEST = 12


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(h).chunk(3, -1))
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        return h + dropout(torch.tanh(self.out(out)), 0.1, self.training)


class Classifier(nn.Module):
    """A mask and positions of each text's length; the last block reads the length, which no tensor beside it has."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(20, width), nn.Embedding(LONGEST, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.pooled, self.head = nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        length = ids.shape[1]
        keep = mask[:, None, None, :] & torch.ones(length, length, dtype=torch.bool).tril()
        h = self.tokens(ids) + self.places(torch.arange(length))
        for block in self.blocks:
            h = block(h, keep)
        h = (h * mask[..., None]).sum(1)
        h = torch.tanh(self.pooled(h)) / length
        return {"logits": self.head(h) * length}


def texts(num: int, length: int) -> dict[str, Tensor]:
    """Texts of which the last is the longest."""
    lengths = torch.randint(1, length + 1, (num,))
    lengths[-1] = length
    return {"ids": torch.randint(20, (num, length)), "mask": torch.arange(length) < lengths[:, None]}


def batches(shapes: list[tuple[int, int]]) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Mini-batches of (samples, length), with classes."""
    return [(texts(*shape), torch.randint(3, shape[:1])) for shape in shapes]


SHAPES = [(5, 7), (6, 3), (4, 12), (3, 2), (5, 9), (2, 5)]
VARYING: Any = {"ids": {1: "length"}, "mask": {1: "length"}}
