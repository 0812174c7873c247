"""The same program in one process, with all stages, and under torchrun, with one stage a rank.

python examples/ranks.py
torchrun --nproc-per-node 4 examples/ranks.py
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import dtrp

torch.set_num_threads(1)
torch.manual_seed(0)  # every rank builds the same model and draws the same batches
model = nn.Sequential(
    *(nn.Sequential(nn.Linear(20, 20), nn.Tanh(), nn.Dropout(0.1)) for _ in range(7)), nn.Linear(20, 2)
)

with dtrp.Pipeline(
    model,
    lambda params: torch.optim.AdamW(params, lr=0.01),
    cross_entropy,
    num_stages=4,
    method="dtrp",
    num_microbatches=4,
    seed=0,
) as pipe:
    for step in range(1, 101):
        x = torch.randn(64, 20)
        loss = pipe.step(x, (x.sum(1) > 0).long())
        if loss is not None and step % 20 == 0:  # the last rank has it
            print(f"step {step}: loss {loss:.6f}", flush=True)
    pipe.flush()
    pipe.save_model("ranks.pt")  # rank 0 writes
