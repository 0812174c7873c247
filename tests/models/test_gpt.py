"""The GPT and its text: sizes, causality, windows, and `dtrp train` on them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers import assert_close, check_perfect_prediction, clone
from torch import nn
from torch.nn.functional import cross_entropy
from unsplit import check_recomputed_under_autocast

from dtrp.cli import cli, run
from dtrp.data import batches, load_data
from dtrp.models import get_model, gpt
from dtrp.planning.plan_file import Plan
from dtrp.train import TrainConfig, Trainer, class_loss

WORDS = "to be, or not to be: that is the question\n"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(WORDS * 60)
    return file


# -- the model --------------------------------------------------------------------------------------------


def test_it_has_as_many_parameters_as_its_sizes_say() -> None:
    layers, width, context, tokens = 3, 32, 16, 11
    model = get_model("gpt", num_classes=tokens, layers=layers, width=width, heads=4, context=context)
    block = (
        4 * width + (width + 1) * 3 * width + (width + 1) * width + (width + 1) * 4 * width + (4 * width + 1) * width
    )
    want = (tokens + context) * width + layers * block + 2 * width + width * tokens
    assert sum(p.numel() for p in model.parameters()) == want
    assert type(model) is nn.Sequential
    assert [name for name, _ in model.named_children()] == ["embedding", "block1", "block2", "block3", "head"]


def test_its_defaults() -> None:
    model = get_model("gpt", num_classes=65)
    assert sum(name.startswith("block") for name, _ in model.named_children()) == 6
    assert model(torch.zeros(1, 64, dtype=torch.int64)).shape == (1, 64, 65)
    assert model.embedding.token.embedding_dim == 128
    assert model.block1.attention.heads == 4


@pytest.mark.usefixtures("float64")
def test_a_place_sees_itself_and_what_is_before_it() -> None:
    model = gpt(9, layers=2, width=16, heads=2, context=8)
    tokens = torch.randint(9, (1, 8))
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 9
    before, after = model(tokens)[0], model(changed)[0]
    assert torch.equal(before[:5], after[:5])
    assert not torch.isclose(before[5:], after[5:]).all(1).any()
    assert torch.allclose(model(tokens[:, :4])[0], before[:4], rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("float64")
def test_attention_is_the_equation() -> None:
    """softmax(q k' / sqrt(size), nothing from the future) v, for each head, and a linear layer of all."""
    attention = gpt(9, layers=1, width=12, heads=3, context=8).block1.attention
    x = torch.randn(2, 5, 12)
    q, k, v = attention.qkv(x).split(12, -1)
    heads = []
    for head in range(3):
        part = slice(4 * head, 4 * head + 4)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(4)
        future = torch.ones(5, 5, dtype=torch.bool).triu(1)
        heads.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v[..., part])
    torch.testing.assert_close(attention(x), attention.out(torch.cat(heads, -1)), rtol=1e-12, atol=1e-14)


def test_how_its_weights_are_drawn() -> None:
    model = gpt(65, layers=6, width=128, heads=4)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any()
        elif p.dim() > 1:
            adds = name.endswith(("attention.out.weight", "mlp.down.weight"))
            want = 0.5 if name.startswith("embedding") else math.sqrt(2 / sum(p.shape) / (12 if adds else 1))
            assert float(p.detach().std()) == pytest.approx(want, rel=0.05), name


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="width=130 but 4 heads share it in equal parts; pass width=128"):
        gpt(9, width=130)
    with pytest.raises(ValueError, match="layers=0: pass a whole number of at least 1"):
        gpt(9, layers=0)
    with pytest.raises(ValueError, match="65 tokens but the context is 64; pass at most as many"):
        gpt(9)(torch.zeros(1, 65, dtype=torch.int64))
    with pytest.raises(ValueError, match="width=8 but resnet20 has no choice of it; leave it out, or take gpt"):
        get_model("resnet20", width=8)


@pytest.mark.usefixtures("float64")
def test_with_perfect_prediction_it_trains_as_unsplit_to_the_bit() -> None:
    # The loss of the helpers takes one class a sample: a last layer sums a window up.
    model = nn.Sequential(
        *gpt(9, layers=4, width=16, heads=2, context=6), nn.Sequential(nn.Flatten(1), nn.Linear(54, 9))
    )
    data = [(torch.randint(9, (6, 6)), torch.randint(9, (6,))) for _ in range(8)]
    check_perfect_prediction(model, data, 4, num_microbatches=3)


# -- the text ---------------------------------------------------------------------------------------------


def test_under_autocast_a_recomputed_forward_is_the_first_one_to_the_bit() -> None:
    parts = list(gpt(9, layers=4, width=32, heads=4, context=16))
    tokens = torch.randint(9, (4, 16))
    stages = [nn.Sequential(*parts[:2]), nn.Sequential(*parts[2:4]), nn.Sequential(*parts[4:])]
    check_recomputed_under_autocast(stages, [(tokens, tokens)] * 2, class_loss)


def test_windows_follow_each_other_and_their_targets_are_the_next_characters(text: Path) -> None:
    data = load_data("text", text, context=10)
    whole = WORDS * 60
    num_test = round(len(whole) * 0.1)
    assert data.characters == "".join(sorted(set(WORDS)))
    assert data.num_classes == len(set(WORDS))
    for x, y, part in ((data.train_x, data.train_y, whole[:-num_test]), (data.test_x, data.test_y, whole[-num_test:])):
        assert x.shape == y.shape == ((len(part) - 1) // 10, 10)
        assert data.decode(x.flatten()) == part[: x.numel()]
        assert data.decode(y.flatten()) == part[1 : x.numel() + 1]


def test_an_epoch_visits_each_window_once(text: Path) -> None:
    data = load_data("text", text, context=10)
    options = {"dataset": data, "seed": 3, "augment": False}
    got = list(batches(data.train_x, data.train_y, 32, epoch=0, **options))
    x, y = torch.cat([x for x, _ in got]), torch.cat([y for _, y in got])
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert sorted(map(tuple, x.tolist())) == sorted(map(tuple, data.train_x.tolist()))
    again = torch.cat([x for x, _ in batches(data.train_x, data.train_y, 32, epoch=0, **options)])
    other = torch.cat([x for x, _ in batches(data.train_x, data.train_y, 32, epoch=1, **options)])
    assert torch.equal(x, again)
    assert not torch.equal(x, other)
    left = [x for x, _ in batches(data.train_x, data.train_y, 32, epoch=0, start=64, **options)]
    assert torch.equal(torch.cat(left), x[64:])
    only_y = torch.cat([y for _, y in batches(data.train_x, data.train_y, 32, epoch=0, images=False, **options)])
    assert torch.equal(only_y, y)


def test_files_that_are_no_text(tmp_path: Path, text: Path) -> None:
    with pytest.raises(ValueError, match=r"data 'text' needs a file; pass data_dir \(--data-dir\), any UTF-8 text"):
        load_data("text")
    with pytest.raises(IsADirectoryError, match=r"is a folder; pass the text file itself as data_dir"):
        load_data("text", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no .*nothing.txt; pass a text file"):
        load_data("text", tmp_path / "nothing.txt")
    (tmp_path / "bytes").write_bytes(b"abc\xff")
    with pytest.raises(ValueError, match=r"is not UTF-8 text \(byte 3\)"):
        load_data("text", tmp_path / "bytes")
    with pytest.raises(
        ValueError, match="has 2520 characters, and its last tenth, the test, is not longer than a window of 252"
    ):
        load_data("text", text, context=252)
    with pytest.raises(ValueError, match="context=8 but data 'digits' has no windows of text"):
        load_data("digits", context=8)


# -- dtrp train ---------------------------------------------------------------------------------------------


def test_the_loss_of_windows_is_the_mean_over_their_characters() -> None:
    out, y = torch.randn(3, 5, 7), torch.randint(7, (3, 5))
    each = [cross_entropy(out[n, t][None], y[n, t][None]) for n in range(3) for t in range(5)]
    torch.testing.assert_close(class_loss(out, y), torch.stack(each).mean())
    torch.testing.assert_close(class_loss(out, y, reduction="sum"), torch.stack(each).sum())
    assert torch.equal(class_loss(out[:, 0], y[:, 0]), cross_entropy(out[:, 0], y[:, 0]))


def test_it_is_planned_from_the_command_line(text: Path, tmp_path: Path) -> None:
    sizes = ["--layers", "2", "--width", "16", "--heads", "2", "--context", "8"]
    data = ["--data", "text", "--data-dir", str(text), "--model", "gpt", *sizes, "--workers", "2"]
    out = tmp_path / "plan.json"
    measured = ["--batch-size", "8", "--repeats", "1", "--latency", "0", "--neighbours", "0", "--keep-lead"]
    assert run(["plan", *data, *measured, "--out", str(out)]) == 0
    made = Plan.load(out)
    assert made.model["layers"] == ["embedding", "block1", "block2", "head"]
    assert run(["train", *data[:-2], "--limit-train", "40", "--epochs", "1", "--plan", str(out), "--quiet"]) == 0


def test_it_learns_from_the_command_line(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    sizes = ["--layers", "2", "--width", "32", "--heads", "2", "--context", "16"]
    result = CliRunner().invoke(
        cli,
        ["train", "--data", "text", "--data-dir", str(text), "--model", "gpt", *sizes, "--optimizer", "adamw", "--lr", "0.01",
         "--stages", "4", "--num-microbatches", "4", "--batch-size", "16", "--epochs", "12", "--out", str(out), "--threads", "1"],
        catch_exceptions=False,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["test_loss"] > 1.2
    assert lines[-1]["test_loss"] < 1.0
    loss = lines[-1]["test_loss"]
    shown = " ".join(result.output.split())
    assert f"perplexity {math.exp(loss):.3f} bits per character {loss / math.log(2):.3f}" in shown
    assert "training and" in shown
    assert "test windows; dtrp, 4 stages" in shown
    plain = get_model("gpt", num_classes=len(set(WORDS)), layers=2, width=32, heads=2, context=16)
    plain.load_state_dict(torch.load(out / "model.pt"))
    data = load_data("text", text, context=16)
    with torch.no_grad():
        assert float(class_loss(plain(data.test_x), data.test_y)) == pytest.approx(loss, rel=1e-5)
        assert float((plain(data.test_x).argmax(-1) == data.test_y).float().mean()) == pytest.approx(
            lines[-1]["test_accuracy"], rel=1e-5
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"model": "gpt", "data": "digits"},
            "--model gpt with --data digits: it reads text; pass --data text --data-dir FILE",
        ),
        ({"model": "resnet20", "data": "text"}, "--model resnet20 with --data text: it reads images; pass --model gpt"),
        ({"model": "resnet20", "layers": 3}, "layers=3 but resnet20 has no choice of it"),
        ({"model": "resnet20", "context": 3}, "context=3 but resnet20 has no choice of it"),
        ({"model": "gpt", "data": "text", "heads": 0}, "--heads 0: at least 1"),
    ],
)
def test_settings_that_do_not_fit(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(TrainConfig(**options))  # type: ignore[arg-type]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", ["bp", "dtrp"])
def test_its_run_is_a_plain_loop_where_nothing_is_late(method: str, text: Path) -> None:
    """`dtrp train` with one stage, against a loop of torch alone."""
    config = TrainConfig(
        data="text", data_dir=str(text), model="gpt", layers=1, width=16, heads=2, context=8, method=method, stages=1,
        optimizer="adamw", lr=0.01, batch_size=32, max_updates=4, epochs=1, dtype="float64", lr_schedule="constant",
    )  # fmt: skip
    trainer = Trainer(config)
    (model,) = trainer.pipe.stages
    plain = clone(model)
    trainer.run()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=config.weight_decay)
    data = trainer.dataset
    every = batches(data.train_x, data.train_y, 32, dataset=data, seed=0, epoch=0, augment=False)
    for _, (x, y) in zip(range(4), every, strict=False):
        cross_entropy(plain(x).flatten(0, 1), y.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_close(model.state_dict(), plain.state_dict(), 1e-12)
