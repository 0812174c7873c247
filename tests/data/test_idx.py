"""MNIST and Fashion-MNIST: the files as they are published, gzipped or not, or a refusal that names the file."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
import torch
from idx_files import NUM, as_idx, images_of, labels_of, write_idx
from PIL import Image

from dtrp.cli import run
from dtrp.data import load_data
from dtrp.data.idx import _read
from dtrp.train.trained.loading import TrainedRun
from dtrp.train.trained.prediction import read_image

TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_idx(tmp_path / "files")


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
@pytest.mark.parametrize("gzipped", [False, True])
def test_images_have_a_border_and_classes_their_names(tmp_path: Path, name: str, gzipped: bool) -> None:
    data = load_data(name, write_idx(tmp_path, gzipped=gzipped))
    for split, x, y in (("train", data.train_x, data.train_y), ("t10k", data.test_x, data.test_y)):
        expected = torch.zeros(NUM[split], 1, 32, 32, dtype=torch.uint8)
        expected[:, 0, 2:30, 2:30] = images_of(split)
        assert torch.equal(x, expected)
        assert x.dtype == torch.uint8
        assert torch.equal(y, labels_of(split).long())
    scaled = data.train_x.double() / 255
    torch.testing.assert_close(data.mean, scaled.mean((0, 2, 3)).float())
    torch.testing.assert_close(data.std, scaled.std(correction=0).float().view(1))
    assert (data.in_channels, data.image_size, data.num_classes, data.border) == (1, 32, 10, 2)
    assert data.class_names is not None
    assert data.class_names[9] == {"mnist": "9", "fashion-mnist": "ankle boot"}[name]
    assert data.augment == (name == "fashion-mnist")  # a mirrored digit is none


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("mnist", "mnist"),
        ("mnist", "MNIST/raw"),
        ("fashion-mnist", "fashion-mnist"),
        ("fashion-mnist", "FashionMNIST/raw"),
    ],
)
def test_the_folder_that_holds_the_folder(tmp_path: Path, name: str, inside: str) -> None:
    write_idx(tmp_path / inside, dot=inside == "mnist")
    assert len(load_data(name, tmp_path).train_x) == NUM["train"]
    other = {"mnist": "fashion-mnist", "fashion-mnist": "mnist"}[name]
    with pytest.raises(FileNotFoundError, match=f"no file {re.escape(str(tmp_path / TRAIN_IMAGES))}, nor"):
        load_data(other, tmp_path)  # it does not take the other's


@pytest.mark.parametrize("gzipped_name", [False, True])
def test_what_is_gzipped_is_told_by_its_content(folder: Path, gzipped_name: bool) -> None:
    path = folder / TRAIN_IMAGES
    content = path.read_bytes()
    path.unlink()
    (folder / (TRAIN_IMAGES + ".gz" * gzipped_name)).write_bytes(content if gzipped_name else gzip.compress(content))
    assert torch.equal(load_data("mnist", folder).train_x[:, 0, 2:30, 2:30], images_of("train"))


@pytest.mark.parametrize(
    ("name", "source"), [("mnist", "Yann LeCun"), ("fashion-mnist", "zalandoresearch/fashion-mnist")]
)
@pytest.mark.parametrize("missing", [TRAIN_IMAGES, TEST_LABELS])
def test_a_missing_file_is_named_with_what_to_download(folder: Path, name: str, source: str, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(FileNotFoundError) as failed:
        load_data(name, folder)
    message = str(failed.value)
    assert message.startswith(f"no file {folder / missing}, nor {missing}.gz; download ")
    for word in (TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS, source, "--data-dir"):
        assert word in message


def test_without_data_dir_it_is_the_current_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert len(load_data("mnist").test_x) == NUM["t10k"]
    with pytest.raises(ValueError, match="image_size=28 but the images of mnist are 32x32; leave image_size out"):
        load_data("mnist", image_size=28)


@pytest.mark.parametrize(
    ("file", "content", "match"),
    [
        (
            TRAIN_IMAGES,
            as_idx(labels_of("train")),
            r"begins with '00000801', and not with '00000803', .* in 3 dimensions",
        ),
        (
            TEST_LABELS,
            as_idx(images_of("t10k")),
            r"begins with '00000803', and not with '00000801', .* in 1 dimension does",
        ),
        (TRAIN_IMAGES, b"<html>Not found, and more text</html>", "begins with '3c68746d'"),
        (TRAIN_LABELS, b"", "begins with ''"),
        (TRAIN_LABELS, b"\0\0\x08\x01\0\0", "begins with '00000801'"),
        (TRAIN_IMAGES, as_idx(images_of("train")[:, :27]), "holds 40 x 27 x 28, and not N x 28 x 28"),
        (TRAIN_IMAGES, as_idx(images_of("train")[:0]), "holds 0 x 28 x 28, and not N x 28 x 28"),
        (TEST_LABELS, as_idx(labels_of("t10k")) + b"\0", "has more than 20 bytes where its head says 20"),
        (TEST_LABELS, as_idx(labels_of("t10k"))[:-1], "has 19 bytes where its head says 20"),
        (
            TRAIN_IMAGES,
            b"\0\0\x08\x03\xff\xff\xff\xff\0\0\0\x1c\0\0\0\x1c" + b"\0" * 800,
            "has 800 bytes where its head says 336",
        ),
        (TRAIN_LABELS, as_idx(labels_of("train") + 1), "the labels are 1..10, and not in 0..9"),
        (TRAIN_LABELS, as_idx(labels_of("t10k")), f"holds 20 labels|holds 40 images but .*{TRAIN_LABELS} 20 labels"),
    ],
)
@pytest.mark.parametrize("gzipped", [False, True])
def test_wrong_content(folder: Path, file: str, content: bytes, match: str, gzipped: bool) -> None:
    (folder / file).write_bytes(gzip.compress(content) if gzipped else content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(folder))}.*{match}"):
        load_data("mnist", folder)


def test_any_damaged_byte_is_refused_or_read(tmp_path: Path) -> None:
    """A ValueError that names the file, or numbers of the right form."""
    path = tmp_path / TRAIN_LABELS
    plain = as_idx(labels_of("t10k"))
    for whole in (plain, gzip.compress(plain)):
        for i in range(len(whole)):
            for damaged in (
                whole[:i],
                *(whole[:i] + bytes([whole[i] ^ bits]) + whole[i + 1 :] for bits in (0x01, 0x80, 0xFF)),
            ):
                path.write_bytes(damaged)
                try:
                    found = _read(path, ())
                except ValueError as error:
                    assert str(error).startswith(str(path))  # noqa: PT017
                else:
                    assert found.shape == (20,)


def test_a_run_and_what_its_model_says_of_a_file(tmp_path: Path, folder: Path) -> None:
    """Trained, tested again, and asked about the first test image as a file of 28 x 28 pixels."""
    out = tmp_path / "run"
    words = [
        "--data",
        "fashion-mnist",
        "--data-dir",
        str(folder),
        "--model",
        "mlp",
        "--stages",
        "2",
        "--batch-size",
        "8",
    ]
    assert run(["train", *words, "--epochs", "1", "--threads", "1", "--quiet", "--out", str(out)]) == 0
    assert json.loads((out / "data.json").read_text())["reading"]["border"] == 2
    assert run(["evaluate", str(out), "--threads", "1"]) == 0
    Image.fromarray(images_of("t10k")[0].numpy()).save(tmp_path / "first.png")
    data = load_data("fashion-mnist", folder)
    first = (data.test_x[:1].double() / 255 - data.mean[0]) / data.std[0]
    torch.testing.assert_close(
        read_image(str(tmp_path / "first.png"), TrainedRun.open(out)).double(), first, rtol=1e-6, atol=1e-6
    )
    assert run(["predict", str(out), str(tmp_path / "first.png"), "--threads", "1"]) == 0
