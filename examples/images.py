"""Images from files: the first rank decodes them, the last one has the labels, and those between read nothing.

python examples/images.py
torchrun --nproc-per-node 3 examples/images.py
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

import dtrp

FOLDER, NUM, BATCH, EPOCHS = Path("example-images"), 256, 32, 4


def make_images() -> None:
    """Write noisy ramps, dark on one of four sides, where they are not there: ``00017-1.png`` is of class 1."""
    FOLDER.mkdir(exist_ok=True)
    draws, ramp = np.random.default_rng(0), np.tile(np.linspace(0, 255, 32), (32, 1))
    for i in range(NUM):
        picture = (ramp, ramp[:, ::-1], ramp.T, ramp.T[::-1])[i % 4] + draws.normal(0, 60, (32, 32))
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(FOLDER / f"{i:05d}-{i % 4}.png")


class Images(Dataset[Tensor]):
    """The images without their labels, decoded when they are asked for."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(np.array(Image.open(self.paths[index]), dtype=np.float32))[None] / 255 - 0.5


def order(epoch: int) -> list[Tensor]:
    """The mini-batches of an epoch, as indices: the same on every rank."""
    return list(torch.randperm(NUM, generator=torch.Generator().manual_seed(epoch)).split(BATCH))


torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(
    nn.Sequential(nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
    nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
    nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(256, 4)),
)
with dtrp.Pipeline(
    model, lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9), cross_entropy, num_stages=3, seed=0
) as pipe:
    if pipe.is_first and not FOLDER.exists():
        make_images()
    pipe.gather(None)  # the files are there, for all ranks
    paths = sorted(FOLDER.glob("*.png"))
    images = Images(paths) if pipe.is_first else None
    labels = torch.tensor([int(path.stem[-1]) for path in paths]) if pipe.is_last else None
    for epoch in range(EPOCHS):
        parts = order(epoch)
        nothing = [None] * len(parts)  # what a rank does not need
        xs = (
            nothing
            if images is None
            else DataLoader(images, batch_sampler=[part.tolist() for part in parts], num_workers=2)
        )
        ys = nothing if labels is None else [labels[part] for part in parts]
        losses = [pipe.step(x, y) for x, y in zip(xs, ys, strict=True)]
        pipe.flush()
        out = pipe.infer(None if images is None else torch.stack([images[i] for i in range(64)]))
        if labels is not None:  # the last rank has the losses and the output
            accuracy = (out.argmax(1) == labels[:64]).float().mean()
            print(f"epoch {epoch + 1}: loss {torch.stack(losses).mean():.6f}, accuracy {accuracy:.1%}", flush=True)
