"""The caller's autocast settings, taken along from a forward to its repetition."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch


class AutocastState(NamedTuple):
    """The caller's autocast settings for one type of device, to be used again when a forward is repeated."""

    device_type: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def now(cls, device_type: str) -> AutocastState:
        return cls(device_type, torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type))

    def region(self) -> AbstractContextManager[Any]:
        """Within it these settings hold."""
        if not self.enabled and not torch.is_autocast_enabled(self.device_type):
            return nullcontext()
        # The cache of casts is keyed by parameter object: it would serve weights of another version.
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.enabled, cache_enabled=False)
