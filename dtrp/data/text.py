"""Text as a data set: windows of characters, and the next character at each position of a window."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .dataset import Splits

_TEST_SHARE = 0.1


@dataclass(frozen=True, eq=False, repr=False)
class TextDataset(Splits):
    """Windows of characters, as indices into ``characters``.

    Args:
        name: name of the data set in tables and errors.
        train_x, test_x: windows (N, context), int64; those of a split follow each other and do not overlap.
        train_y, test_y: the next character at each position (N, context), int64.
        characters: the distinct characters of the text, sorted.
    """

    samples = "windows"
    is_text = True
    characters: str
    augment: bool = dataclasses.field(default=False, init=False)

    @property
    def num_classes(self) -> int:
        """Number of distinct characters."""
        return len(self.characters)

    @property
    def context(self) -> int:
        """Number of characters in a window."""
        return self.train_x.shape[1]

    def decode(self, tokens: Tensor) -> str:
        """Indices (T,) as a string."""
        return "".join(self.characters[int(token)] for token in tokens)

    def __repr__(self) -> str:
        return (
            f"TextDataset({self.name!r}, {len(self.train_x)} train, {len(self.test_x)} test, "
            f"windows of {self.context}, {self.num_classes} characters)"
        )


def load_text(file: Path, context: int) -> TextDataset:
    """The text in ``file``: the last tenth is the test split, the rest the training split.

    Args:
        file: any text, in UTF-8.
        context: number of characters in a window. The end of a split that fills no window is not used.

    Raises:
        FileNotFoundError, IsADirectoryError: no file there.
        ValueError: not UTF-8, or too short for a window in each split.
    """
    if file.is_dir():
        raise IsADirectoryError(f"{file} is a folder; pass the text file itself as data_dir (--data-dir)")
    if not file.exists():
        raise FileNotFoundError(f"there is no {file}; pass a text file as data_dir (--data-dir)")
    try:
        text = file.read_bytes().decode()  # bytes, so that line ends stay as they are
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text (byte {error.start}); convert it first") from None
    characters = "".join(sorted(set(text)))
    indices = {character: index for index, character in enumerate(characters)}
    tokens = torch.tensor([indices[character] for character in text], dtype=torch.int64)
    num_test = round(len(text) * _TEST_SHARE)
    if num_test <= context:
        raise ValueError(
            f"{file} has {len(text)} characters, and its last tenth, the test, is not longer than a window of {context} "
            f"and the character after it; take a longer text, or a context below {max(1, num_test)}"
        )
    train, test = (_windows(part, context) for part in (tokens[:-num_test], tokens[-num_test:]))
    return TextDataset("text", *train, *test, characters)


def _windows(tokens: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Windows (N, context), and the next characters of each."""
    num = (len(tokens) - 1) // context
    return tokens[: num * context].view(num, context), tokens[1 : num * context + 1].view(num, context)
