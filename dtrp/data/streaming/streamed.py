"""The images of a folder as a source of mini-batches, decoded when they are needed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...tensors.rng import epoch_order, generator
from ...typing import Json
from ..dataset import level_stats, required
from ..loader import check_start, normalize
from ..source import WHOLE, Batch, Part, Source
from .decoding import Decoded, Decoder, Request
from .listing import Images, Listing, in_turns, list_folder, read_listing, write_listing
from .workers import Workers

_REQUEST_BYTES = 2**23  # of images that a worker decodes at once
_TEST_BATCH, _TEST_BATCH_BYTES = 500, 2**26
_NUM_MEASURED = 1000
_CHANNELS, _DEFAULT_SIZE = 3, 32


@dataclass(frozen=True)
class Counts:
    """What all ranks know of a folder of images: the labels follow from it, so that only the first one looks into it.

    Args:
        classes: names of the classes.
        train, test: number of images of each class in the two splits.
        notes: notes for the user.
    """

    classes: tuple[str, ...]
    train: tuple[int, ...]
    test: tuple[int, ...]
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, splits: tuple[Images, Images], notes: Iterable[str] = ()) -> Counts:
        """Those of the splits of a folder."""
        classes = splits[0].listing.classes
        train, test = (torch.bincount(images.labels, minlength=len(classes)).tolist() for images in splits)
        return cls(classes, tuple(train), tuple(test), tuple(notes))

    def labels(self) -> tuple[Tensor, Tensor]:
        """The classes (N,), int32, of training and test images, in their order."""
        train, test = (
            in_turns({label: num for label, num in enumerate(counts) if num})[1] for counts in (self.train, self.test)
        )
        return train, test

    def num_bytes(self, image_size: int) -> int:
        """Of all images, decoded."""
        return (sum(self.train) + sum(self.test)) * _CHANNELS * image_size**2


class StreamedImages(Source):
    """Images of a folder, decoded by Pillow when they are needed.

    In training a random part of the image counts, and it is mirrored by chance; in the test its middle
    (`dtrp.data.streaming.decoding`). Order, crops and flips depend on (seed, epoch, index) alone.

    Args:
        counts: number of images of each class.
        splits: training and test images; None: this process has no images, only labels.
        image_size: H and W.
        seed: random seed of order, crops and flips, and of the sample that is measured.
        augment: whether to crop and flip training images at random; else they are treated as those of the test.
        dtype: floating-point dtype of images.
        device: where the mini-batches are to be.
        num_workers: number of processes that decode; 0: this one does.
        skip_damaged: whether another image of its class, drawn by (seed, epoch, index), takes the place of one that
            cannot be read.
        stats: mean and deviation of the channels of images scaled to 0..1; None: they are measured, in this process, on
            1000 training images (of which fewer where there are fewer), resized as for the test.
        limits: number of training and of test images, the first ones; None: all.
        known: the listing as it is on disk; None: it is not.

    Attributes:
        notes: notes for the user.

    Raises:
        DataError: an image of the measured sample cannot be read.
    """

    def __init__(
        self, counts: Counts, splits: tuple[Images, Images] | None, *, image_size: int, seed: int, augment: bool,
        dtype: torch.dtype, device: torch.device | str = "cpu", num_workers: int = 0, skip_damaged: bool = False,
        stats: tuple[Sequence[float], Sequence[float]] | None = None, limits: tuple[int | None, int | None] = (None, None),
        known: Listing | None = None,
    ) -> None:  # fmt: skip
        self.notes = counts.notes
        self.name, self.samples, self.num_classes = "folder", "images", len(counts.classes)
        self.sample_shape = (_CHANNELS, image_size, image_size)
        self.class_names = counts.classes
        self._train_y, self._test_y = (
            labels[:num].clone() for labels, num in zip(counts.labels(), limits, strict=True)
        )
        self.num_train, self.num_test = len(self._train_y), len(self._test_y)
        how = "streamed" + (f" by {num_workers} loader worker{'s' if num_workers != 1 else ''}" if num_workers else "")
        self.details = f" in {self.num_classes} classes, {_CHANNELS}x{image_size}x{image_size}, {how}"
        self._image_size, self._seed, self._augment = image_size, seed, augment
        self._dtype, self._device = dtype, torch.device(device)
        self._damaged: dict[str, None] = {}
        self._workers: Workers[Request, Decoded] | None = None
        self._listing: Listing | None = None
        if splits is None:
            return
        train, test = (images.limit(num) for images, num in zip(splits, limits, strict=True))
        self._listing = train.listing
        decoder = Decoder((train, test), image_size, seed, skip_damaged)
        self._workers = Workers(decoder, num_workers)
        self._workers.start()
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        try:
            self._mean, self._std = (torch.tensor(values, dtype=exact) for values in stats or self._measured())
        except BaseException:
            self.close()
            raise
        self._known = known

    @property
    def damaged(self) -> tuple[str, ...]:  # type: ignore[override]
        """Messages about the files in whose place others were read."""
        return tuple(self._damaged)

    def train_batches(self, batch_size: int, *, epoch: int, start: int = 0, part: Part = WHOLE) -> Iterator[Batch]:
        check_start(start, self.num_train, batch_size)
        if not (part.inputs or part.targets):
            return iter([(None, None)] * -(-(self.num_train - start) // batch_size))
        order = epoch_order(self.num_train, seed=self._seed, epoch=epoch)[start:]
        chosen = [part.of(indices) for indices in torch.split(order, batch_size) if len(indices)]
        return self._batches(0, chosen, self._train_y, part, epoch=epoch, augment=self._augment)

    def test_batches(self, *, part: Part = WHOLE) -> Iterator[Batch]:
        size = max(1, min(_TEST_BATCH, _TEST_BATCH_BYTES // (4 * _CHANNELS * self._image_size**2)))
        chosen = torch.split(torch.arange(self.num_test), size)[part.replica :: part.num_replicas]
        if not (part.inputs or part.targets):
            return iter([(None, None)] * len(chosen))
        return self._batches(1, chosen, self._test_y, part, epoch=0, augment=False)

    def _batches(
        self, split: int, chosen: Sequence[Tensor], labels: Tensor, part: Part, *, epoch: int, augment: bool
    ) -> Iterator[Batch]:
        """The mini-batches of the images whose indices are ``chosen``."""
        inputs = self._inputs(split, chosen, epoch=epoch, augment=augment) if part.inputs else itertools.repeat(None)
        for indices, x in zip(chosen, inputs, strict=False):
            yield x, (labels[indices].long().to(self._device) if part.targets else None)

    def _inputs(self, split: int, chosen: Sequence[Tensor], *, epoch: int, augment: bool) -> Iterator[Tensor]:
        """The images of mini-batches, (B, 3, H, H); each is requested in parts, so that all workers have some of it."""
        assert self._workers is not None, "this process has no images"
        most = max(1, _REQUEST_BYTES // (_CHANNELS * self._image_size**2))

        def parts(batch: Tensor) -> Sequence[Tensor]:
            return torch.tensor_split(batch, -(-len(batch) // most)) if len(batch) else ()

        requests = (Request(split, epoch, augment, tuple(few.tolist())) for indices in chosen for few in parts(indices))
        arriving = self._workers.decode(requests)
        for indices in chosen:
            x = torch.empty(len(indices), *self.sample_shape, dtype=self._dtype, device=self._device)
            for room in parts(x):
                pixels, damaged, _ = next(arriving)
                self._damaged.update(dict.fromkeys(damaged))
                normalize(pixels.to(self._device).permute(0, 3, 1, 2), self._mean, self._std, self._dtype, out=room)
            yield x

    def example(self, num: int) -> tuple[Tensor, Tensor]:
        """Random numbers, which every rank draws alike, with the classes of the first images: nothing is read for it."""
        x = torch.randn(num, *self.sample_shape, generator=generator("example", self._seed), dtype=self._dtype)
        return x.to(self._device), self._train_y[torch.arange(num) % self.num_train].long().to(self._device)

    def _measured(self) -> tuple[list[float], list[float]]:
        """Mean and deviation of the channels, from the listing where they have been measured before."""
        assert self._listing is not None
        assert self._workers is not None
        key = f"{_NUM_MEASURED} of {self.num_train} images at {self._image_size} by seed {self._seed}"
        if key not in self._listing.stats:
            draws = generator("measured", self._seed)
            sample = torch.randperm(self.num_train, generator=draws, device="cpu")[:_NUM_MEASURED]
            size = max(1, min(64, _REQUEST_BYTES // (_CHANNELS * self._image_size**2)))
            requests = (Request(0, 0, False, tuple(few.tolist())) for few in torch.split(sample, size))
            counts = torch.zeros(_CHANNELS, 256, dtype=torch.int64)
            for pixels, damaged, _ in self._workers.decode(requests):
                self._damaged.update(dict.fromkeys(damaged))
                counts += torch.stack(
                    [torch.bincount(channel.flatten(), minlength=256) for channel in pixels.unbind(-1)]
                )
            self._listing = self._listing.with_stats(key, *level_stats(counts))
        mean, std = self._listing.stats[key]
        return mean, std

    def facts(self) -> dict[str, Json]:
        if self._workers is None:
            return super().facts()
        stats = {"mean": self._mean.tolist(), "std": self._std.tolist()}
        return {**super().facts(), "reading": {**stats, "fit": "middle"}}

    def keep(self, path: Path) -> None:
        """Write the listing, with what was measured, to a file, unless the same is there."""
        if self._listing is not None and not (self._known is self._listing and path.exists()):
            write_listing(self._listing, path)
            self._known = self._listing

    def close(self) -> None:
        if self._workers is not None:
            self._workers.close()


def stream_folder(
    data_dir: Path, *, seed: int, dtype: torch.dtype, image_size: int | None = None, file: Path | None = None,
    from_bytes: int = 0, reads: bool = True, share: Callable[[Counts | None, Exception | None], Counts] | None = None,
    **options: Any,
) -> StreamedImages | None:  # fmt: skip
    """The images of a folder, decoded when they are needed.

    Which images count, and how they are split, says `dtrp.data.image_folder.load_folder`.

    Args:
        data_dir: folder with the images.
        seed: random seed; it decides on the split too, where the folders have none.
        dtype: floating-point dtype of the mini-batches.
        image_size: H and W; None: 32.
        file: file that may hold the listing of the folder, from `StreamedImages.keep`; it counts if the folder has not
            changed since.
        from_bytes: size of all images, decoded, below which None is returned.
        reads: whether this process needs the images; else it has the labels alone.
        share: function from what this process has found out (None where ``reads`` is false) and its error to what the
            first of several processes has found out, as `dtrp.launch.join.told_by_first_rank`.
        options: other arguments of `StreamedImages`.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no classes, a class without images, a class in the test that training does not have; an image that
            cannot be read, of those that are measured; ``file`` is another file.
        ImportError: Pillow is not installed.
    """
    size = image_size or _DEFAULT_SIZE
    make = partial(StreamedImages, image_size=size, seed=seed, dtype=dtype, **options)
    counts: Counts | None = None
    error: Exception | None = None
    source: StreamedImages | None = None
    if reads:
        try:
            counts, splits, known = _found(data_dir, seed, file)
            if counts.num_bytes(size) >= from_bytes:
                # Before this process joins the others: those that decode are to hold none of its connections.
                source = make(counts=counts, splits=splits, known=known)
        except (ValueError, OSError, ImportError) as failed:
            error = failed
    if share is not None:
        counts = share(counts, error)
    elif error is not None:
        raise error
    assert counts is not None, "who does not read is told"
    if counts.num_bytes(size) < from_bytes:
        return None
    return source or make(counts=counts, splits=None)


def _found(data_dir: Path, seed: int, file: Path | None) -> tuple[Counts, tuple[Images, Images], Listing | None]:
    """The images of a folder: their numbers, the splits, and the listing where it is on disk."""
    required("PIL.Image", "Pillow", "folder")
    known, note = read_listing(file, data_dir) if file is not None else (None, "")
    listing = known or list_folder(data_dir)
    notes = [note] if note else []
    if listing.unread:
        notes.append(f"{data_dir}: {len(listing)} images are read; not read: {listing.unread}")
    splits = listing.splits(seed)
    return Counts.of(splits, notes), splits, known
