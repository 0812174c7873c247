"""A training loop of one's own that can be killed: it goes on from its last save, to the bit.

python examples/own_loop.py runs/own
torchrun --nproc-per-node 3 examples/own_loop.py runs/own-on-ranks
dtrp report runs --out report.html
"""

import math
import sys

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import dtrp
from dtrp.data import load_data

EPOCHS, BATCH, WARMUP, PATIENCE, LR = 12, 64, 20, 3, 0.1

torch.set_num_threads(1)
torch.manual_seed(0)  # every rank makes the same model
digits = load_data("digits")
train = TensorDataset(digits.train_x, digits.train_y)
sampler = dtrp.ResumableSampler(train, seed=0)  # on all ranks the same order
loader = DataLoader(train, BATCH, sampler=sampler)
total = EPOCHS * len(loader)
model = nn.Sequential(nn.Flatten(), *(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(5)), nn.Linear(64, 10))


def warmup_then_cosine(n: int) -> float:
    """The learning rate of update n, relative to LR."""
    return min(1.0, (n + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * min(n, total) / total))


def evaluate(pipe: dtrp.Pipeline) -> tuple[float, float] | tuple[None, None]:
    """(loss, accuracy) on the test data, where the last stage is."""
    out, y = pipe.infer(digits.test_x), digits.test_y
    return (None, None) if out is None else (float(cross_entropy(out, y)), float((out.argmax(1) == y).float().mean()))


def is_over(run: dtrp.RunFolder) -> bool:
    """After all epochs, or some that were no better than the best. Every rank has the same lines, and says the same."""
    stale = [line for line in run.metrics if line["update"] > run.best[0]]
    return run.num_epochs == EPOCHS or len(stale) >= PATIENCE


with dtrp.Pipeline(
    model,
    lambda params: torch.optim.SGD(params, lr=LR, momentum=0.9, weight_decay=5e-4),
    cross_entropy,
    num_stages=3,
    lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_then_cosine),
    max_grad_norm=1.0,  # of each stage's gradient
    seed=0,
) as pipe:
    settings = {"data": "digits", "lr": LR, "batch-size": BATCH, "epochs": EPOCHS}
    run = dtrp.RunFolder(sys.argv[1], pipe, settings=settings)
    if (state := run.load()) is not None:  # None: a new run
        sampler.load_state_dict(state)
        print(*run.notes, sep="\n")
    while not is_over(run):
        epoch = sampler.epoch
        for x, y in loader:
            run.update(pipe.step(x, y), len(x))
            sampler.advance(len(x))
            if pipe.num_updates % 10 == 0 and sampler.epoch == epoch:
                run.save(sampler.state_dict())  # with the micro-batches in flight
        pipe.flush()
        line = run.epoch(*evaluate(pipe))
        if pipe.is_last:
            print(
                f"epoch {line['epoch']}: loss {line['test_loss']:.4f}, accuracy {line['test_accuracy']:.1%}", flush=True
            )
        if run.best[0] == pipe.num_updates:
            pipe.save_model(run.path / "best.pt")
        run.save(sampler.state_dict())
    run.finish()
