"""What a run's model says of files: the classes of images, and how a text goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...data.image_folder import decoded, fitted
from ...data.loader import normalize
from ...data.streaming.decoding import centred
from ...typing import Json
from .. import build
from ..scores.criterion import as_classes
from ..user_code import explained, is_reference
from .loading import Model, TrainedRun


def read_image(path: str, run: TrainedRun) -> Tensor:
    """An image file as the run's model takes it in a test, (1, C, H, H).

    Raises:
        ValueError: no image, or a run on data of another kind.
    """
    reading: Mapping[str, Json] = run.facts.reading
    if "mean" not in reading:
        raise ValueError(
            f"{run.facts.name} is no data of images that dtrp reads; predict tells the classes of such images"
        )
    if not Path(path).is_file():
        raise ValueError(f"there is no file {path}")
    channels, border = run.facts.sample_shape[0], int(reading.get("border", 0))
    size = run.facts.sample_shape[-1] - 2 * border

    def make(image: Any) -> bytes:
        image = image if channels == 3 else image.convert("L")
        return centred(image, size) if reading.get("fit") == "middle" else fitted(image, size)

    pixels = torch.frombuffer(bytearray(decoded(path, make)), dtype=torch.uint8)
    mean, std = (torch.tensor(reading[name], dtype=torch.float64) for name in ("mean", "std"))
    dtype = build.weights_dtype(run.config)
    image = pad(pixels.view(1, size, size, channels).permute(0, 3, 1, 2), (border,) * 4)
    return normalize(image, mean, std, dtype).to(dtype)


def reader_of(run: TrainedRun) -> Any:
    """The function from a file to the model's input: `read_image`, or ``from_file`` of a user's test data.

    Raises:
        ValueError: the user's data has none.
    """
    if not is_reference(run.config.data):
        return lambda path: read_image(path, run)
    source = build.open_source(run.config, lambda note: None)
    source.close()
    read = getattr(source, "from_file", None)
    if read is None:
        raise ValueError(
            f"how a file becomes an input, only --data {run.config.data} knows; give its test data a method from_file(path), which "
            "returns x"
        )

    def own(path: str) -> Any:
        if not Path(path).is_file():
            raise ValueError(f"there is no file {path}")
        try:
            x = read(path)
        except Exception as error:
            raise ValueError(f"{path}: {explained(error, run.config.data)}") from error
        return torch.as_tensor(x, dtype=build.weights_dtype(run.config) if x.is_floating_point() else x.dtype)[None]

    return own


def probabilities(model: Model, x: Any, run: TrainedRun) -> list[tuple[str, float]]:
    """The classes of an input by their probability, the likeliest first.

    Raises:
        ValueError: the model's output is none of classes.
    """
    out = model(x)
    try:
        logits, _ = as_classes(out, torch.zeros(1, dtype=torch.int64, device=getattr(out, "device", None)))
    except ValueError:
        shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(
            f"the model's output is {shape}, and predict tells classes: of one input (1, classes)"
        ) from None
    shares = logits[0].double().softmax(-1).cpu()
    names = run.facts.class_names
    order = shares.argsort(descending=True, stable=True).tolist()
    return [(names[k] if k < len(names) else str(k), float(shares[k])) for k in order]


def continuation(model: Model, text: str, run: TrainedRun, *, length: int, temperature: float, seed: int) -> str:
    """How a text goes on, a character at a time.

    Args:
        model: a model of characters.
        text: its beginning, of which the last characters are read, as many as the model reads at once.
        run: the run.
        length: number of characters.
        temperature: what logits are divided by; 0: the likeliest character.
        seed: random seed.

    Raises:
        ValueError: an empty text, or one with a character that the run's text does not have.
    """
    characters = run.facts.reading.get("characters")
    if not characters:
        raise ValueError(f"the tokens of {run.facts.name} are its own; predict goes on with the text of --data text")
    places = {character: k for k, character in enumerate(characters)}
    if not text:
        raise ValueError("the text is empty; it needs a beginning")
    if strange := sorted(set(text) - places.keys()):
        raise ValueError(f"the run's text has no {strange[0]!r}; it knows {characters!r}")
    device = next((p.device for p in model.network.parameters()), torch.device("cpu"))
    draws = torch.Generator().manual_seed(seed)
    tokens = [places[character] for character in text]
    for _ in range(length):
        window = torch.tensor([tokens[-run.facts.sample_shape[0] :]], device=device)
        logits = model(window)[0, -1].double().cpu()
        if temperature == 0:
            tokens.append(int(logits.argmax()))
        else:
            tokens.append(int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=draws)))
    return "".join(characters[k] for k in tokens[len(text) :])
