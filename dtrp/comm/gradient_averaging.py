"""Data parallelism: the gradients of a stage, averaged over its replicas at U."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..launch.ranks import Ranks
from .failure import Board, Helper
from .proposals import NUM_BITS, bits_of, word_of

_BUCKET_BYTES = 25 * 2**20


class Averaging:
    """Averages the gradients of a stage over its replicas.

    Args:
        ranks: who hosts what.
        group: of this stage's replicas.
        board: where the main thread waits.
        helper: works meanwhile.
    """

    def __init__(self, ranks: Ranks, group: Any, board: Board, helper: Helper) -> None:
        self._ranks, self._group, self._board, self._helper = ranks, group, board, helper

    def average(
        self, gradients: list[Tensor | None], like: Sequence[Tensor], samples: int, loss: float, word: int
    ) -> tuple[float, int]:
        """Average gradients over the replicas of this stage, weighted by samples, in buckets, in place.

        Args:
            gradients: of this replica's shard of the mini-batch; None where there is none.
            like: the parameters they belong to.
            samples: in the shard.
            loss: the shard's mean loss.
            word: what this rank proposes.

        Returns:
            The mean loss of the whole mini-batch, and what any of the replicas proposes.

        Raises:
            TypeError: a gradient is sparse.
            StageError, WorkerError: the run has failed.
        """
        if any(g is not None and g.layout is not torch.strided for g in gradients):
            raise TypeError("sparse gradients cannot be averaged over replicas; make the embedding with sparse=False")
        device = like[0].device if like else torch.device("cpu")
        sums = torch.tensor(
            [samples, samples * loss, *bits_of(word), *(g is not None for g in gradients)],
            dtype=torch.float64,
            device=device,
        )
        # On an accelerator the helper works on the main thread's stream, which waits for it.
        module = torch.get_device_module(device) if device.type != "cpu" else None
        stream = module.current_stream(device) if module is not None else None

        def all_reduce() -> tuple[float, int]:
            with module.stream(stream) if module is not None else nullcontext():
                return self._all_reduce(gradients, like, samples, sums)

        ranks = self._ranks
        others = [rank for rank in ranks.replicas if rank != ranks.rank]
        result: tuple[float, int] = self._helper.run(
            all_reduce,
            lambda: (
                f"rank {ranks.rank}, {self._board.doing}, has waited {{}} for rank {', '.join(map(str, others))}: the "
                f"gradients of stage {ranks.stage} in the other replicas, for its update. Every rank must call step() the "
                "same number of times"
            ),
            awaited=others,
        )
        return result

    def _all_reduce(
        self, gradients: list[Tensor | None], like: Sequence[Tensor], samples: int, sums: Tensor
    ) -> tuple[float, int]:
        self._group.allreduce([sums]).wait()
        all_samples, all_losses, *rest = sums.tolist()
        share = samples / all_samples
        present = [i for i, count in enumerate(rest[NUM_BITS:]) if count]
        for i in present:
            gradient = gradients[i]
            gradients[i] = gradient * share if gradient is not None else torch.zeros_like(like[i])
        for bucket in _buckets([g for g in (gradients[i] for i in present) if g is not None]):
            flat = torch.cat([g.reshape(-1) for g in bucket])
            self._group.allreduce([flat]).wait()
            for gradient, part in zip(bucket, torch.split(flat, [g.numel() for g in bucket]), strict=True):
                gradient.copy_(part.view(gradient.shape))
        return all_losses / all_samples, word_of(rest[:NUM_BITS])


def _buckets(gradients: Sequence[Tensor]) -> list[list[Tensor]]:
    """Groups of one dtype and of about `_BUCKET_BYTES`, in order."""
    buckets: list[list[Tensor]] = []
    size = 0
    for gradient in gradients:
        if not buckets or gradient.dtype != buckets[-1][0].dtype or size + gradient.nbytes > _BUCKET_BYTES:
            buckets.append([])
            size = 0
        buckets[-1].append(gradient)
        size += gradient.nbytes
    return buckets
