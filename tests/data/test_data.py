"""Data: read as it is or refused with the file's name, and batches that depend on seed and epoch alone."""

import os
import pickle
import random
import re
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dtrp.data import Dataset, batches, list_data, load_data
from dtrp.data.augment import draw_crops, padding
from dtrp.data.cifar import _LAYOUTS, _read_images
from dtrp.data.dataset import channel_stats
from dtrp.tensors.rng import epoch_order


def tiny(num=20, channels=3, size=8, dtype=torch.uint8) -> Dataset:
    """Every image different: its class is its number, and so is its first pixel."""
    x = torch.randint(0, 256, (num, channels, size, size), dtype=torch.uint8)
    x[:, 0, 0, 0] = torch.arange(num)
    if dtype != torch.uint8:
        x = x.to(dtype) / 255
    y = torch.arange(num)
    return Dataset("tiny", x, y, x[:5], y[:5], num, None, *channel_stats(x), augment=True)


def epoch_of(data: Dataset, batch_size=8, *, seed=0, epoch=0, augment=False, **options):
    return list(
        batches(
            data.train_x, data.train_y, batch_size, dataset=data, seed=seed, epoch=epoch, augment=augment, **options
        )
    )


def same(first, second) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(first, second, strict=True)
    )


# -- Dataset --------------------------------------------------------------------------------------------


def test_properties_and_repr():
    data = tiny()
    assert (data.in_channels, data.image_size) == (3, 8)
    assert repr(data) == "Dataset('tiny', 20 train, 5 test, 20 classes, 3x8x8 uint8)"


def test_limit():
    data = tiny()
    part = data.limit(7, None)
    assert torch.equal(part.train_x, data.train_x[:7])
    assert torch.equal(part.train_y, data.train_y[:7])
    assert torch.equal(part.test_x, data.test_x)
    assert torch.equal(part.mean, data.mean)
    assert len(data.limit(1000, 2).train_x) == 20
    assert len(data.limit(1000, 2).test_y) == 2
    with pytest.raises(ValueError, match="train=0: pass a number of images of at least 1, or None for all"):
        data.limit(0, None)
    with pytest.raises(ValueError, match="test=-1: pass a number"):
        data.limit(None, -1)


def test_to():
    moved = tiny().to("cpu")
    assert {
        t.device.type for t in (moved.train_x, moved.train_y, moved.test_x, moved.test_y, moved.mean, moved.std)
    } == {"cpu"}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            {"train_x": torch.zeros(20, 3, 8, 9)},
            r"train_x has shape \(20, 3, 8, 9\); pass square images \(N, 3, H, H\)",
        ),
        ({"test_x": torch.zeros(5, 1, 8, 8)}, r"test_x has shape \(5, 1, 8, 8\)"),
        ({"train_x": torch.zeros(20, 3, 8, 8, dtype=torch.int64)}, r"train_x is torch.int64; pass uint8, or floats"),
        ({"train_y": torch.zeros(19, dtype=torch.int64)}, r"train_y has shape \(19,\) .* pass int64 of shape \(20,\)"),
        ({"test_y": torch.zeros(5)}, r"test_y has shape \(5,\) and is torch.float32"),
        ({"num_classes": 19}, r"train_y holds 0..19 but num_classes=19; pass classes in 0..18"),
        ({"class_names": ("a", "b")}, r"2 class_names but num_classes=20"),
    ],
)
def test_wrong_fields(change, match):
    data = tiny()
    with pytest.raises(ValueError, match=match):
        Dataset(**{**{field: getattr(data, field) for field in data.__dataclass_fields__}, **change})


def test_channel_stats_of_bytes_are_those_of_floats():
    x = torch.randint(0, 256, (50, 3, 6, 6), dtype=torch.uint8)
    scaled = x.double() / 255
    for mean, std in (channel_stats(x), channel_stats(scaled)):
        assert mean.dtype == std.dtype == torch.float32
        torch.testing.assert_close(mean, scaled.mean((0, 2, 3)).float(), rtol=1e-6, atol=0)
        torch.testing.assert_close(
            std, scaled.transpose(0, 1).flatten(1).std(1, correction=0).float(), rtol=1e-6, atol=0
        )


def test_a_constant_channel_is_not_divided_by_0():
    assert channel_stats(torch.full((4, 1, 2, 2), 51, dtype=torch.uint8)) == (torch.tensor([0.2]), torch.tensor([1.0]))


# -- names ----------------------------------------------------------------------------------------------


def test_unknown_name():
    assert list_data() == ["digits", "cifar10", "cifar100", "folder", "random", "text", "mnist", "fashion-mnist"]
    with pytest.raises(ValueError, match=r"unknown data 'cifar-10'; did you mean 'cifar10'\? known: digits, .*random"):
        load_data("cifar-10")
    with pytest.raises(ValueError, match=r"unknown data 'xyzzy'; known: digits"):
        load_data("xyzzy")


def test_data_dir_missing(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"data 'folder' needs files; pass data_dir \(--data-dir\)"):
        load_data("folder")
    monkeypatch.chdir(tmp_path)
    for name, archive in (("cifar10", "cifar-10-python.tar.gz"), ("cifar100", "cifar-100-python.tar.gz")):
        with pytest.raises(FileNotFoundError, match=rf"download {archive} .* as data_dir \(--data-dir\)"):
            load_data(name)


@pytest.mark.parametrize("name", ["digits", "random"])
def test_data_dir_not_wanted(name):
    with pytest.raises(ValueError, match=rf"data '{name}' reads no files, but data_dir='here'; leave data_dir"):
        load_data(name, "here")


def test_image_size():
    assert load_data("digits", image_size=8).image_size == 8
    with pytest.raises(ValueError, match="image_size=32 but the images of digits are 8x8; leave image_size out"):
        load_data("digits", image_size=32)
    with pytest.raises(ValueError, match="image_size=0: pass a whole number of at least 1"):
        load_data("random", image_size=0)


# -- digits and random ----------------------------------------------------------------------------------


def test_digits():
    data = load_data("digits")
    assert data.train_x.shape == (1438, 1, 8, 8)
    assert data.test_x.shape == (359, 1, 8, 8)
    assert (data.train_x.min(), data.train_x.max()) == (0, 1)
    assert data.class_names == tuple("0123456789")
    assert not data.augment
    train, test = data.train_y.bincount(), data.test_y.bincount()
    assert ((test / (train + test) - 0.2).abs() < 0.005).all()
    images = torch.cat([data.train_x, data.test_x]).flatten(1)
    assert len(images.unique(dim=0)) == 1797  # each image in one split


def test_digits_do_not_depend_on_the_seed():
    first, second = load_data("digits", seed=0), load_data("digits", seed=1)
    assert torch.equal(first.train_x, second.train_x)
    assert torch.equal(first.test_y, second.test_y)


@pytest.mark.parametrize("own_file", [True, False])
def test_digits_are_those_of_scikit_learn(monkeypatch, own_file):
    from sklearn.datasets import load_digits

    want = load_digits()
    if own_file:
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    else:  # a release that keeps it elsewhere
        monkeypatch.setattr(Path, "is_file", lambda path: False)
    data = load_data("digits")
    images = torch.cat([data.train_x, data.test_x]).flatten(1) * 16
    known = {tuple(image): digit for image, digit in zip(want.data.tolist(), want.target.tolist(), strict=True)}
    classes = torch.cat([data.train_y, data.test_y]).tolist()
    assert {tuple(image): digit for image, digit in zip(images.tolist(), classes, strict=True)} == known
    assert data.train_x[0].flatten().tolist() == (want.data[0] / 16).tolist()


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"data 'digits' needs scikit-learn, .* pip install 'dtrp\[cli\]'"):
        load_data("digits")


def test_random():
    data = load_data("random")
    assert data.train_x.shape == (2000, 3, 32, 32)
    assert data.test_x.shape == (500, 3, 32, 32)
    assert data.train_y.bincount().tolist() == [200] * 10
    assert torch.equal(data.train_x, load_data("random").train_x)
    assert not torch.equal(data.train_x, load_data("random", seed=1).train_x)
    assert load_data("random", image_size=5).test_x.shape == (500, 3, 5, 5)


def test_random_does_not_depend_on_the_default_dtype(float64):
    torch.set_default_dtype(torch.float32)
    data = load_data("random", image_size=8)
    torch.set_default_dtype(torch.float64)
    assert torch.equal(load_data("random", image_size=8).train_x, data.train_x)


def test_random_can_be_learnt():
    data = load_data("random")
    x = data.train_x.float().flatten(1)
    means = torch.stack([x[data.train_y == label].mean(0) for label in range(10)])
    nearest = torch.cdist(data.test_x.float().flatten(1), means).argmin(1)
    assert (nearest == data.test_y).float().mean() > 0.95


# -- batches --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("augment", [True, False])
def test_every_image_once_and_the_last_batch_partial(shuffle, augment):
    data = tiny(20)
    epoch = epoch_of(data, 8, shuffle=shuffle, augment=augment)
    assert [len(y) for _, y in epoch] == [8, 8, 4]
    assert [x.shape for x, _ in epoch] == [(n, 3, 8, 8) for n in (8, 8, 4)]
    order = torch.cat([y for _, y in epoch]).tolist()
    assert sorted(order) == list(range(20))
    assert (order == list(range(20))) == (not shuffle)


def test_images_stay_with_their_classes():
    data = tiny(20)
    for x, y in epoch_of(data):
        first = (x[:, 0, 0, 0] * data.std[0] + data.mean[0]) * 255
        torch.testing.assert_close(first, y.float(), rtol=0, atol=1e-3)


def test_a_batch_size_larger_than_the_data():
    assert [len(y) for _, y in epoch_of(tiny(3), 8)] == [3]


def test_seed_and_epoch_fix_the_batches():
    data = tiny()
    first = epoch_of(data, seed=3, epoch=2, augment=True)
    torch.rand(7)  # of the global generator
    assert same(first, epoch_of(data, seed=3, epoch=2, augment=True))
    assert not same(first, epoch_of(data, seed=3, epoch=1, augment=True))
    assert not same(first, epoch_of(data, seed=2, epoch=3, augment=True))


def test_crops_change_with_seed_and_epoch_without_shuffling():
    data = tiny()
    first = epoch_of(data, shuffle=False, augment=True)
    assert not same(first, epoch_of(data, shuffle=False, augment=True, epoch=1))
    assert not same(first, epoch_of(data, shuffle=False, augment=True, seed=1))


def test_an_epoch_does_not_depend_on_the_batch_size():
    data = tiny()
    for position in (0, 1):
        large, small = (torch.cat([b[position] for b in epoch_of(data, n, augment=True)]) for n in (20, 3))
        assert torch.equal(large, small)


def test_the_order_can_be_computed_again():
    data = tiny()
    order = epoch_order(20, seed=5, epoch=4)
    assert torch.equal(torch.cat([y for _, y in epoch_of(data, seed=5, epoch=4)]), order)
    assert not torch.equal(order, epoch_order(20, seed=5, epoch=5))
    assert not torch.equal(order, epoch_order(20, seed=6, epoch=4))


def test_global_generators_are_left_alone():
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    epoch_of(load_data("random", image_size=4), augment=True)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]


@pytest.mark.parametrize("name", ["digits", "random"])
def test_normalized(name):
    data = load_data(name)
    x = torch.cat([x for x, _ in epoch_of(data, 300, dtype=torch.float64)])
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(data.in_channels).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.ones(data.in_channels).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_normalization_from_its_equation(dtype):
    data = tiny(dtype=dtype)
    x, _ = epoch_of(data, 20, shuffle=False, dtype=torch.float64)[0]
    scaled = data.train_x.double() / (255 if dtype == torch.uint8 else 1)
    expected = (scaled - data.mean.double().view(1, 3, 1, 1)) / data.std.double().view(1, 3, 1, 1)
    torch.testing.assert_close(x, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype(dtype):
    data = tiny()
    x, y = epoch_of(data, dtype=dtype, augment=True)[0]
    assert x.dtype == dtype
    assert y.dtype == torch.int64
    if dtype == torch.bfloat16:
        assert torch.equal(x, epoch_of(data, augment=True)[0][0].bfloat16())


def test_the_data_is_not_written():
    data = tiny(dtype=torch.float32)
    before = data.train_x.clone()
    for x, _ in epoch_of(data, 20, shuffle=False, augment=True):
        x.zero_()
    assert torch.equal(data.train_x, before)


@pytest.mark.parametrize(("size", "pad"), [(1, 1), (8, 1), (17, 2), (32, 4), (40, 4)])
@pytest.mark.parametrize("channels", [1, 3])
def test_crops_and_flips_from_their_definition(size, pad, channels):
    """One image at a time: a frame of zeros around the normalized image, a window cut out of it, its mirror image."""
    data = tiny(30, channels, size)
    plain = torch.cat([x for x, _ in epoch_of(data, shuffle=False)])
    crops = draw_crops(30, size, seed=1, epoch=2)
    expected = []
    for i in range(30):
        framed = torch.zeros(channels, size + 2 * pad, size + 2 * pad)
        framed[:, pad : pad + size, pad : pad + size] = plain[i]
        top, left = int(crops.down[i]), int(crops.right[i])
        window = framed[:, top : top + size, left : left + size]
        expected.append(window.flip(2) if crops.flipped[i] else window)
    order = epoch_order(30, seed=1, epoch=2).tolist()
    got = torch.cat([x for x, _ in epoch_of(data, 8, seed=1, epoch=2, augment=True)])
    assert torch.equal(got, torch.stack([expected[i] for i in order]))


def test_crops_are_even():
    """Each of 9 x 9 places, mirrored or not, about equally often, and anew every epoch."""
    crops = draw_crops(16_200, 32, seed=0, epoch=0)
    cell = (crops.down * 9 + crops.right) * 2 + crops.flipped
    counts = cell.bincount(minlength=162)
    assert len(counts) == 162
    assert ((counts - 100).abs() < 50).all()  # 5 deviations
    assert padding(32) == 4
    again = draw_crops(16_200, 32, seed=0, epoch=1)
    assert (crops.down == again.down).float().mean() < 0.15


def test_batches_errors_come_at_the_call():
    data = tiny()
    options = {"dataset": data, "seed": 0, "epoch": 0, "augment": False}
    with pytest.raises(ValueError, match="batch_size=0: pass a whole number of at least 1"):
        batches(data.train_x, data.train_y, 0, **options)
    with pytest.raises(ValueError, match="x has 20 images but y has 5 classes"):
        batches(data.train_x, data.test_y, 8, **options)
    with pytest.raises(ValueError, match=r"dtype=torch.uint8: normalized images need a float"):
        batches(data.train_x, data.train_y, 8, dtype=torch.uint8, **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_the_same_batches_on_a_gpu(dtype):
    data = tiny(200, size=32, dtype=dtype)
    moved = [(x.cpu(), y.cpu()) for x, y in epoch_of(data.to("cuda"), augment=True)]
    assert same(moved, epoch_of(data, augment=True))


# -- CIFAR ----------------------------------------------------------------------------------------------

TRAIN = [f"data_batch_{i}" for i in range(1, 6)]
NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def rows(num: int, start: int = 0, num_classes: int = 10):
    data = np.random.default_rng(start).integers(0, 256, (num, 3072), dtype=np.uint8)
    return data, [(start + i) % num_classes for i in range(num)]


def dump(path: Path, content, protocol=2, as_bytes=True) -> None:
    if as_bytes:
        content = {key.encode(): value for key, value in content.items()}
    path.write_bytes(pickle.dumps(content, protocol=protocol))


def python2_pickle(data: np.ndarray, labels: list[int]) -> bytes:
    """What the official files hold: every string a Python 2 str, the array's module named as it was then."""

    def text(s: bytes) -> bytes:
        return b"U" + bytes([len(s)]) + s if len(s) < 256 else b"T" + struct.pack("<i", len(s)) + s

    def number(n: int) -> bytes:
        return b"J" + struct.pack("<i", n)

    state = b"(K\x03" + text(b"|") + b"NNN" + number(-1) + number(-1) + b"K\x00tb"
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R" + state
    empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
    shape = number(len(data)) + number(3072) + b"\x86"
    array = empty + b"(K\x01" + shape + dtype + b"\x89" + text(data.tobytes()) + b"tb"
    numbers = b"](" + b"".join(number(label) for label in labels) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + numbers + b"u."


def write_cifar10(folder: Path, **how) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, file in enumerate(TRAIN):
        data, labels = rows(4, i)
        dump(folder / file, {"data": data, "labels": labels}, **how)
    data, labels = rows(3, 5)
    dump(folder / "test_batch", {"data": data, "labels": labels}, **how)
    as_bytes = how.get("as_bytes", True)
    dump(folder / "batches.meta", {"label_names": [n.encode() if as_bytes else n for n in NAMES]}, **how)
    return folder


@pytest.fixture
def cifar10(tmp_path) -> Path:
    return write_cifar10(tmp_path / "cifar-10-batches-py")


def test_cifar10(cifar10):
    data = load_data("cifar10", cifar10.parent)
    expected, labels = zip(*(rows(4, i) for i in range(5)), strict=True)
    assert data.train_x.shape == (20, 3, 32, 32)
    assert data.train_x.dtype == torch.uint8
    assert torch.equal(data.train_x.flatten(1), torch.from_numpy(np.concatenate(expected)))
    assert data.train_y.tolist() == [label for part in labels for label in part]
    assert torch.equal(data.test_x[1, 2, 3, 4], torch.tensor(rows(3, 5)[0][1, 2 * 1024 + 3 * 32 + 4]))
    assert data.test_y.tolist() == rows(3, 5)[1]
    assert data.class_names == tuple(NAMES)
    assert data.augment
    assert torch.equal(data.mean, channel_stats(data.train_x)[0])


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("as_bytes", [True, False])
def test_cifar10_as_others_write_it(tmp_path, cifar10, protocol, as_bytes):
    other = write_cifar10(tmp_path / "other", protocol=protocol, as_bytes=as_bytes)
    first, second = load_data("cifar10", cifar10.parent), load_data("cifar10", str(other))
    assert torch.equal(first.train_x, second.train_x)
    assert torch.equal(first.test_y, second.test_y)
    assert first.class_names == second.class_names


def test_cifar10_as_python_2_wrote_it(cifar10):
    for i, file in enumerate(TRAIN):
        (cifar10 / file).write_bytes(python2_pickle(*rows(4, i)))
    data = load_data("cifar10", cifar10)
    assert torch.equal(data.train_x.flatten(1), torch.from_numpy(np.concatenate([rows(4, i)[0] for i in range(5)])))


def test_cifar100(tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for file, num in (("train", 120), ("test", 7)):
        data, labels = rows(num, 0, 100)
        dump(folder / file, {"data": data, "fine_labels": labels, "coarse_labels": [0] * num})
    dump(folder / "meta", {"fine_label_names": [f"thing {i}".encode() for i in range(100)], "coarse_label_names": []})
    data = load_data("cifar100", tmp_path)
    assert (len(data.train_x), len(data.test_x), data.num_classes) == (120, 7, 100)
    assert data.train_y[:100].tolist() == list(range(100))
    assert data.class_names[99] == "thing 99"
    assert torch.equal(load_data("cifar100", folder).train_x, data.train_x)


@pytest.mark.parametrize(("name", "folder"), [("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python")])
@pytest.mark.parametrize("exists", [True, False])
def test_cifar_not_there(tmp_path, name, folder, exists):
    place = tmp_path if exists else tmp_path / "nowhere"
    first = {"cifar10": "data_batch_1", "cifar100": "train"}[name]
    archive = {"cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz"}[name]
    match = (
        f"no file {re.escape(str(place / folder / first))}; download {archive} from the CIFAR page of the University of"
    )
    with pytest.raises(FileNotFoundError, match=match):
        load_data(name, place)


@pytest.mark.parametrize("file", [*TRAIN, "test_batch", "batches.meta"])
@pytest.mark.parametrize("inside", [True, False])
def test_cifar_file_missing(cifar10, file, inside):
    (cifar10 / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"no file {re.escape(str(cifar10 / file))}; download cifar-10-python"):
        load_data("cifar10", cifar10 if inside else cifar10.parent)


DATA, LABELS = rows(4)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (
            {"data": DATA[:, :3000], "labels": LABELS},
            r"'data' is uint8 of shape \(4, 3000\), and not uint8 of shape \(rows, 3072\)",
        ),
        ({"data": DATA.astype(np.int64), "labels": LABELS}, r"'data' is an array of type 'i8', and not uint8"),
        ({"data": DATA.astype(object), "labels": LABELS}, r"'data' is an array of type 'O8', and not uint8"),
        ({"data": DATA.reshape(4, 3, 32, 32), "labels": LABELS}, r"'data' is uint8 of shape \(4, 3, 32, 32\)"),
        ({"data": [1, 2], "labels": LABELS}, r"'data' is a list"),
        ({"data": DATA[:3], "labels": LABELS}, r"3 rows of 'data' but 4 'labels'"),
        ({"data": DATA[:0], "labels": []}, r"0 rows of 'data' but 0 'labels'"),
        ({"data": DATA, "labels": [0, 1, 2, 10]}, r"'labels' are 0..10, and not in 0..9"),
        ({"data": DATA, "labels": [0, -1, 2, 3]}, r"'labels' are -1..3, and not in 0..9"),
        ({"data": DATA, "labels": [0, 1, 2, 3.0]}, r"'labels' is not a list of whole numbers"),
        ({"data": DATA, "labels": "0123"}, r"'labels' is not a list of whole numbers"),
        ({"labels": LABELS}, r"has no 'data' among \[\"b'labels'\"\]; is it a CIFAR file\?"),
        ({"data": DATA, "fine_labels": LABELS}, r"has no 'labels' among"),
    ],
)
@pytest.mark.parametrize("file", ["data_batch_3", "test_batch"])
def test_cifar_wrong_content(cifar10, file, content, match):
    dump(cifar10 / file, content, protocol=4)
    with pytest.raises(ValueError, match=f"{re.escape(str(cifar10 / file))}: {match}"):
        load_data("cifar10", cifar10)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"label_names": NAMES[:9]}, "9 'label_names', and not 10; the file is damaged"),
        ({"label_names": list(range(10))}, "'label_names' is not a list of names"),
        ({}, r"has no 'label_names' among \[\]"),
    ],
)
def test_cifar_wrong_names(cifar10, content, match):
    dump(cifar10 / "batches.meta", content)
    with pytest.raises(ValueError, match=f"batches.meta: {match}"):
        load_data("cifar10", cifar10)


def test_cifar_not_a_dict(cifar10):
    (cifar10 / "test_batch").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(ValueError, match="test_batch: holds a list, and not a dict"):
        load_data("cifar10", cifar10)


@pytest.mark.parametrize("keep", [0, 1, 2, 8, 50, 0.5, -1])
@pytest.mark.parametrize("python2", [True, False])
def test_cifar_truncated(cifar10, keep, python2):
    path = cifar10 / "data_batch_2"
    whole = python2_pickle(*rows(4, 1)) if python2 else path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=r"data_batch_2: (cannot be read .*; the file is damaged|asks for \S+, which)"):
        load_data("cifar10", cifar10)


def test_cifar_damaged_bytes_are_refused_or_read(tmp_path):
    """Any one byte outside the pixels changed: a ValueError that names the file, or data of the right form."""
    path = tmp_path / "data_batch_1"
    whole = python2_pickle(*rows(1))
    for i in (i for i in range(len(whole)) if not 200 < i < len(whole) - 30):
        for bits in (0x01, 0x10, 0x80, 0xFF):
            path.write_bytes(whole[:i] + bytes([whole[i] ^ bits]) + whole[i + 1 :])
            try:
                x, y = _read_images(path, _LAYOUTS["cifar10"])
            except ValueError as error:
                assert str(error).startswith(str(path))  # noqa: PT017
            else:
                assert x.shape == (len(y), 3, 32, 32)


def test_cifar_html_in_place_of_a_file(cifar10):
    (cifar10 / "test_batch").write_text("<html>Not found</html>")
    with pytest.raises(ValueError, match="test_batch: cannot be read"):
        load_data("cifar10", cifar10)


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def payloads(marker: Path):
    code = f"open({str(marker)!r}, 'w').close()"
    return {
        "posix.system|nt.system": Calls(os.system, f'echo > "{marker}"'),
        "builtins.eval|__builtin__.eval": Calls(eval, code),
        "builtins.exec|__builtin__.exec": Calls(exec, code),
        "builtins.open|__builtin__.open|_?io.open": Calls(open, str(marker), "w"),
        "builtins.getattr|__builtin__.getattr": Calls(getattr, "", "join"),
        "numpy.load": Calls(np.load, "x"),
        "_codecs.decode": Calls(__import__("_codecs").decode, b"x", "latin1"),
        r"numpy\._?core\.multiarray\.scalar": np.int64(3),
    }


def test_the_payloads_do_run_where_nothing_refuses_them(tmp_path):
    pickle.loads(pickle.dumps(payloads(tmp_path / "ran")["builtins.exec|__builtin__.exec"]))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("which", range(8))
@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("where", ["alone", "data", "labels", "key", "meta", "test"])
def test_cifar_payload_refused(cifar10, tmp_path, which, protocol, where):
    marker = tmp_path / "ran"
    forbidden, payload = list(payloads(marker).items())[which]
    file, content = {
        "alone": ("data_batch_1", payload),
        "data": ("data_batch_1", {b"data": payload, b"labels": LABELS}),
        "labels": ("data_batch_1", {b"data": DATA, b"labels": [0, 1, 2, payload]}),
        "key": ("data_batch_1", {b"data": DATA, b"labels": LABELS, (1, payload): 1}),
        "meta": ("batches.meta", {b"label_names": [payload]}),
        "test": ("test_batch", {b"data": DATA, b"labels": payload}),
    }[where]
    (cifar10 / file).write_bytes(pickle.dumps(content, protocol=protocol))
    with pytest.raises(
        ValueError, match=f"{file}: asks for ({forbidden}), which no CIFAR file needs; refused, and nothing"
    ):
        load_data("cifar10", cifar10)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("code", "match"),
    [
        (b"cnumpy\nndarray.__class__\n.", r"asks for numpy\.ndarray\.__class__"),
        (b"\x80\x04\x8c\x05numpy\x8c\x12lib._datasource.os\x93.", r"asks for numpy\.lib\._datasource\.os"),
        (b"cos\nsystem\n(S'true'\ntR.", r"asks for os\.system"),
        (b"((S'true'\nios\nsystem\n.", r"asks for os\.system"),
        (b"(cnumpy\nload\nS'x'\no.", r"asks for numpy\.load"),
        (b"\x80\x02cnumpy\nfromfile\n)\x81.", r"asks for numpy\.fromfile"),
        # What is let through calls nothing but stand-ins.
        (b"cnumpy\nndarray\n(K\x05tR.", r"cannot be read \(TypeError"),
        (b"c_codecs\nencode\n(Vab\nVrot13\ntR.", r"cannot be read \(ValueError: bytes of another encoding than latin1"),
        (b"cnumpy\ndtype\n(VO\ntR.", r"holds a _NumberType, and not a dict"),
        (b"cnumpy.core.multiarray\n_reconstruct\n(I1\n(I9999999999\ntVO\ntR.", r"holds a _Array, and not a dict"),
        (b"Ppersistent\n.", r"cannot be read \(UnpicklingError"),
        (b"\x80\x02\x82\x01.", r"cannot be read \(KeyError: 130\)"),  # the extension registry
        (b"\x80\x05\x96" + b"\xff" * 7 + b"\x00.", r"cannot be read \(KeyError: 150\)"),  # a bytearray without end
    ],
)
def test_cifar_forged_pickle(cifar10, code, match):
    (cifar10 / "data_batch_1").write_bytes(code)
    with pytest.raises(ValueError, match=f"data_batch_1: {match}"):
        load_data("cifar10", cifar10)


@pytest.mark.parametrize("what", ["_codecs\nencode", "numpy\ndtype", "numpy.core.multiarray\n_reconstruct"])
def test_cifar_pickle_cannot_change_the_reader(cifar10, what):
    """BUILD writes attributes of what a name stands for; the next file does not see it."""
    path = cifar10 / "data_batch_1"
    whole = path.read_bytes()
    path.write_bytes(b"c" + what.encode() + b"\n(N(V__init__\nNV__defaults__\nNdtb.")
    with pytest.raises(ValueError, match=r"data_batch_1: "):
        load_data("cifar10", cifar10)
    path.write_bytes(whole)
    assert len(load_data("cifar10", cifar10).train_x) == 20


def test_cifar_by_column(cifar10):
    data, labels = rows(4)
    dump(cifar10 / "data_batch_1", {"data": np.asfortranarray(data), "labels": labels})
    assert torch.equal(load_data("cifar10", cifar10).train_x[:4].flatten(1), torch.from_numpy(data))


@pytest.mark.parametrize("state", [(1, (4, 3072)), (1, (9, 3072), DATA.dtype, False, DATA.tobytes()), 3])
def test_cifar_forged_array(cifar10, state):
    """A state that NumPy would not write: cut off, of another shape than its bytes, of another kind."""

    class Forged:
        def __reduce__(self):
            return (*np.zeros(0, np.uint8).__reduce__()[:2], state)

    dump(cifar10 / "data_batch_1", {"data": Forged(), "labels": LABELS}, protocol=4)
    with pytest.raises(
        ValueError, match=r"data_batch_1: 'data' is (an unfinished array|uint8 of shape \(9, 3072\) but 12288)"
    ):
        load_data("cifar10", cifar10)


def test_cifar_without_numpy(cifar10, monkeypatch):
    monkeypatch.setitem(sys.modules, "numpy", None)
    assert len(load_data("cifar10", cifar10).train_x) == 20


# -- folder ---------------------------------------------------------------------------------------------


def paint(path: Path, colour, size=(40, 40), mode="RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


@pytest.fixture
def images(tmp_path) -> Path:
    """2 classes; red 200 + i and blue 100 + i, so that each image says which it is."""
    for split, num in (("train", 4), ("test", 2)):
        for i in range(num):
            paint(tmp_path / split / "red" / f"{i}.png", (200 + i, 0, 0))
            paint(tmp_path / split / "blue" / f"{i}.PNG", (0, 0, 100 + i))
    return tmp_path


@pytest.mark.parametrize("test_name", ["test", "val"])
def test_folder(images, test_name):
    (images / "test").rename(images / test_name)
    data = load_data("folder", images)
    assert data.class_names == ("blue", "red")
    assert data.train_x.shape == (8, 3, 32, 32)
    assert data.train_y.tolist() == [0, 1] * 4  # the classes in turn
    assert data.train_x[:, :, 5, 7].tolist() == [c for i in range(4) for c in ([0, 0, 100 + i], [200 + i, 0, 0])]
    assert data.test_y.tolist() == [0, 1] * 2
    assert data.augment
    assert torch.equal(load_data("folder", images, seed=1).train_x, data.train_x)


def test_folder_image_size_and_modes(images):
    paint(images / "train" / "red" / "grey.jpg", 77, mode="L")
    paint(images / "train" / "red" / "see-through.png", (1, 2, 3, 4), mode="RGBA")
    data = load_data("folder", images, image_size=12)
    assert data.train_x.shape == (10, 3, 12, 12)
    assert data.train_x[-2:, :, 0, 0].tolist() == [[77, 77, 77], [251, 251, 251]]


@pytest.mark.parametrize(("width", "height"), [(60, 20), (20, 60)])
def test_folder_cuts_the_middle_square(images, width, height):
    """Blue sides, a green square in the middle of the long edge: only green is left."""
    image = Image.new("RGB", (width, height), (0, 0, 255))
    image.paste((0, 255, 0), ((width - 20) // 2, (height - 20) // 2, (width + 20) // 2, (height + 20) // 2))
    image.save(images / "test" / "red" / "z.png")
    x = load_data("folder", images, image_size=20).test_x[-1]
    assert (x == torch.tensor([0, 255, 0], dtype=torch.uint8).view(3, 1, 1)).all()


def test_folder_orientation(images):
    """Rows are rows: a bright top, a bright left half."""
    image = Image.new("RGB", (32, 32))
    image.paste((255, 0, 0), (0, 0, 32, 16))
    image.paste((255, 255, 0), (0, 0, 16, 16))
    image.save(images / "test" / "red" / "z.png")
    x = load_data("folder", images).test_x[-1]
    assert x[:, 3, 20].tolist() == [255, 0, 0]
    assert x[:, 3, 5].tolist() == [255, 255, 0]
    assert x[:, 20, 3].tolist() == [0, 0, 0]


def png(mode: int, bits: int, pixels: np.ndarray) -> bytes:
    """A PNG (H, W, C) of 16 bits, which Pillow writes in grey alone."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.tobytes() for row in pixels.astype(f">u{bits // 8}"))
    header = struct.pack(">IIBBBBB", width, height, bits, mode, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


RAMP = np.tile(np.linspace(0, 65535, 32).round().astype(np.uint16), (32, 1))  # 32 levels, from left to right
GREY = (RAMP / 257).round().astype(np.uint8)
COLOURS = np.stack([GREY, GREY[:, ::-1], np.zeros_like(GREY)], -1)
HALF = np.full_like(GREY, 128)


def on_white(colours: np.ndarray, alpha: int) -> np.ndarray:
    return (colours * (alpha / 255) + 255 - alpha).round()


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the first row is on the right
    return exif


KINDS: dict[str, tuple[Callable[[Path], Any], np.ndarray, int]] = {  # how it is written, what it shows, and how nearly
    "grey.png": (lambda path: Image.fromarray(GREY).save(path), GREY, 0),
    "16 bits.png": (lambda path: Image.fromarray(RAMP).save(path), GREY, 0),
    "16 bits.tif": (lambda path: Image.fromarray(RAMP).save(path), GREY, 0),
    "16 bits, the high byte first.tif": (
        lambda path: Image.frombytes("I;16B", (32, 32), RAMP.astype(">u2").tobytes()).save(path), GREY, 0
    ),
    "16 bits.pgm": (lambda path: Image.fromarray(RAMP).save(path), GREY, 0),
    "16 bits, coloured.png": (lambda path: path.write_bytes(png(2, 16, np.stack([RAMP] * 3, -1))), GREY, 1),
    "16 bits, opaque.png": (lambda path: path.write_bytes(png(4, 16, np.stack([RAMP, 0 * RAMP + 65535], -1))), GREY, 1),
    "floats.tif": (lambda path: Image.fromarray((RAMP / 65535).astype(np.float32)).save(path), GREY, 0),
    "one bit.png": (lambda path: Image.fromarray(GREY > 127).save(path), (GREY > 127) * 255, 0),
    "palette.gif": (lambda path: Image.fromarray(GREY).convert("P").save(path), GREY, 0),
    "palette, one colour transparent.png": (
        lambda path: Image.fromarray(GREY).convert("P").save(path, transparency=0), np.where(GREY == 0, 255, GREY), 0
    ),
    "grey, half transparent.png": (
        lambda path: Image.fromarray(np.stack([GREY, HALF], -1)).save(path), on_white(GREY, 128), 1
    ),
    "half transparent.png": (
        lambda path: Image.fromarray(np.dstack([COLOURS, HALF])).save(path), on_white(COLOURS, 128), 1
    ),
    "not at all transparent.webp": (
        lambda path: Image.fromarray(np.dstack([COLOURS, 0 * GREY + 255])).save(path, lossless=True), COLOURS, 0
    ),
    "for printing.jpg": (
        lambda path: Image.fromarray(COLOURS).convert("CMYK").save(path, quality=100, subsampling=0), COLOURS, 6
    ),
    "for printing.tif": (lambda path: Image.fromarray(COLOURS).convert("CMYK").save(path), COLOURS, 0),
    "luminance.tif": (lambda path: Image.fromarray(COLOURS).convert("YCbCr").save(path), COLOURS, 3),
    "turned.jpg": (lambda path: Image.fromarray(GREY).save(path, exif=turned(), quality=100), GREY.T, 3),
    "turned.png": (lambda path: Image.fromarray(COLOURS).save(path, exif=turned()), np.rot90(COLOURS, -1), 0),
    "turned.tif": (lambda path: Image.fromarray(COLOURS).save(path, exif=turned()), np.rot90(COLOURS, -1), 0),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_folder_reads_images_as_they_are(images, name):
    write, shows, tolerance = KINDS[name]
    write(images / "test" / "red" / name)
    paint(images / "test" / "red" / "zzz.png", 0)
    x = load_data("folder", images).test_x[-2]
    expected = np.broadcast_to(shows[..., None] if shows.ndim == 2 else shows, (32, 32, 3)).transpose(2, 0, 1)
    difference = (x.int() - torch.tensor(expected.astype(np.int32))).abs().max()
    assert difference <= tolerance


@pytest.mark.parametrize(
    ("name", "pixels", "match"),
    [
        ("32 bits.tif", RAMP.astype(np.int32) * 30000, "numbers of 32 bits, or with a sign, have no known range"),
        ("floats.tif", RAMP.astype(np.float32), r"floats from 0 to 65535, and those of an image are in 0\.\.1"),
        ("below.tif", RAMP.astype(np.float32) / 65535 - 0.5, r"floats from -0\.5 to 0\.5"),
        ("nan.tif", RAMP.astype(np.float32) * np.nan, "floats from nan to nan"),
    ],
)
def test_folder_refuses_numbers_of_no_known_range(images, name, pixels, match):
    Image.fromarray(pixels).save(images / "train" / "red" / name)
    with pytest.raises(ValueError, match=rf"{name} cannot be read as an image .*{match}"):
        load_data("folder", images)


def test_folder_names_what_it_does_not_read(images):
    red = images / "train" / "red"
    for name in ("notes.txt", "a.heic", "b.heic", "c.heic", "._0.png", "sub/deep/1.png", "sub/2.png"):
        (red / name).parent.mkdir(parents=True, exist_ok=True)
        (red / name).write_bytes((red / "0.png").read_bytes())
    (images / "train" / ".cache").mkdir()
    (images / "train" / "lost.jpg").touch()
    paint(images / "val" / "red" / "0.png", 0)
    (images / "elsewhere").mkdir()
    (images / "elsewhere" / "0.png").symlink_to(red / "0.png")
    (images / "train" / "red" / "gone.png").symlink_to("nowhere")
    with pytest.warns(UserWarning, match="12 images are read") as told:
        data = load_data("folder", images)
    assert len(data.train_x) == 8
    (message,) = [str(warning.message) for warning in told]
    assert message == (
        f"{images}: 12 images are read; not read: 2 hidden (train/.cache, train/red/._0.png); "
        "5 in no class's own folder (elsewhere/0.png, train/lost.jpg, train/red/sub/2.png, ...); "
        "1 no files (train/red/gone.png); 4 with another ending (train/red/a.heic, train/red/b.heic, train/red/c.heic, ...)"
    )


def test_folder_with_images_in_folders_of_classes_alone(images):
    paint(images / "train" / "green" / "monday" / "1.png", 0)
    (images / "train" / "green" / "a.heic").touch()
    with pytest.raises(
        ValueError,
        match=r"green has no images \(.*\), but 1 in no class's own folder \(monday/1.png\); 1 with .* \(a.heic\); add some",
    ):
        load_data("folder", images)


def test_folder_by_links_is_read_whole(tmp_path_factory, images):
    linked = tmp_path_factory.mktemp("linked")
    for split in ("train", "test"):
        (linked / split).symlink_to(images / split)
    assert torch.equal(load_data("folder", linked).train_x, load_data("folder", images).train_x)


def test_folder_without_splits_is_split_by_seed(tmp_path):
    for name, num in (("a", 10), ("b", 23), ("c", 2)):
        for i in range(num):
            paint(tmp_path / name / f"{i:02}.png", (i, "abc".index(name), 0))
    data = load_data("folder", tmp_path)
    assert data.train_y.bincount().tolist() == [8, 18, 1]
    assert data.test_y.bincount().tolist() == [2, 5, 1]
    all_x = torch.cat([data.train_x, data.test_x])[:, :2, 0, 0]
    assert len(all_x.unique(dim=0)) == 35  # each image in one split
    assert torch.equal(all_x[:, 1], torch.cat([data.train_y, data.test_y]).to(torch.uint8))
    assert torch.equal(load_data("folder", tmp_path).test_x, data.test_x)
    assert not torch.equal(load_data("folder", tmp_path, seed=1).test_x, data.test_x)


def test_folder_errors(tmp_path_factory, images):
    tmp_path = tmp_path_factory.mktemp("others")

    def fails(match, place=images, error=ValueError):
        with pytest.raises(error, match=match):
            load_data("folder", place)

    fails("no folder .*nowhere; pass data_dir", tmp_path / "nowhere", FileNotFoundError)
    (tmp_path / "empty").mkdir()
    fails("empty has no folders, one per class", tmp_path / "empty")
    paint(tmp_path / "single" / "a" / "1.png", 0)
    fails("a has 1 image, and training and test need one each", tmp_path / "single")
    (images / "test" / "green").mkdir()
    fails(r"green has no images \(.png, .*\); add some, or remove the folder")
    paint(images / "test" / "green" / "1.png", (0, 255, 0))
    fails("test has class 'green', which .*train has not")
    (images / "test" / "green" / "1.png").unlink()
    (images / "test" / "green").rmdir()
    whole = (images / "train" / "red" / "2.png").read_bytes()
    for damaged in (b"", b"no image", whole[:60]):
        (images / "train" / "red" / "2.png").write_bytes(damaged)
        fails(r"2\.png cannot be read as an image \(.*\); replace or remove it")


@pytest.mark.parametrize(("gone", "match"), [("test", "has train but no test"), ("train", "has test but no train")])
def test_folder_with_one_split(images, gone, match):
    (images / gone).rename(images.parent / f"{images.name}-{gone}")
    with pytest.raises(ValueError, match=match):
        load_data("folder", images)


def test_folder_without_pillow(images, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match=r"data 'folder' needs Pillow, .* pip install 'dtrp\[cli\]'"):
        load_data("folder", images)
