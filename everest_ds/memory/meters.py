"""Memory that is really used. The one place that asks a device's allocator."""

from __future__ import annotations

import resource

import torch

_KIB = 1024


def peak_bytes(device: torch.device) -> int:
    """Highest memory since the process started: the device allocator's, or on a CPU the process's resident set."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB
    return torch.get_device_module(device).max_memory_allocated(device)
