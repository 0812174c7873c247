"""Images in one folder per class."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..tensors.rng import generator
from .dataset import Dataset, Split, image_dataset, required

_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
Files = dict[str, list[Path]]  # by class


def load_folder(data_dir: Path, seed: int, image_size: int) -> Dataset:
    """Images from files, uint8 (N, 3, image_size, image_size).

    Either ``train/<class>/*`` and ``test/<class>/*`` (or ``val``), or ``<class>/*`` alone, of which a fifth of each
    class, drawn by ``seed`` and at least one image, becomes the test split. Classes are numbered in the order of their
    names. Images come from the classes in turn, so that the first n are a sample of all classes.

    An image is converted to RGB, cropped to a square around its centre, and resized.

    Args:
        data_dir: folder with the images.
        seed: random seed of the split, where the folders have none.
        image_size: H and W of the tensors.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no classes, a class without images, a class in the test that training does not have, an image that
            cannot be read.
    """
    required("PIL.Image", "Pillow", "folder")
    if not data_dir.is_dir():
        raise FileNotFoundError(
            f"no folder {data_dir}; pass data_dir (--data-dir), a folder with train/<class>/ and test/<class>/"
        )
    train, test = _splits(data_dir, seed)
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
    files = {
        path.name: sorted(file for file in path.iterdir() if file.is_file() and file.suffix.lower() in _ENDINGS)
        for path in classes
    }
    for name, images in files.items():
        if not images:
            raise ValueError(f"{folder / name} has no images ({', '.join(_ENDINGS)}); add some, or remove the folder")
    return files


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
            square = ImageOps.fit(image.convert("RGB"), (image_size, image_size), Image.Resampling.BILINEAR)
    except Exception as cause:  # a damaged image can raise anything
        raise ValueError(
            f"{path} cannot be read as an image ({type(cause).__name__}: {cause}); replace or remove it"
        ) from cause
    pixels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
    return pixels.view(image_size, image_size, 3).permute(2, 0, 1)
