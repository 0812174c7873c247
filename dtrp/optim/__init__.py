"""Optimizers and schedules that know of the delay.

Everything here is an ordinary factory or optimizer of `dtrp.Pipeline`: a stage's factory is given the keywords that it
names (``stage``, ``num_stages``, ``delay``, ``named``), and what is here names those that it needs.

=========================  ==========================================================================================
`lr_by_delay`              learning rates divided by the delay at the start, whole later: T1 of PipeMare
`warmup_by_delay`          a warm-up that is longer where the delay is
`momentum_by_stage`        more momentum the further from the loss: of asynchronous Nesterov training
`MuonAdamW`                Muon on matrices and filters, AdamW on the rest
`Braking`                  SGD whose gradient is scaled by its alignment with the momentum
`extrapolated`             any optimizer, whose updates go further along their change
=========================  ==========================================================================================
"""

from .braking import Braking
from .by_delay import lr_by_delay, momentum_by_stage, warmup_by_delay
from .extrapolation import extrapolated
from .muon import MuonAdamW

__all__ = ["Braking", "MuonAdamW", "extrapolated", "lr_by_delay", "momentum_by_stage", "warmup_by_delay"]
