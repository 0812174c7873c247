"""A training loop of one's own: handwritten digits by four stages, none of which waits.

python examples/plain_loop.py
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import dtrp
from dtrp.data import batches, load_data

torch.manual_seed(0)
data = load_data("digits")  # images (N, 1, 8, 8)
model = nn.Sequential(
    nn.Flatten(),
    *(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(6)),
    nn.Linear(64, 10),
)

pipe = dtrp.Pipeline(
    model,
    lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    cross_entropy,
    num_stages=4,
    method="dtrp",
    num_microbatches=4,
)
for epoch in range(10):
    losses = [
        pipe.step(x, y)
        for x, y in batches(data.train_x, data.train_y, 64, dataset=data, seed=0, epoch=epoch, augment=False)
    ]
    print(f"epoch {epoch + 1}: training loss {torch.stack(losses).mean():.3f}")
pipe.flush()  # the batches in flight: every stage has now made one update for each mini-batch

x, y = next(batches(data.test_x, data.test_y, 359, dataset=data, seed=0, epoch=0, augment=False, shuffle=False))
print(f"test accuracy {(pipe.infer(x).argmax(1) == y).float().mean():.1%}")
print(f"updates between forward and backward: {pipe.delays()}")

pipe.save_model("digits.pt")  # a plain state dict
model.load_state_dict(torch.load("digits.pt"))
