"""Data parallelism: the gradients of a stage, averaged over its replicas at U."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor

from ..launch.ranks import Ranks
from .failure import HelperThread, Monitor
from .proposals import NUM_BITS, word_from_sums, word_to_bits

_BUCKET_BYTES = 25 * 2**20


class GradientAveraging:
    """Averages the gradients of a stage over its replicas.

    Args:
        ranks: which rank hosts which stage.
        group: the process group of this stage's replicas.
        monitor: where the main thread waits.
        helper: runs the collectives meanwhile.
    """

    def __init__(self, ranks: Ranks, group: dist.ProcessGroup, monitor: Monitor, helper: HelperThread) -> None:
        self._ranks, self._group, self._monitor, self._helper = ranks, group, monitor, helper

    def average(
        self, gradients: list[Tensor | None], like: Sequence[Tensor], weight: float, loss: float, word: int
    ) -> tuple[float, int]:
        """Average gradients over the replicas of this stage, in place, weighted by what their shards count for.

        Args:
            gradients: of this replica's shard of the mini-batch; None where a parameter has none.
            like: the parameters that they belong to.
            weight: what the shard counts for: its number of samples, or its weight by ``loss_weight``.
            loss: the shard's mean loss.
            word: what this rank proposes; see `dtrp.comm.proposals`.

        Returns:
            The mean loss of the whole mini-batch, and what any of the replicas proposes.

        Raises:
            TypeError: a gradient is sparse.
            StageError, WorkerError: the run has failed.
        """
        if any(g is not None and g.layout is not torch.strided for g in gradients):
            raise TypeError("sparse gradients cannot be averaged over replicas; make the embedding with sparse=False")
        device = like[0].device if like else torch.device("cpu")
        numbers = [weight, weight * loss, *word_to_bits(word), *(g is not None for g in gradients)]
        sums = torch.tensor(numbers, dtype=torch.float64, device=device)
        # On an accelerator the helper works on the main thread's stream, which waits for it.
        module = torch.get_device_module(device) if device.type != "cpu" else None
        stream = module.current_stream(device) if module is not None else None

        def all_reduce() -> tuple[float, int]:
            with module.stream(stream) if module is not None else nullcontext():
                return self._all_reduce(gradients, like, weight, sums)

        ranks = self._ranks
        others = [rank for rank in ranks.replicas if rank != ranks.rank]
        return self._helper.call(
            all_reduce,
            lambda: (
                f"rank {ranks.rank}, {self._monitor.doing}, has waited {{}} for rank {', '.join(map(str, others))}: the "
                f"gradients of stage {ranks.stage} in the other replicas, for its update. Every rank must call step() the "
                "same number of times"
            ),
            awaited=others,
        )

    def _all_reduce(
        self, gradients: list[Tensor | None], like: Sequence[Tensor], weight: float, sums: Tensor
    ) -> tuple[float, int]:
        self._group.allreduce([sums]).wait()
        all_weights, all_losses, *rest = sums.tolist()
        share = weight / all_weights if all_weights else math.nan
        averaged = []
        for i, count in enumerate(rest[NUM_BITS:]):
            if count:
                gradient = gradients[i]
                gradients[i] = total = gradient * share if gradient is not None else torch.zeros_like(like[i])
                averaged.append(total)
        for bucket in _buckets(averaged):
            flat = torch.cat([g.reshape(-1) for g in bucket])
            self._group.allreduce([flat]).wait()
            for gradient, part in zip(bucket, torch.split(flat, [g.numel() for g in bucket]), strict=True):
                gradient.copy_(part.view(gradient.shape))
        return all_losses / all_weights if all_weights else math.nan, word_from_sums(rest[:NUM_BITS])


def _buckets(gradients: Sequence[Tensor]) -> list[list[Tensor]]:
    """The gradients in order, in groups of one dtype and of about `_BUCKET_BYTES`."""
    buckets: list[list[Tensor]] = []
    size = 0
    for gradient in gradients:
        if not buckets or gradient.dtype != buckets[-1][0].dtype or size + gradient.nbytes > _BUCKET_BYTES:
            buckets.append([])
            size = 0
        buckets[-1].append(gradient)
        size += gradient.nbytes
    return buckets
