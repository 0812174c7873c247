"""A schedule for the stages of `torch.distributed.pipelining`, in place of its `Schedule1F1B`.

`import dtrp` leaves it out, since it imports `torch.distributed.pipelining`; ``from dtrp.pipelining import
ScheduleDTRP``.
"""

from .drop_in import ScheduleDTRP

__all__ = ["ScheduleDTRP"]
