"""A mini-batch as micro-batches: cut here, as torch's schedules cut it, or by the caller."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.distributed.pipelining.microbatch import split_args_kwargs_into_chunks

from ..tensors.pytree import flatten, num_samples, split

Arguments = tuple[Sequence[tuple[Any, ...]], Sequence[dict[str, Any]]]  # of each micro-batch


@dataclass(frozen=True)
class MiniBatch:
    """What a caller has given to `ScheduleDTRP.step`: a whole mini-batch, or its micro-batches.

    Args:
        args, kwargs, target, loss_kwargs: of a whole mini-batch.
        arg_mbs, kwarg_mbs, target_mbs: of the micro-batches; None: not given.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Any
    loss_kwargs: dict[str, Any]
    arg_mbs: Any = None
    kwarg_mbs: Any = None
    target_mbs: Any = None

    @property
    def is_cut(self) -> bool:
        """Whether the caller has cut it."""
        return not (self.arg_mbs is None and self.kwarg_mbs is None and self.target_mbs is None)

    def check(self, parts: int) -> None:
        """Refuse micro-batches that do not fit.

        Args:
            parts: n_microbatches.

        Raises:
            TypeError, ValueError: with what to change.
        """
        if not self.is_cut:
            return
        whole = {"positional arguments": bool(self.args), "target": self.target is not None}
        whole |= dict.fromkeys(self.kwargs, True)
        if given := [name for name, is_given in whole.items() if is_given]:
            raise ValueError(
                f"{given[0]} beside micro-batches: of a mini-batch that is cut already pass everything by arg_mbs, kwarg_mbs and "
                "target_mbs, or nothing by them"
            )
        for name, entry in (("arg_mbs", tuple), ("kwarg_mbs", dict), ("target_mbs", object)):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, list):
                raise TypeError(f"{name} is a {type(value).__name__}; pass a list, with an entry for each micro-batch")
            if len(value) != parts:
                raise ValueError(
                    f"{name} has {len(value)} entries and n_microbatches={parts}; pass one for each micro-batch, or make the "
                    "schedule with as many"
                )
            if strange := [i for i, each in enumerate(value) if not isinstance(each, entry)]:
                raise TypeError(
                    f"{name}[{strange[0]}] is a {type(value[strange[0]]).__name__}; pass a list of {entry.__name__}s, one for each "
                    "micro-batch"
                )

    def arguments(self, parts: int, specs: tuple[Any, Any], *, takes_x: bool) -> Arguments:
        """The arguments of each micro-batch.

        Args:
            parts: n_microbatches.
            specs: ``args_chunk_spec`` and ``kwargs_chunk_spec``, as torch takes them.
            takes_x: whether this is the first rank; on others, as in torch, what arrives are the arguments.

        Raises:
            ValueError: there is no input, or there are fewer samples than micro-batches.
        """
        if takes_x and not (self.args or self.kwargs or self.arg_mbs or self.kwarg_mbs):
            raise ValueError("the first stage's rank passes the model's input to step() and eval()")
        if self.is_cut:
            args = self.arg_mbs if takes_x and self.arg_mbs is not None else [()] * parts
            return args, self.kwarg_mbs or [{}] * parts
        whole = self.args if takes_x else ()
        if not whole and not self.kwargs:
            return [()] * parts, [{}] * parts
        cut_args, cut_kwargs = split_args_kwargs_into_chunks(
            whole, self.kwargs, parts, specs[0] if whole else None, specs[1]
        )
        if len(cut_args) != parts:
            raise ValueError(
                f"the mini-batch has samples for {len(cut_args)} micro-batches and n_microbatches={parts}; pass at least {parts} "
                "samples (drop_last=True of a DataLoader), or make the schedule with fewer micro-batches"
            )
        return cut_args, cut_kwargs

    def targets(self, parts: int) -> list[Any]:
        """(target, keyword arguments of the loss) of each micro-batch; none where there is no target.

        Raises:
            TypeError, ValueError: they are no tensors, or fewer than micro-batches.
        """
        flatten(self.loss_kwargs, "loss_kwargs")
        if self.target_mbs is not None:
            for number, target in enumerate(self.target_mbs):
                flatten(target, f"target_mbs[{number}]")
            return [(target, self.loss_kwargs) for target in self.target_mbs]
        if self.target is None:
            return []
        flatten(self.target, "target")
        if num_samples(self.target) < parts:
            raise ValueError(
                f"target has {num_samples(self.target)} samples and n_microbatches={parts}; pass at least one for each"
            )
        return [(part, self.loss_kwargs) for part in split(self.target, parts)]
