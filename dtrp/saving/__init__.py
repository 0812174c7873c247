"""Checkpoints: folders with a manifest and tensors, which appear complete or not at all, and are safe to read.

`Pipeline.save` and `Pipeline.load` are the interface. `inspect` reads the manifest of a checkpoint without a pipeline,
and `read_state` turns a portable checkpoint into state dicts for a plain model and a plain optimizer; `read_model` reads the
model's of any.

::

    folder/manifest.json      everything but the tensors, with size and SHA-256 of the other files
    folder/.metadata          where each tensor is, in the format of `torch.distributed.checkpoint`
    folder/__<rank>_0.distcp  the tensors that a rank has written
"""

from .manifest import Checkpoint, CheckpointError, inspect
from .portable import read_model, read_state

__all__ = ["Checkpoint", "CheckpointError", "inspect", "read_model", "read_state"]
