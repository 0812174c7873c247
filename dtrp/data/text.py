"""A text, character by character: what stands in a window, and the character that follows each one of it."""

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
    """Windows of characters, by their places in ``characters``.

    Args:
        name: what it is called in tables and errors.
        train_x, test_x: (N, context), int64; the windows of a split follow each other and do not overlap.
        train_y, test_y: (N, context), int64: at each place the character that follows.
        characters: all that the text has, sorted.
    """

    samples = "windows"
    characters: str
    augment: bool = dataclasses.field(default=False, init=False)

    @property
    def num_classes(self) -> int:
        """Characters."""
        return len(self.characters)

    @property
    def context(self) -> int:
        """Characters of a window."""
        return self.train_x.shape[1]

    def decode(self, tokens: Tensor) -> str:
        """The characters of ``tokens``, (T,)."""
        return "".join(self.characters[int(token)] for token in tokens)

    def __repr__(self) -> str:
        return (
            f"TextDataset({self.name!r}, {len(self.train_x)} train, {len(self.test_x)} test, "
            f"windows of {self.context}, {self.num_classes} characters)"
        )


def load_text(file: Path, context: int) -> TextDataset:
    """The text in ``file``, UTF-8: its last tenth for the test, the rest for training.

    Args:
        file: any text.
        context: characters of a window. What is left of a split after its last whole window is not used.

    Raises:
        FileNotFoundError, IsADirectoryError: no file there.
        ValueError: not UTF-8, or too short for a window in each split.
    """
    if file.is_dir():
        raise IsADirectoryError(f"{file} is a folder; pass the text file itself as data_dir (--data-dir)")
    if not file.exists():
        raise FileNotFoundError(f"there is no {file}; pass a text file as data_dir (--data-dir)")
    try:
        # Bytes, so that line ends stay as they are.
        text = file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text (byte {error.start}); convert it first") from None
    characters = "".join(sorted(set(text)))
    places = {character: place for place, character in enumerate(characters)}
    tokens = torch.tensor([places[character] for character in text], dtype=torch.int64)
    num_test = round(len(text) * _TEST_SHARE)
    if num_test <= context:
        raise ValueError(
            f"{file} has {len(text)} characters, and its last tenth, the test, is not longer than a window of {context} "
            f"and the character after it; take a longer text, or a context below {max(1, num_test)}"
        )
    train_x, train_y = _windows(tokens[:-num_test], context)
    test_x, test_y = _windows(tokens[-num_test:], context)
    return TextDataset("text", train_x, train_y, test_x, test_y, characters)


def _windows(tokens: Tensor, context: int) -> tuple[Tensor, Tensor]:
    num = (len(tokens) - 1) // context
    return tokens[: num * context].view(num, context), tokens[1 : num * context + 1].view(num, context)
