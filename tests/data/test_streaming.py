"""Images of a folder that are decoded when they are needed: the same batches whoever decodes them, and no silent gaps."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from image_folders import CLASSES, damage, write_images
from PIL import Image

from dtrp.atomic_file import whole_file
from dtrp.data import DataError, InMemory, Part, Source, StreamedImages, load_data, stream_folder
from dtrp.data.streaming.decoding import Decoder, Request, middle, random_part
from dtrp.data.streaming.listing import Listing, list_folder, read_listing, write_listing
from dtrp.data.streaming.streamed import Counts
from dtrp.tensors.rng import epoch_order

STATS = ([0.5, 0.5, 0.5], [0.25, 0.25, 0.25])
BATCH = 8


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def own(images: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(images, tmp_path / "own"))


def opened(folder: Path, num_workers: int = 0, **options: Any) -> StreamedImages:
    chosen = {"seed": 3, "augment": True, "dtype": torch.float32, "image_size": 16, "stats": STATS, **options}
    source = stream_folder(folder, num_workers=num_workers, **chosen)
    assert source is not None
    return source


def same(first: list[Any], second: list[Any]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(first, second, strict=True)
    )


# -- batches --------------------------------------------------------------------------------------------


def test_batches_do_not_depend_on_who_decodes(images: Path) -> None:
    alone = opened(images)
    expected = [list(alone.train_batches(BATCH, epoch=e)) for e in range(3)] + [list(alone.test_batches())]
    assert not same(expected[0], expected[1]), "epochs differ"
    for num_workers in (1, 3):
        source = opened(images, num_workers)
        found = [list(source.train_batches(BATCH, epoch=e)) for e in (0, 1, 2)] + [list(source.test_batches())]
        source.close()
        assert all(map(same, expected, found))
    assert [len(y) for _, y in expected[0]] == [8, 8, 8, 8, 1]
    assert {x.dtype for x, _ in expected[0]} == {torch.float32}
    assert all(x.is_contiguous() for x, _ in expected[0])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_goes_on_at_any_minibatch(images: Path, num_workers: int) -> None:
    source = opened(images, num_workers)
    whole = list(source.train_batches(BATCH, epoch=1))
    for start in (*range(0, 33, BATCH), 33):
        begun = source.train_batches(BATCH, epoch=0)  # which is left
        next(begun)
        assert same(list(source.train_batches(BATCH, epoch=1, start=start)), whole[-(-start // BATCH) :])
    with pytest.raises(ValueError, match="start=3 with 33 images in batches of 8: pass a multiple of batch_size"):
        source.train_batches(BATCH, epoch=1, start=3)
    source.close()


def test_large_batches_are_decoded_in_parts(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(opened(images).train_batches(BATCH, epoch=0))
    monkeypatch.setattr("dtrp.data.streaming.streamed._REQUEST_BYTES", 3 * 16 * 16 * 3)
    assert same(list(opened(images).train_batches(BATCH, epoch=0)), whole)


def test_batches_are_those_of_a_plain_loop(images: Path) -> None:
    """Decoded, cropped, resized, mirrored and normalized here, image by image, in float64."""
    source = opened(images, dtype=torch.float64)
    files = [path for i in range(11) for path in (images / "train" / name / f"{i:02}.jpg" for name in CLASSES)]
    decoder = Decoder(list_folder(images).splits(3), 16, 3, skip_damaged=False)
    order = epoch_order(33, seed=3, epoch=2)
    (x, y), *_ = source.train_batches(33, epoch=2)
    assert y.tolist() == (order % 3).tolist()
    for row, index in enumerate(order.tolist()):
        (pixels,), _, _ = decoder[Request(0, 2, True, (index,))]
        draws = random.Random(int.from_bytes(key_of(f"crop/3/2/{index}"), "little"))
        with Image.open(files[index]) as image:
            box = random_part(*image.size, draws)
            small = image.convert("RGB").resize((16, 16), Image.Resampling.BILINEAR, box)
        if draws.random() < 0.5:
            small = small.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        plain = torch.tensor(list(small.tobytes()), dtype=torch.uint8).view(16, 16, 3)
        assert torch.equal(pixels, plain)
        assert torch.allclose(x[row], (plain.permute(2, 0, 1).double() / 255 - 0.5) / 0.25, rtol=0, atol=1e-14)


def key_of(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def test_the_test_split_is_resized_and_its_middle_counts(tmp_path: Path) -> None:
    """A white square with a black frame of a sixteenth of the shorter side: no black is left, and all of the white."""
    folder = write_images(tmp_path / "images")
    image = Image.new("RGB", (192, 128))
    image.paste((255, 255, 255), (32 + 8, 8, 160 - 8, 120))
    image.save(folder / "test" / "ant" / "00.jpg", quality=100)
    ((x, y),) = opened(folder, image_size=112, stats=([0.0] * 3, [1.0] * 3)).test_batches()
    assert y[0] == 0
    assert float(x[0, :, 2:-2, 2:-2].min()) > 0.95
    assert middle(192, 128) == (40, 8, 152, 120)
    unaugmented = opened(folder, augment=False)
    assert same([unaugmented.example(0)], [unaugmented.example(0)])


def test_random_parts_keep_their_bounds_and_spread() -> None:
    draws = random.Random(1)
    shares, ratios = [], []
    for _ in range(2000):
        left, upper, right, lower = random_part(200, 150, draws)
        assert 0 <= left < right <= 200
        assert 0 <= upper < lower <= 150
        shares.append((right - left) * (lower - upper) / 30000)
        ratios.append((right - left) / (lower - upper))
    assert 0.075 < min(shares) < 0.1
    assert max(shares) > 0.95
    assert 0.73 < min(ratios) < 0.76
    assert 1.31 < max(ratios) < 1.36
    assert random_part(1000, 1, draws)[3] == 1, "a part of an image of one row"
    assert random_part(1, 1, draws) == (0, 0, 1, 1)


def test_limits_are_the_first_images_of_all_classes(images: Path) -> None:
    source = opened(images, limits=(7, 2))
    assert (source.num_train, source.num_test, source.num_classes) == (7, 2, 3)
    labels = torch.cat([y for _, y in source.train_batches(BATCH, epoch=0)])
    assert Counter(labels.tolist()) == {0: 3, 1: 2, 2: 2}


def of_training(source: Source, part: Part) -> list[Any]:
    return list(source.train_batches(BATCH, epoch=1, start=BATCH, part=part))


def of_test(source: Source, part: Part) -> list[Any]:
    return list(source.test_batches(part=part))


# -- ranks ----------------------------------------------------------------------------------------------


def test_ranks_have_what_they_need_of_the_same_batches(images: Path) -> None:
    first = opened(images)
    counts = Counts.of(list_folder(images).splits(3))
    told = stream_folder(
        Path("/nowhere"), seed=3, dtype=torch.float32, image_size=16, augment=True, reads=False, share=lambda *_: counts
    )
    assert told is not None
    assert (told.num_train, told.num_test, told.sample_shape) == (33, 12, (3, 16, 16))
    assert same([told.example(5)], [first.example(5)])
    for batches, part in ((of_training, Part(False, True)), (of_test, Part(False, True))):
        whole, labels = batches(first, Part()), batches(told, part)
        assert all(x is None for x, _ in labels)
        assert all(torch.equal(y, z) for (_, y), (_, z) in zip(whole, labels, strict=True))
        assert batches(told, Part(False, False)) == [(None, None)] * len(whole)


@pytest.mark.parametrize("streamed", [False, True])
def test_replicas_share_minibatches_and_the_test(images: Path, streamed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtrp.data.streaming.streamed._TEST_BATCH", 5)
    monkeypatch.setattr("dtrp.data.source._TEST_BATCH", 5)
    source: Source = (
        opened(images)
        if streamed
        else InMemory(load_data("folder", images, image_size=16), seed=3, augment=True, dtype=torch.float32)
    )
    whole = of_training(source, Part()), of_test(source, Part())
    of_both = [[kind(source, Part(replica=r, num_replicas=2)) for r in range(2)] for kind in (of_training, of_test)]
    joined = [
        (torch.cat([a, c]), torch.cat([b, d])) for (a, b), (c, d) in zip(*of_both[0], strict=False) if len(a)
    ]  # the last mini-batch has one sample
    assert same(joined, whole[0][: len(joined)])
    assert same([of_both[1][0][0], of_both[1][1][0], of_both[1][0][1]], whole[1])


# -- what was measured ----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_mean_and_deviation_are_measured_on_the_training_images(images: Path, num_workers: int) -> None:
    """As all are in the sample, the normalized images have mean 0 and deviation 1."""
    source = opened(images, num_workers, stats=None, dtype=torch.float64, augment=False)
    x = torch.cat([x for x, _ in source.train_batches(BATCH, epoch=0)])
    source.close()
    assert x.mean((0, 2, 3)).abs().max() < 1e-6
    assert (x.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-6


# -- damage ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_file_is_named_before_its_minibatch(own: Path, num_workers: int) -> None:
    damage(own / "train" / "bee" / "04.jpg")  # index 3 * 4 + 1
    number = epoch_order(33, seed=3, epoch=0).tolist().index(13) // BATCH
    assert number > 0
    source = opened(own, num_workers)
    batches = source.train_batches(BATCH, epoch=0)
    before = [next(batches) for _ in range(number)]
    assert [len(x) for x, _ in before] == [BATCH] * number
    with pytest.raises(
        DataError,
        match=r"bee/04.jpg cannot be read .*OSError: image file is trunc.*; replace or remove it, or pass --sk",
    ):
        next(batches)
    source.close()
    with pytest.raises(DataError, match=r"bee/04.jpg cannot be read"):
        opened(own, num_workers, stats=None)


def test_a_damaged_file_gives_its_place_to_another_of_its_class(images: Path, own: Path) -> None:
    damage(own / "train" / "bee" / "04.jpg")
    (own / "train" / "cat" / "00.jpg").write_text("no image")
    whole = [list(opened(images).train_batches(BATCH, epoch=e)) for e in (0, 1)]
    skipping = []
    for num_workers in (0, 3):
        source = opened(own, num_workers, skip_damaged=True)
        skipping.append([list(source.train_batches(BATCH, epoch=e)) for e in (0, 1)])
        source.close()
        assert sorted(text.split(" cannot")[0][-10:] for text in source.damaged) == ["bee/04.jpg", "cat/00.jpg"]
    for epoch in (0, 1):
        assert same(skipping[0][epoch], skipping[1][epoch])
        order = epoch_order(33, seed=3, epoch=epoch).split(BATCH)
        for indices, (x, y), (z, w) in zip(order, whole[epoch], skipping[0][epoch], strict=True):
            assert torch.equal(y, w), "labels stay, which the last rank alone reads"
            differ = {int(i) for i, a, b in zip(indices, x, z, strict=True) if not torch.equal(a, b)}
            assert differ == {13, 2} & set(indices.tolist())


def test_a_class_that_is_damaged_as_a_whole_is_named(own: Path) -> None:
    for path in (own / "train" / "ant").iterdir():
        damage(path)
    with pytest.raises(
        DataError, match=r"no image of the class of .*ant/\d\d.jpg can be read; .*ant/.* cannot be read"
    ):
        list(opened(own, skip_damaged=True).train_batches(BATCH, epoch=0))


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("number", "match"),
    [
        (signal.SIGKILL, r"loader worker 1 \(process \d+\) was killed by SIGKILL; is the memory short\? pass fewer"),
        (signal.SIGBUS, r"loader worker 1 \(process \d+\) was killed by SIGBUS; is there room in shared memory"),
    ],
)
def test_a_dead_worker_is_named(images: Path, number: int, match: str) -> None:
    before = signal.getsignal(signal.SIGCHLD)
    source = opened(images, 2)
    assert source._workers is not None
    batches = source.train_batches(1, epoch=0)
    next(batches)
    os.kill(source._workers._processes[1].pid or 0, number)
    began = time.monotonic()
    with pytest.raises(DataError, match=match):
        list(batches)
    assert time.monotonic() - began < 20
    assert signal.getsignal(signal.SIGCHLD) == before
    source.close()


def test_workers_go_on_when_a_terminal_or_a_launcher_ends_all_processes(images: Path) -> None:
    """So that the run can save; and they end with it."""
    source = opened(images, 1)
    assert source._workers is not None
    (worker,) = source._workers._processes
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(worker.pid or 0, number)
    assert len(list(source.train_batches(BATCH, epoch=0))) == 5
    half_way = source.train_batches(1, epoch=0)
    next(half_way)
    source.close()
    assert not worker.is_alive()


# -- listing --------------------------------------------------------------------------------------------


def same_listing(a: Listing, b: Listing) -> bool:
    return all(getattr(a, name) == getattr(b, name) for name in vars(a))


def test_a_listing_is_kept_and_comes_back(images: Path, tmp_path: Path) -> None:
    file = tmp_path / "listing"
    source = opened(images, file=file, stats=None)
    source.keep(file)
    written = file.read_bytes()
    known, why = read_listing(file, images)
    assert why == ""
    assert known is not None
    assert same_listing(list_folder(images).with_stats(*stats_of(known)), known)
    again = opened(images, file=file, stats=None)
    again.keep(file)
    assert file.read_bytes() == written
    assert same(list(again.train_batches(BATCH, epoch=0)), list(source.train_batches(BATCH, epoch=0)))
    other = opened(images, file=file, stats=None, image_size=8)
    other.keep(file)
    assert len(json.loads(file.read_bytes().split(b"\n")[1])["stats"]) == 2


def stats_of(listing: Listing) -> tuple[str, torch.Tensor, torch.Tensor]:
    ((key, (mean, std)),) = listing.stats.items()
    return key, torch.tensor(mean), torch.tensor(std)


def test_what_was_measured_is_not_measured_again(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "listing"
    opened(images, file=file, stats=None).keep(file)
    monkeypatch.setattr("dtrp.data.streaming.workers.Workers.decode", lambda *_: pytest.fail("something is decoded"))
    opened(images, file=file, stats=None)


def test_names_of_any_bytes(tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    for name in (b"\xff.jpg", "ä\n'.jpg".encode()):
        shutil.copy(tmp_path / "images/train/ant/00.jpg", os.fsencode(tmp_path / "images/train/ant") + b"/" + name)
    listing = list_folder(tmp_path / "images")
    write_listing(listing, tmp_path / "listing")
    known, _ = read_listing(tmp_path / "listing", tmp_path / "images")
    assert known is not None
    assert same_listing(known, listing)
    assert all(os.path.exists(known.path(i)) for i in range(len(known)))
    assert len(known) == 47


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "train" / "ant" / "00.jpg").unlink(),
        lambda folder: (folder / "train" / "ant" / "00.jpg").rename(folder / "train" / "ant" / "99.jpg"),
        lambda folder: (folder / "test" / "bee" / "notes.txt").touch(),
        lambda folder: (folder / "train" / "dog").mkdir(),
        lambda folder: shutil.rmtree(folder / "test"),
    ],
)
def test_a_changed_folder_is_listed_anew(own: Path, tmp_path: Path, change: Any) -> None:
    write_listing(list_folder(own), tmp_path / "listing")
    change(own)
    known, why = read_listing(tmp_path / "listing", own)
    assert known is None
    assert why == f"{own} has changed since it was listed; it is listed anew"


def test_a_damaged_listing_is_made_again_and_another_file_is_left_alone(images: Path, tmp_path: Path) -> None:
    file = tmp_path / "listing"
    write_listing(list_folder(images), file)
    whole = file.read_bytes()
    for damaged in (
        whole[:-1],
        whole[:40],
        whole[:-9] + b"x" + whole[-8:],
        b"dtrp listing 1\n",
        b"dtrp listing 1\n[]\n",
    ):
        file.write_bytes(damaged)
        source = opened(images, file=file)
        assert source.notes[0].startswith(f"{file} is damaged (")
        source.keep(file)
        assert file.read_bytes() == whole
    assert read_listing(file, images / "train")[1] == f"{file} lists {images}; {images / 'train'} is listed anew"
    file.write_text("my notes")
    with pytest.raises(ValueError, match="is no listing of images; choose another name for --listing"):
        opened(images, file=file)
    with pytest.raises(ValueError, match="is there and is no listing of images; choose another name"):
        opened(images).keep(file)
    assert file.read_text() == "my notes"
    pipe = tmp_path / "pipe"  # as any device
    os.mkfifo(pipe)
    with pytest.raises(ValueError, match="pipe is no listing of images"):
        opened(images, file=pipe)
    with pytest.raises(ValueError, match="pipe is there and is no listing of images"):
        opened(images).keep(pipe)
    with pytest.raises(FileExistsError, match="it is no file, and is not replaced: .*pipe"), whole_file(pipe):
        pytest.fail("it is opened")
    assert pipe.is_fifo()


@pytest.mark.parametrize(
    "changed",
    [
        {"folders": ("../secret", "train/bee", "train/cat", "test/ant", "test/bee", "test/cat")},
        {"folders": ("/etc", "train/bee", "train/cat", "test/ant", "test/bee", "test/cat")},
        {"counts": (45, 0, 0, 0, 0, 0)},
        {"stats": {"all": [[0.5], [0.5]]}},
        {"stats": {"all": [[0.5, 0.5, 0.5], [0.5, 0.5, "x"]]}},
    ],
)
def test_a_listing_names_files_of_its_folder_alone(images: Path, tmp_path: Path, changed: dict[str, Any]) -> None:
    write_listing(dataclasses.replace(list_folder(images), **changed), tmp_path / "listing")
    known, why = read_listing(tmp_path / "listing", images)
    assert known is None
    assert f"{tmp_path / 'listing'} is damaged (ValueError)" in why


@pytest.mark.parametrize("split", [True, False])
def test_classes_splits_and_notes_are_those_of_images_in_memory(tmp_path: Path, split: bool) -> None:
    folder = write_images(tmp_path, split=split)
    (folder / "notes.txt").touch()
    with pytest.warns(UserWarning, match="not read") as told:
        data = load_data("folder", folder, image_size=16, seed=3)
    source = opened(folder)
    assert source.notes == (str(told[0].message),)
    labels = torch.cat([y for _, y in source.test_batches()])
    assert torch.equal(labels, data.test_y)
    assert source.num_train == len(data.train_y)
    order = epoch_order(source.num_train, seed=3, epoch=0)
    assert torch.equal(torch.cat([y for _, y in source.train_batches(BATCH, epoch=0)]), data.train_y[order])


@pytest.mark.full
def test_a_list_of_1_300_000_files(tmp_path: Path) -> None:
    """Empty files; under 60 s the first time, 10 s the second, and 200 bytes a file."""
    images, file = tmp_path / "images", tmp_path / "listing"
    for split, num in (("train", 1250), ("val", 50)):
        for label in range(1000):
            folder = images / split / f"n{label:08d}"
            folder.mkdir(parents=True)
            for i in range(num):
                (folder / f"n{label:08d}_{i}.JPEG").touch()
    began = time.perf_counter()
    write_listing(list_folder(images), file)
    first = time.perf_counter() - began
    listing, _ = read_listing(file, images)
    second = time.perf_counter() - began - first
    assert listing is not None
    assert (len(listing), first < 60, second < 10) == (1_300_000, True, True)
    train, test = listing.splits(0)
    tensors = (train.files, train.labels, test.files, test.labels)
    num_bytes = len(listing.names) + len(listing.ends) * listing.ends.itemsize + sum(t.nbytes for t in tensors)
    assert num_bytes < 200 * len(listing)
