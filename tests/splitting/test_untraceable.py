"""What `dtrp.split` says of a forward that looks at values of the data, and that what it says works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from unsplit import chain

import dtrp

pytestmark = pytest.mark.usefixtures("float64")


class Looks(nn.Module):
    """Sequences of (samples, 6, 8), their lengths, a way through, and the modules that it needs."""

    def __init__(self, way: Callable[[Any, Tensor, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.first, self.last, self.way = nn.Linear(8, 8), nn.Linear(8, 8), way
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(self.way(self, h, lengths))


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(5, 6, 8), torch.tensor([6, 5, 4, 3, 2])


def causal(h: Tensor) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(h.shape[1])


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def decoder() -> nn.Module:
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 1)


def transformer() -> nn.Module:
    return nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True)


def padding(lengths: Tensor) -> Tensor:
    return torch.arange(6) >= lengths[:, None]


def packed(m: Any, h: Tensor, lengths: Tensor) -> Tensor:
    out, _ = m.rnn(pack_padded_sequence(h, lengths, batch_first=True))
    return pad_packed_sequence(out, batch_first=True)[0]


def branching(m: Any, h: Tensor, lengths: Tensor) -> Tensor:
    if (lengths > 5).any():
        return h * 2
    return h


def asserting(m: Any, h: Tensor, lengths: Tensor) -> Tensor:
    assert lengths.max() <= 6
    return h


def printing(m: Any, h: Tensor, lengths: Tensor) -> Tensor:
    print(f"{h.mean():.2f}")
    return h


def cutting(m: Any, h: Tensor, lengths: Tensor) -> Tensor:
    return h[:, : int(lengths.max())]


def negative_log_likelihood(m: Any, h: Tensor, lengths: Tensor) -> Tensor:
    return h + F.gaussian_nll_loss(h, h * 0, h.exp())


def by_its_formula(m: Any, h: Tensor, lengths: Tensor) -> Tensor:
    return h + (0.5 * (h + h**2 / h.exp())).mean()


CASES: list[tuple[Callable[..., Tensor], dict[str, Callable[[], nn.Module]], str, Callable[..., Tensor] | None]] = [
    (
        packed,
        {"rnn": lambda: nn.LSTM(8, 8, batch_first=True)},
        "a packed sequence has sizes that the data decide; run the module on the padded tensor",
        lambda m, h, lengths: torch.where(padding(lengths)[..., None], 0.0, m.rnn(h)[0]),
    ),
    (branching, {}, "the forward branches by the data; .* torch.where", lambda m, h, n: torch.where((n > 5).any(), h * 2, h)),
    (asserting, {}, "the forward asserts something of the data", lambda m, h, _: h),
    (printing, {}, "the forward writes values of the data as text", lambda m, h, _: h),
    (cutting, {}, "the forward takes a size from the data; take it from a shape, or work at full size", lambda m, h, _: h),
    (
        lambda m, h, n: h + F.one_hot(n)[:, None].double().sum(-1, keepdim=True),
        {},
        "F.one_hot reads the largest class; pass num_classes",
        lambda m, h, n: h + F.one_hot(n, 7)[:, None].double().sum(-1, keepdim=True),
    ),
    (
        lambda m, h, _: h + Normal(h, h.exp(), validate_args=True).entropy(),  # torch's compiler turns it off for all
        {},
        "a distribution looks whether the values are valid; pass validate_args=False",
        lambda m, h, _: h + Normal(h, h.exp(), validate_args=False).entropy(),
    ),
    (negative_log_likelihood, {}, "F.gaussian_nll_loss looks whether variances are negative", by_its_formula),
    (
        lambda m, h, n: h + m.inner(h[:, 0], n).loss,
        {"inner": lambda: nn.AdaptiveLogSoftmaxWithLoss(8, 10, [3, 6], div_value=2.0)},
        r"take the loss of its log_prob\(x\), as F.nll_loss\(self.adaptive.log_prob\(x\), y\)",
        lambda m, h, n: h + F.nll_loss(m.inner.log_prob(h[:, 0]), n),
    ),
    (lambda m, h, _: h + torch.from_numpy(h.detach().numpy()), {}, "leaves torch for NumPy; use torch's functions", None),
    (
        lambda m, h, _: h + torch.nested.nested_tensor(list(h.unbind())).to_padded_tensor(0.0),
        {},
        "",
        None,
    ),
]  # fmt: skip


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("way", "modules", "message", "works"), CASES)
def test_what_to_do_is_told_and_works(
    way: Callable[..., Tensor],
    modules: dict[str, Callable[[], nn.Module]],
    message: str,
    works: Callable[..., Tensor] | None,
) -> None:
    model, x = Looks(way, **{name: make() for name, make in modules.items()}), data()
    with pytest.raises(ValueError, match=f"the model cannot be traced.*{message}"):
        dtrp.split(model, points=["last"], example=x)
    if works is None:
        return
    want = model(*x)
    model.way = works
    stages = dtrp.split(model, points=["last"], example=x)
    torch.testing.assert_close(chain(stages, x), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("inner", "way"),
    [
        (encoder, lambda m, h, _: m.inner(h, mask=causal(h))),
        (encoder, lambda m, h, _: m.inner(h, mask=causal(h).roll(1, 1))),
        (decoder, lambda m, h, _: m.inner(h, h, tgt_mask=causal(h))),
        (transformer, lambda m, h, _: m.inner(h, h, src_mask=causal(h), tgt_mask=causal(h))),
    ],
)
def test_torchs_transformers_take_any_mask(inner: Callable[[], nn.Module], way: Callable[..., Tensor]) -> None:
    """They look whether it is causal where nobody says, which a trace cannot."""
    model, x = Looks(way, inner=inner()), data()
    stages = dtrp.split(model, points=["last"], example=x)
    for training in (True, False):
        model.train(training)
        for stage in stages:
            stage.train(training)
        out = chain(stages, x)
        torch.testing.assert_close(out, model(*x), rtol=1e-10, atol=1e-10)
        got = torch.autograd.grad(out.square().sum(), [*model.parameters()])
        for a, b in zip(got, torch.autograd.grad(model(*x).square().sum(), [*model.parameters()]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_padding_in_eval_mode_of_torchs_encoder() -> None:
    """Without gradients it would make nested tensors of the padding; a trace takes the way with gradients."""
    model = Looks(
        lambda m, h, n: m.inner(h, src_key_padding_mask=padding(n)),
        inner=nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
    ).eval()
    x = data()
    stages = dtrp.split(model, points=["last"], example=x)
    torch.testing.assert_close(chain(stages, x), model(*x), rtol=1e-10, atol=1e-10)
