"""Checkpoints: a folder with a manifest and the tensors, whole or not there, and safe to read.

`Pipeline.save` and `Pipeline.load` are the interface; `inspect` looks at a checkpoint without a pipeline, and
`read_state` makes of a portable one the state dicts for a plain model and a plain optimizer.

::

    folder/manifest.json      what is saved, all of it but the tensors; size and SHA-256 of the other files
    folder/.metadata          of `torch.distributed.checkpoint`: which tensor is where
    folder/__<rank>_0.distcp  the tensors that a rank has written
"""

from .manifest import Checkpoint, CheckpointError, inspect
from .portable import read_state

__all__ = ["Checkpoint", "CheckpointError", "inspect", "read_state"]
