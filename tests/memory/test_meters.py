"""What a run logs of its peak memory."""

import resource
from types import SimpleNamespace

import torch

from everest_ds.memory import meters


def test_a_device_has_two_peaks_and_a_process_one(monkeypatch):
    allocator = SimpleNamespace(max_memory_allocated=lambda device: 31, max_memory_reserved=lambda device: 34)
    monkeypatch.setattr(torch, "get_device_module", lambda device: allocator)
    assert meters.peaks(torch.device("cuda")) == {"peak_memory_bytes": 31, "reserved_memory_bytes": 34}
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert resident <= meters.peaks(torch.device("cpu")).pop("peak_memory_bytes") < 2 * resident
    assert meters.peaks(torch.device("cpu")).keys() == {"peak_memory_bytes"}
