"""A run's weights as a file for plain PyTorch."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ...atomic_file import whole_file
from ...saving import state_dict
from .loading import TrainedRun

SUFFIXES = {"torch": ".pt", "safetensors": ".safetensors"}


def check_format(name: str) -> None:
    """Refuse a format whose package is missing.

    Raises:
        ValueError: it is, with what to install.
    """
    if name == "safetensors":
        try:
            import safetensors.torch  # noqa: F401
        except ImportError:
            raise ValueError("--format safetensors needs that package; pip install 'dtrp[safetensors]'") from None


def export(run: TrainedRun, path: Path, name: str) -> int:
    """Write a plain state dict, whole or not at all.

    Args:
        run: the run.
        path: the file; one that is there is replaced.
        name: ``torch`` or ``safetensors``.

    Returns:
        The number of tensors.

    Raises:
        ValueError: the state dict holds what the format cannot.
        OSError: the file cannot be written.
    """
    weights = run.state_dict()
    if name == "torch":
        state_dict.write_model(weights, path)
        return len(weights)
    from safetensors.torch import save

    for key, value in weights.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{key} is no tensor but a {type(value).__name__}, which safetensors cannot hold; pass --format torch"
            )
        if value.is_sparse:
            raise ValueError(f"{key} is sparse, which safetensors cannot hold; pass --format torch")
    content = save(
        {key: value.detach().clone().contiguous() for key, value in weights.items()}, metadata={"format": "pt"}
    )
    with whole_file(path) as file:
        file.write(content)
    return len(weights)
