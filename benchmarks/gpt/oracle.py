"""The GPT with the true weights for predictions, against backpropagation: does anything else separate them?

    python benchmarks/gpt/oracle.py --data-dir FILE        # FILE: a text; half a minute

12 updates of 8 windows, AdamW, warm-up and cosine, K=4, 4 micro-batches, in float64 and float32: whether all weights are equal to
the bit, and how far they are apart where dtrp predicts by itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dtrp
from dtrp.data import TextDataset, load_text
from dtrp.models import gpt
from dtrp.train import class_loss, lr_factor

UPDATES, BATCH = 12, 8


def train(
    data: TextDataset, method: str | dtrp.Method, dtype: torch.dtype
) -> tuple[dict[str, Tensor], list[list[list[Tensor]]]]:
    """The weights at the end, and each version's, by stage."""
    torch.manual_seed(0)
    factor = lr_factor("cosine", 4, UPDATES)
    pipe = dtrp.Pipeline(
        gpt(data.num_classes).to(dtype),
        lambda params: torch.optim.AdamW(params, lr=3e-3, weight_decay=0.1, betas=(0.9, 0.99)),
        class_loss,
        num_stages=4,
        method=method,
        num_microbatches=4,
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, factor),
        seed=0,
    )
    versions = []
    for i in range(UPDATES):
        versions.append([[p.detach().clone() for p in stage.parameters()] for stage in pipe.stages])
        pipe.step(data.train_x[BATCH * i : BATCH * (i + 1)], data.train_y[BATCH * i : BATCH * (i + 1)])
    pipe.flush()
    return pipe.model_state_dict(), versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="the text file")
    torch.set_num_threads(1)
    data = load_text(Path(parser.parse_args().data_dir), 64)
    for dtype in (torch.float64, torch.float32):
        want, versions = train(data, "bp", dtype)

        def oracle(
            parameters: Any,
            optimizer: Any,
            horizon: int,
            out: Sequence[Tensor],
            *,
            stage: int,
            microbatch: int,
            version: int,
            versions: list[list[list[Tensor]]] = versions,
        ) -> None:
            for o, true in zip(out, versions[version + horizon][stage], strict=True):
                o.copy_(true)

        for name, method in (("true weights", dtrp.get_method("dtrp", predict=oracle)), ("rollout", "dtrp")):
            got, _ = train(data, method, dtype)
            equal = all(torch.equal(got[key], want[key]) for key in want)
            apart = max(float((got[key] - want[key]).abs().max()) for key in want)
            print(f"{dtype}, {name}: equal {equal}, largest difference {apart:.3g}", flush=True)


if __name__ == "__main__":
    main()
