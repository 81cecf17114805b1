"""What a rank's device holds besides tensors. Each number is named, stated with its source, and can be overridden.

What was measured on a card stands in ``cards.json`` beside this file, by the card's name; ``tools/gpu_check.py`` writes
it. For all other cards there are assumptions.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from everest_ds.memory.gpus import same_card

# Of what is free, left alone where nobody states a capacity: allocators (CUDA's and the C library's) can't use every
# hole between blocks, how much depends on history, and the plan leaves it out. An assumption.
RESERVE = 0.05
_MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Overheads:
    """Bytes per rank that no tensor accounts for.

    ``context_bytes``: the CUDA context with its loaded kernels, outside the allocator. ``communication_bytes``: NCCL's
    buffers. ``libraries_bytes``: the workspace that cuBLAS takes from the allocator. ``granule_bytes``: the allocator
    rounds every block up to a multiple of this.
    """

    context_bytes: int = 0
    communication_bytes: int = 0
    libraries_bytes: int = 0
    granule_bytes: int = 1

    def items(self, ranks: int) -> dict[str, int]:
        """The overheads that a rank has, by name."""
        named = {
            "CUDA context": self.context_bytes,
            "communication library": self.communication_bytes if ranks > 1 else 0,
            "cuBLAS workspace": self.libraries_bytes,
        }
        return {name: size for name, size in named.items() if size}


NONE = Overheads()
# Assumptions, not measured by us: a context with torch's kernels is commonly reported as 400 to 600 MiB on A100 and
# H100; NCCL takes some 4 to 8 MiB per channel and peer connection, about 300 MiB on an 8-GPU node; torch gives cuBLAS
# 8 MiB (32 MiB on Hopper) per stream and handle (aten/src/ATen/cuda/CUDABlas.cpp, CUBLAS_WORKSPACE_CONFIG). The
# granule is kMinBlockSize of c10/cuda/CUDACachingAllocator.cpp. Fragmentation is left out: it depends on history.
CUDA = Overheads(context_bytes=500 * _MIB, communication_bytes=300 * _MIB, libraries_bytes=32 * _MIB, granule_bytes=512)


CARDS = Path(__file__).with_name("cards.json")


def overheads_for(device_type: str, card: str | None = None) -> Overheads:
    """Return the overheads of a kind of device: none on a CPU; a card's own where they were measured.

    Args:
        device_type: "cuda" or "cpu".
        card: a GPU's name, the driver's or one of :data:`everest_ds.memory.gpus.GPUS`; None: the one in this machine.
    """
    if device_type != "cuda":
        return NONE
    name = card_here() if card is None else card
    measured = next((constants for known, constants in _measured().items() if same_card(name, known)), None)
    if measured is None:
        return CUDA
    return dataclasses.replace(
        CUDA, context_bytes=measured["context_bytes"], libraries_bytes=measured["libraries_bytes"]
    )


def card_here() -> str:
    """Return the driver's name of this process's GPU; "" where there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


@cache
def _measured() -> dict[str, dict[str, Any]]:
    return json.loads(CARDS.read_text(encoding="utf-8"))
