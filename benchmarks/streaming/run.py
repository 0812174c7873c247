"""Images that are decoded when they are needed: speed beside a plain DataLoader, memory, and the list of a million files.

    python benchmarks/streaming/run.py speed      # images a second, in turns in one run
    python benchmarks/streaming/run.py memory     # the peak of a run and its loader workers, beside one on --data random
    python benchmarks/streaming/run.py listing    # 1,300,000 empty files, listed and listed again

The first two make 20,000 JPEGs of 256 pixels in 100 classes in --folder, unless they are there; --images takes fewer. Each
part writes a line of results/<part>.jsonl, or of --out. Needs an idle machine, and Linux for the memory of processes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dtrp.data import stream_folder
from dtrp.data.streaming.listing import list_folder, read_listing, write_listing
from dtrp.train import environment

HERE = Path(__file__).parent
CLASSES, PIXELS, SIZE, BATCH = 100, 256, 224, 64
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
RUN = ["--image-size", str(SIZE), "--model", "resnet18", "--method", "bp", "--stages", "1", "--batch-size", str(BATCH),
       "--epochs", "1", "--max-updates", "12", "--limit-test", "64", "--threads", "1", "--quiet"]  # fmt: skip


def make_images(folder: Path, num: int) -> Path:
    """``num`` training images and a tenth as many of the test: smooth random colours and noise, as photos compress."""
    place = folder / f"images-{num}"
    if (place / "made").exists():
        return place
    draws = random.Random(0)
    noise = [Image.effect_noise((PIXELS, PIXELS), 60) for _ in range(8)]
    for split, count in (("train", num), ("test", num // 10)):
        for i in range(count):
            path = place / split / f"class{i % CLASSES:03d}" / f"{i:06d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = Image.frombytes("RGB", (12, 12), draws.randbytes(12 * 12 * 3))
            image = coarse.resize((PIXELS, PIXELS), Image.Resampling.BICUBIC)
            grain = Image.merge("RGB", draws.sample(noise, 3))
            Image.blend(image, grain, 0.25).save(path, quality=90)
    (place / "made").touch()
    return place


# -- speed ----------------------------------------------------------------------------------------------


class Plain(Dataset[tuple[Tensor, int]]):
    """What a user would write: decode, crop at random, mirror, to floats, normalize."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted((folder / "train").glob("*/*.jpg"))
        names = sorted({path.parent.name for path in self.files})
        self.labels = [names.index(path.parent.name) for path in self.files]
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with Image.open(self.files[index]) as image:
            image = image.convert("RGB").crop(self.part(*image.size)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(SIZE, SIZE, 3).permute(2, 0, 1)
        return (pixels.contiguous().float() / 255 - self.mean) / self.std, self.labels[index]

    @staticmethod
    def part(width: int, height: int) -> tuple[int, int, int, int]:
        while True:
            area = width * height * random.uniform(0.08, 1)
            ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, upper = random.randint(0, width - w), random.randint(0, height - h)
                return left, upper, left + w, upper + h


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """Images a second of both, a few hundred mini-batches at a time, in turns; workers start before the clock does."""
    folder = make_images(Path(options.folder), options.images)
    torch.set_num_threads(1)
    source = stream_folder(
        folder, seed=0, dtype=torch.float32, image_size=SIZE, augment=True, num_workers=options.workers,
        stats=(MEAN, STD),
    )  # fmt: skip
    assert source is not None
    plain = DataLoader(
        Plain(folder), BATCH, shuffle=True, num_workers=options.workers, persistent_workers=options.workers > 0,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    epochs = itertools.count()
    contenders = {
        "streamed": lambda: source.train_batches(BATCH, epoch=next(epochs)),
        "plain": lambda: iter(plain),
    }
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(options.rounds + 1):
        for name in list(contenders)[:: 1 if round_number % 2 else -1]:
            rate = images_a_second(contenders[name](), options.minibatches)
            if round_number:  # the first one fills the system's cache of files
                rates[name].append(rate)
            print(f"{name:10} {rate:8.1f} images/s", flush=True)
    source.close()
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {"rates": rates, "ratio": medians["streamed"] / medians["plain"], "images": options.images,
            "workers": options.workers, "minibatches": options.minibatches}  # fmt: skip


def images_a_second(batches: Iterator[Any], num: int) -> float:
    """Of ``num`` mini-batches, from the arrival of the first one on."""
    next(batches)
    began, images = time.perf_counter(), 0
    for x, _ in itertools.islice(batches, num):
        images += len(x)
    return images / (time.perf_counter() - began)


# -- memory ---------------------------------------------------------------------------------------------


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """The peak of a run's process tree: pages that processes share are divided among them (Pss), so that the sum is right."""
    folder = make_images(Path(options.folder), options.images)
    streamed = ["--data", "folder", "--data-dir", str(folder), "--stream", "--loader-workers", str(options.workers)]
    peaks = {
        "random": peak_of_tree(["train", "--data", "random", *RUN]),
        "streamed": peak_of_tree(["train", *streamed, *RUN]),
    }
    batch = BATCH * 3 * SIZE**2 * 4
    allowed = peaks["random"] + 300e6 + 250e6 * options.workers + batch
    print({name: f"{peak / 1e6:.0f} MB" for name, peak in peaks.items()}, f"allowed {allowed / 1e6:.0f} MB")
    return {"peak_bytes": peaks, "allowed_bytes": allowed, "images": options.images, "workers": options.workers}


def peak_of_tree(arguments: list[str]) -> int:
    """The largest sum of the memory of ``dtrp`` with these arguments, and of its processes, in bytes."""
    process = subprocess.Popen([sys.executable, "-m", "dtrp", *arguments], stdout=subprocess.DEVNULL)
    peak = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.05):
            peak = max(peak, sum(map(held_by, tree(process.pid))))

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    done.set()
    watcher.join()
    if code:
        raise SystemExit(f"dtrp {' '.join(arguments)} ended with code {code}")
    return peak


def tree(pid: int) -> list[int]:
    """A process and those that it has started, and so on."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *itertools.chain.from_iterable(tree(int(child)) for child in children)]


def held_by(pid: int) -> int:
    """The memory of a process in bytes; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


# -- listing --------------------------------------------------------------------------------------------


def listing(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds to list empty files in 1,000 classes, to find the list again, and its bytes a file."""
    num = options.files // 1000
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        images, file = Path(place) / "images", Path(place) / "listing"
        for split, count in (("train", num - num // 26), ("val", num // 26)):
            for label in range(1000):
                folder = images / split / f"n{label:08d}"
                folder.mkdir(parents=True)
                for i in range(count):
                    (folder / f"n{label:08d}_{i}.JPEG").touch()
        began = time.perf_counter()
        write_listing(list_folder(images), file)
        first_s = time.perf_counter() - began
        found, why = read_listing(file, images)
        second_s = time.perf_counter() - began - first_s
        assert found is not None, why
        splits = found.splits(0)
        num_bytes = len(found.names) + len(found.ends) * found.ends.itemsize
        num_bytes += sum(part.files.nbytes + part.labels.nbytes for part in splits)
    told = {"files": len(found), "first_s": first_s, "second_s": second_s, "bytes_per_file": num_bytes / len(found)}
    print(told)
    return told


PARTS = {"speed": speed, "memory": memory, "listing": listing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where images are made")
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--files", type=int, default=1_300_000)
    parser.add_argument("--workers", type=int, default=2, help="loader workers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minibatches", type=int, default=100, help="of a turn")
    parser.add_argument("--out", help="file for the result")
    options = parser.parse_args()
    found = PARTS[options.part](options)
    path = Path(options.out) if options.out else HERE / "results" / f"{options.part}.jsonl"
    path.parent.mkdir(exist_ok=True)
    with open(path, "a") as file:
        file.write(json.dumps({"run": time.strftime("%Y-%m-%dT%H:%M:%S"), **found, **environment()}) + "\n")


if __name__ == "__main__":
    main()
