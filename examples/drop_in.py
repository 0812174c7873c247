"""A script for torch.distributed.pipelining, with the line of its schedule changed.

torchrun --nproc-per-node 4 examples/drop_in.py
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.nn.functional import cross_entropy

from dtrp.pipelining import ScheduleDTRP

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, num_stages = dist.get_rank(), dist.get_world_size()
is_first, is_last = rank == 0, rank == num_stages - 1

torch.manual_seed(0)  # every rank builds the same blocks, keeps its own, and draws the same batches
blocks = [nn.Sequential(nn.Linear(20, 20), nn.Tanh(), nn.Dropout(0.1)) for _ in range(7)] + [nn.Linear(20, 2)]
module = nn.Sequential(*[blocks[i] for i in torch.arange(8).tensor_split(num_stages)[rank]])
stage = PipelineStage(module, rank, num_stages, torch.device("cpu"))
optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)

# schedule = Schedule1F1B(stage, n_microbatches=4, loss_fn=cross_entropy)
schedule = ScheduleDTRP(stage, optimizer, n_microbatches=4, loss_fn=cross_entropy, method="dtrp")

for step in range(1, 101):
    x = torch.randn(64, 20)
    y = (x.sum(1) > 0).long()
    losses = []
    optimizer.zero_grad()
    schedule.step(*([x] if is_first else []), **({"target": y, "losses": losses} if is_last else {}))
    optimizer.step()  # as it was; it does nothing now, since the schedule makes the updates
    if is_last and step % 20 == 0:
        print(f"step {step}: loss {torch.stack(losses).mean():.6f}", flush=True)

schedule.flush()  # the last updates
x = torch.randn(64, 20)
output = schedule.eval(x)  # in eval mode; on the last rank
if is_last:
    print(f"accuracy {(output.argmax(1) == (x.sum(1) > 0)).float().mean():.1%}; delays {schedule.delays()}", flush=True)
schedule.close()
dist.destroy_process_group()
