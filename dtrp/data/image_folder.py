"""Images in one folder per class."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from .dataset import Dataset, Split, image_dataset, required
from .streaming.listing import Images, list_folder

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")


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
    listing = list_folder(data_dir)
    if listing.unread:
        message = f"{data_dir}: {len(listing)} images are read; not read: {listing.unread}"
        warnings.warn(message, stacklevel=3)
    names = listing.classes
    train_images, test_images = (_read(images, image_size) for images in listing.splits(seed))
    return image_dataset("folder", train_images, test_images, len(names), names, augment=True)


def _read(images: Images, image_size: int) -> Split:
    """Images and their classes."""
    shape, fit = (image_size, image_size, 3), partial(fitted, size=image_size)
    pixels = (torch.frombuffer(bytearray(decoded(images.path(i), fit)), dtype=torch.uint8) for i in range(len(images)))
    return torch.stack([image.view(shape).permute(2, 0, 1) for image in pixels]), images.labels.long()


def fitted(image: Image, size: int) -> bytes:
    """The largest square in the middle of an image, resized: its pixels, (size, size, channels)."""
    from PIL import Image, ImageOps

    return ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR).tobytes()


class UnreadableImageError(ValueError):
    """A file that cannot be read as an image.

    Attributes:
        path: the file.
    """

    def __init__(self, path: str, cause: Exception) -> None:
        self.path = path
        super().__init__(f"{path} cannot be read as an image ({type(cause).__name__}: {cause}); replace or remove it")


def decoded(path: str, make: Callable[[Image], T]) -> T:
    """What ``make`` makes of the image in a file, upright and in RGB.

    Raises:
        UnreadableImageError: the file, or what is in it, cannot be read.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            return make(_rgb(ImageOps.exif_transpose(image), image.format))
    except Exception as cause:  # a damaged image can raise anything
        raise UnreadableImageError(path, cause) from cause


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
