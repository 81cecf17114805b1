"""Constants that were measured on a card are the planner's for that card, and for no other."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from everest_ds.gpu_check import cards
from everest_ds.gpu_check.speed import _gaps
from everest_ds.memory import overheads
from everest_ds.memory.gpus import gpu_of_card, same_card
from everest_ds.memory.meters import DeviceMeter
from everest_ds.memory.overheads import CUDA, NONE, overheads_for

CARD = "NVIDIA H100 80GB HBM3"
CONTEXT, LIBRARIES = 600 * 2**20, 64 * 2**20
FACTS = {
    "card": CARD,
    "driver": "580",
    "cuda": "13.0",
    "cudnn": 91900,
    "nccl": "2.28",
    "torch": "2.11",
    "date": "today",
}
VALUES = {
    "first products": {"libraries_bytes": LIBRARIES},
    "memory of a process": {"context_bytes": CONTEXT},
    "description": FACTS,
    "attention bf16, 156 tokens": {"kept_bytes": 7},
}


@pytest.fixture
def file(tmp_path, monkeypatch):
    path = tmp_path / "cards.json"
    path.write_text('{"another card": {"context_bytes": 1, "libraries_bytes": 2}}')
    for module in (overheads, cards):
        monkeypatch.setattr(module, "CARDS", path)
    overheads._measured.cache_clear()
    yield path
    overheads._measured.cache_clear()


def test_constants_reach_the_planner(file):
    assert overheads_for("cuda", CARD) == CUDA
    assert CARD in cards.keep(VALUES)
    overheads._measured.cache_clear()
    for name in (CARD, "H100"):
        found = overheads_for("cuda", name)
        assert (found.context_bytes, found.libraries_bytes) == (CONTEXT, LIBRARIES)
        assert found.communication_bytes == CUDA.communication_bytes
    assert overheads_for("cuda", "H200") == CUDA
    assert overheads_for("cuda", "") == CUDA
    assert overheads_for("cpu", CARD) == NONE
    kept = json.loads(file.read_text())
    assert kept["another card"] == {"context_bytes": 1, "libraries_bytes": 2}
    assert kept[CARD]["attention"] == {"attention bf16, 156 tokens": {"kept_bytes": 7}}


def test_incomplete_constants_change_nothing(file):
    before = file.read_text()
    assert "unchanged" in cards.keep({"description": FACTS})
    assert file.read_text() == before


@pytest.mark.parametrize(
    ("name", "card", "same"),
    [
        ("A100-80", "NVIDIA A100-SXM4-80GB", True),
        ("A100-40", "NVIDIA A100-SXM4-80GB", False),
        ("H100", CARD, True),
        ("H200", CARD, False),
        ("RTX4090", "NVIDIA GeForce RTX 4090", True),
        ("V100-32", "Tesla V100-SXM2-32GB", True),
        ("H100", "NVIDIA H100 PCIe", False),
        ("H100", "NVIDIA H100 NVL", False),
        ("NVIDIA A10", "NVIDIA A100-SXM4-80GB", False),
        ("NVIDIA L4", "NVIDIA L40S", False),
        ("", CARD, False),
    ],
)
def test_names_of_cards(name, card, same):
    assert same_card(name, card) == same
    if same:
        assert gpu_of_card(card).name == name


class FakeGpu:
    """A device module whose allocator says what torch.cuda.memory_stats documents."""

    def __init__(self):
        self.stats = {f"{kind}_bytes.all.peak": 0 for kind in ("requested", "allocated", "active", "reserved")}
        self.stats["num_alloc_retries"] = 3

    def synchronize(self, device):
        pass

    def reset_peak_memory_stats(self, device):
        self.stats |= {key: 0 for key in self.stats if key.endswith("peak")}

    def memory_stats(self, device):
        return dict(self.stats)

    def mem_get_info(self, device):
        return 60, 100


def test_a_device_meter_tells_kinds_of_bytes_apart(monkeypatch):
    gpu = FakeGpu()
    monkeypatch.setattr(torch, "get_device_module", lambda device: gpu)
    with DeviceMeter(torch.device("cuda")) as meter:
        for place, kind in enumerate(("requested", "allocated", "active", "reserved")):
            gpu.stats[f"{kind}_bytes.all.peak"] = 10 + place
        gpu.stats["num_alloc_retries"] += 2
    found = meter.peaks
    assert (found.requested_bytes, found.allocated_bytes, found.active_bytes, found.reserved_bytes) == (10, 11, 12, 13)
    assert (found.driver_bytes, found.retries) == (40, 2)


def test_gaps_are_times_in_which_no_kernel_runs():
    def kernel(start, end, where=DeviceType.CUDA, name="gemm", annotation=False):
        span = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(device_type=where, time_range=span, name=name, is_user_annotation=annotation)

    events = [kernel(0, 10), kernel(5, 20), kernel(30, 40), kernel(0, 100, DeviceType.CPU), kernel(90, 100)]
    events += [kernel(10, 95, name="Memcpy HtoD"), kernel(0, 100, name="Optimizer.step", annotation=True)]
    found = _gaps(events)
    assert found["gaps"] == 2
    assert found["idle_share"] == pytest.approx(60 / 100)
    assert found["longest_gap_ms"] == pytest.approx(0.05)
