"""Fine-tuning: the front half is frozen, so its stages keep nothing, repeat nothing and wait for no gradient.

python examples/fine_tuning.py
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import dtrp


class Network(nn.Module):
    """Blocks that add to their input: a forward of its own, so `dtrp.split` traces it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(20, 32)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32), nn.GELU()) for _ in range(8))
        self.head = nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


torch.manual_seed(0)
model = Network()  # with weights from elsewhere
for module in (model.first, *model.blocks[:4]):
    module.requires_grad_(False)

stages = dtrp.split(model, points=["blocks.2", "blocks.4", "blocks.6"], example=torch.randn(2, 20))
before = {name: p.detach().clone() for name, p in model.named_parameters()}
with dtrp.Pipeline(
    stages, lambda params: torch.optim.AdamW(params, lr=3e-3), cross_entropy, method="dtrp", num_microbatches=2
) as pipe:
    losses = []
    for step in range(1, 101):
        x = torch.randn(64, 20)
        losses.append(pipe.step(x, (x.sum(1) > 0).long()))
        if step % 25 == 0:
            print(f"step {step}: loss {torch.stack(losses[-25:]).mean():.3f}")
    for k, sizes in pipe.memory().items():
        print(f"stage {k}: {sizes['stash_peak']:>8,} bytes waited for their backward at most")

changed = {
    name.split(".")[1] for name, p in model.named_parameters() if "blocks" in name and not torch.equal(p, before[name])
}
print(f"blocks trained: {', '.join(sorted(changed))}")
