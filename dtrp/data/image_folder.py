"""Images in one folder per class."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..tensors.rng import generator
from .dataset import Dataset, Split, image_dataset, required

if TYPE_CHECKING:
    from PIL.Image import Image

_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
Files = dict[str, list[Path]]  # by class


def load_folder(data_dir: Path, seed: int, image_size: int) -> Dataset:
    """Images from files, uint8 (N, 3, image_size, image_size).

    Either ``train/<class>/*`` and ``test/<class>/*`` (or ``val``), or ``<class>/*`` alone, of which a fifth of each
    class, drawn by ``seed`` and at least one image, becomes the test split. Classes are numbered in the order of their
    names. Images come from the classes in turn, so that the first n are a sample of all classes.

    An image is turned as its EXIF orientation says, converted to RGB, cropped to a square around its centre, and
    resized. 16 bits are scaled to 8, floats from 0..1 to 0..255; what is transparent lies on white. Of several frames
    the first counts.

    Args:
        data_dir: folder with the images.
        seed: random seed of the split, where the folders have none.
        image_size: H and W of the tensors.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no classes, a class without images, a class in the test that training does not have, an image that
            cannot be read, or whose numbers have no known range.

    Warns:
        UserWarning: files below ``data_dir`` that are not read, with their number, some names, and why: hidden ones,
            those with another ending, and those that do not lie in the folder of a class itself.
    """
    required("PIL.Image", "Pillow", "folder")
    if not data_dir.is_dir():
        raise FileNotFoundError(
            f"no folder {data_dir}; pass data_dir (--data-dir), a folder with train/<class>/ and test/<class>/"
        )
    train, test = _splits(data_dir, seed)
    _warn_of_unread(data_dir, {file for files in (*train.values(), *test.values()) for file in files})
    names = tuple(train)
    train_images, test_images = (_read(files, names, image_size) for files in (train, test))
    return image_dataset("folder", train_images, test_images, len(names), names, augment=True)


def _splits(data_dir: Path, seed: int) -> tuple[Files, Files]:
    """Training and test images."""
    train_dir = data_dir / "train"
    test_dir = next((path for path in (data_dir / "test", data_dir / "val") if path.is_dir()), None)
    if not train_dir.is_dir():
        if test_dir is not None:
            raise ValueError(f"{data_dir} has {test_dir.name} but no train; add {train_dir}")
        return _split(_classes(data_dir), data_dir, seed)
    if test_dir is None:
        instead = f"add {data_dir / 'test'}, or pass {train_dir} as data_dir, to split it 80/20"
        raise ValueError(f"{data_dir} has train but no test (or val); {instead}")
    train, test = _classes(train_dir), _classes(test_dir)
    for name in sorted(set(test) - set(train)):
        raise ValueError(f"{test_dir} has class {name!r}, which {train_dir} has not; remove it there, or add it here")
    return train, test


def _classes(folder: Path) -> Files:
    """The image files of each class, both in the order of their names."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not classes:
        raise ValueError(f"{folder} has no folders, one per class; put the images into {folder / '<class>'}")
    files = {path.name: sorted(file for file in path.iterdir() if _is_image(file)) for path in classes}
    for name, images in files.items():
        if not images:
            others = _by_reason(list(_entries(folder / name)), folder / name)
            raise ValueError(
                f"{folder / name} has no images ({', '.join(_ENDINGS)}){others and ', but ' + others}; add some, or remove the "
                "folder"
            )
    return files


def _is_image(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in _ENDINGS and not path.name.startswith(".")


def _warn_of_unread(data_dir: Path, images: set[Path]) -> None:
    """Warn of what lies in the folder and is not among ``images``."""
    classes = {image.parent for image in images}
    folders = {data_dir, *classes, *(path.parent for path in classes)}  # of which some may be links
    others = sorted({path for folder in folders for path in _entries(folder)} - images - folders)
    if others:
        warnings.warn(
            f"{data_dir}: {len(images)} images are read; not read: {_by_reason(others, data_dir)}",
            stacklevel=4,
        )


def _entries(folder: Path) -> Iterator[Path]:
    """The files below a folder; a hidden folder, or a link to a folder, counts as a file."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
            yield from _entries(path)
        else:
            yield path


def _by_reason(files: list[Path], folder: Path) -> str:
    """Files of ``folder`` that are not read, as text: by reason, how many and the first few names."""

    def reason(path: Path) -> str:
        if path.name.startswith("."):
            return "hidden"
        if not path.is_file():
            return "no files"
        return "in no class's own folder" if path.suffix.lower() in _ENDINGS else "with another ending"

    groups = [(why, list(paths)) for why, paths in itertools.groupby(sorted(files, key=reason), reason)]
    return "; ".join(
        f"{len(paths)} {why} ({', '.join(str(path.relative_to(folder)) for path in paths[:3])}{', ...' * (len(paths) > 3)})"
        for why, paths in groups
    )


def _split(classes: Files, folder: Path, seed: int) -> tuple[Files, Files]:
    """Training and test images, 4 to 1 in each class."""
    train, test = {}, {}
    for name, files in classes.items():
        if len(files) < 2:
            raise ValueError(f"{folder / name} has 1 image, and training and test need one each; add at least 1")
        order = torch.randperm(len(files), generator=generator("split", seed, name)).tolist()
        num_test = max(1, round(len(files) / 5))
        test[name] = [files[i] for i in order[:num_test]]
        train[name] = [files[i] for i in order[num_test:]]
    return train, test


def _read(classes: Files, names: tuple[str, ...], image_size: int) -> Split:
    """Images and their classes: the first image of each class, then the second of each, and so on."""
    turns = sorted(
        (turn, names.index(name), file) for name, files in classes.items() for turn, file in enumerate(files)
    )
    x = torch.stack([_read_image(file, image_size) for _, _, file in turns])
    return x, torch.tensor([label for _, label, _ in turns])


def _read_image(path: Path, image_size: int) -> Tensor:
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            upright = _rgb(ImageOps.exif_transpose(image), image.format)
            square = ImageOps.fit(upright, (image_size, image_size), Image.Resampling.BILINEAR)
    except Exception as cause:  # a damaged image can raise anything
        raise ValueError(
            f"{path} cannot be read as an image ({type(cause).__name__}: {cause}); replace or remove it"
        ) from cause
    pixels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
    return pixels.view(image_size, image_size, 3).permute(2, 0, 1)


def _rgb(image: Image, file_format: str | None) -> Image:
    """The image in RGB, with 8 bits a channel.

    Raises:
        ValueError: its numbers have no known range.
    """
    from PIL import Image

    if image.mode[0] in "IF":
        image = _eight_bits(image, file_format)
    if image.mode.upper().endswith("A") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _eight_bits(image: Image, file_format: str | None) -> Image:
    """A grey image of 16 bits, or of floats in 0..1, with 8 bits."""
    # Pillow reads 16 bits of a PNG or PGM as "I" too, depending on its version; a TIFF in "I" has 32 bits, or a sign.
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format in ("PNG", "PPM")):
        image, scale = image.convert("I").convert("F"), 255 / 65535
    elif image.mode == "F":
        low, high = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.float32).aminmax()
        if not 0 <= low <= high <= 1:
            raise ValueError(f"floats from {low:g} to {high:g}, and those of an image are in 0..1; scale them")
        scale = 255.0
    else:
        raise ValueError("numbers of 32 bits, or with a sign, have no known range; write it with 8 or 16 bits")
    return image.point(lambda value: value * scale + 0.5).convert("L")  # which rounds down
