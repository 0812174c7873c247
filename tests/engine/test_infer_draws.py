"""`infer` of modules that draw in eval mode: other numbers at every call, which depend on the seed and the call alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import dtrp


class Noisy(nn.Linear):
    """Draws in every mode, as a VAE or a masked autoencoder does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.randn_like(x)


def pipeline(seed: int = 7, method: str = "dtrp") -> dtrp.Pipeline:
    torch.manual_seed(0)
    layers = [Noisy(4, 4), nn.Linear(4, 4), Noisy(4, 4)]
    return dtrp.Pipeline(
        layers, lambda params: torch.optim.SGD(params, lr=0.1), mse_loss, method=method, num_microbatches=2, seed=seed
    )


X = torch.ones(6, 4)


def test_every_call_draws_anew_and_a_seed_repeats_all_of_them() -> None:
    pipe = pipeline()
    before = torch.get_rng_state()
    first, second, third = (pipe.infer(X) for _ in range(3))
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
    assert torch.equal(torch.get_rng_state(), before)
    again = pipeline()
    assert torch.equal(again.infer(X), first)
    assert torch.equal(again.infer(X), second)
    assert not torch.equal(pipeline(seed=8).infer(X), first)


def test_training_does_not_notice() -> None:
    """Draws of `step` are by micro-batch, whatever was inferred in between."""
    quiet, asked = pipeline(), pipeline()
    for _ in range(4):
        asked.infer(X)
        assert torch.equal(quiet.step(X, X), asked.step(X, X))


@pytest.mark.parametrize("portable", [False, True])
def test_a_checkpoint_keeps_the_count(portable: bool, tmp_path: Path) -> None:
    pipe = pipeline()
    pipe.step(X, X)
    for _ in range(3):
        pipe.infer(X)
    pipe.save(tmp_path / "saved", portable=portable)
    other = pipeline(seed=9)
    other.load(tmp_path / "saved")
    if not portable:
        pipe.flush()
        other.flush()
    assert torch.equal(other.infer(X), pipe.infer(X))
