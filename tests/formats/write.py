import sys
from pathlib import Path

import torch
from torch import nn

import dtrp

torch.set_num_threads(1)
out = Path(sys.argv[1])


def network():
    torch.manual_seed(0)
    layers = []
    for _ in range(3):
        layers += [nn.Linear(5, 5, bias=False), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.2)]
    return nn.Sequential(*layers, nn.Linear(5, 3))


def batches():
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(12, 5, generator=g), torch.randint(3, (12,), generator=g)) for _ in range(8)]


def pipe(method):
    return dtrp.Pipeline(
        network(),
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
        nn.functional.cross_entropy,
        num_stages=3,
        method=method,
        num_microbatches=2,
        seed=0,
        lr_scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.95),
    )


for method in ("dtrp", "spectrain"):
    p = pipe(method)
    for x, y in batches()[:5]:
        p.step(x, y)
    p.save(out / f"exact-{method}", extra={"at": 5})
    if method == "dtrp":
        p.save(out / "portable", portable=True, extra={"at": 5})
        p = pipe(method)
        p.load(out / "exact-dtrp")
    for x, y in batches()[5:]:
        p.step(x, y)
    p.flush()
    torch.save(p.model_state_dict(), out / f"expected-{method}.pt")
p = pipe("dtrp")
p.load(out / "portable")
for x, y in batches()[5:]:
    p.step(x, y)
p.flush()
torch.save(p.model_state_dict(), out / "expected-portable.pt")
