"""A mini-batch whose samples are not along dimension 0 is not cut in silence."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers import sgd
from torch import Tensor, nn

import dtrp


class Recurrent(nn.Module):
    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(5, 6, batch_first=batch_first), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])  # type: ignore[no-any-return]


class Attentive(nn.Module):
    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))  # type: ignore[no-any-return]


def stages_of(kind: str, *, batch_first: bool) -> tuple[object, Tensor]:
    if kind == "list":
        return [Recurrent(batch_first=batch_first), nn.Linear(3, 3)], torch.randn(8, 8, 5)
    x = torch.randn(8, 8, 8)
    return dtrp.split(Attentive(batch_first=batch_first), num_stages=2, example=x), x


@pytest.mark.parametrize("kind", ["list", "traced"])
def test_a_sequence_in_the_place_of_samples_is_warned_of_once(kind: str) -> None:
    stages, x = stages_of(kind, batch_first=False)
    pipe = dtrp.Pipeline(stages, sgd, nn.functional.mse_loss)  # type: ignore[arg-type]
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match="not along dimension 0, or depend on each other.* num_microbatches=1"):
        pipe.step(x, torch.randn(8, 8, 3, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), state)
    pipe.step(x, torch.randn(8, 8, 3))


@pytest.mark.parametrize("kind", ["list", "traced"])
def test_nobody_is_warned_where_samples_come_first_or_the_number_was_chosen(kind: str) -> None:
    for batch_first, options in ((True, {}), (False, {"num_microbatches": 2}), (False, {"num_microbatches": 1})):
        stages, x = stages_of(kind, batch_first=batch_first)
        pipe = dtrp.Pipeline(stages, sgd, nn.functional.mse_loss, **options)  # type: ignore[arg-type]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pipe.step(x, torch.randn(8, 8, 3))


def test_a_model_that_cannot_be_looked_at_is_not_judged() -> None:
    class Trains(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Recurrent(batch_first=False)

        def forward(self, x: Tensor) -> Tensor:
            assert self.training, "in train mode alone"
            return self.inner(x)  # type: ignore[no-any-return]

    pipe = dtrp.Pipeline([Trains(), nn.Linear(3, 3)], sgd, nn.functional.mse_loss)
    pipe.step(torch.randn(8, 8, 5), torch.randn(8, 8, 3))
