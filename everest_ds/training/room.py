"""How much memory a rank's plan may come to, on this machine and now."""

from __future__ import annotations

from typing import NamedTuple

import torch

from everest_ds.memory import meters
from everest_ds.memory.gpus import Capacity, gib, parse_capacity
from everest_ds.memory.overheads import CUDA, RESERVE, overheads_for
from everest_ds.training import ranks

_MIB = 2**20
# On a CPU, what libraries take on first use, after this was asked: DeepSpeed's engine, gloo, kernels. Measured by what
# the resident set of tests/e2e/test_micro_batch.py grows beyond the plan: 81 MiB.
_LIBRARIES_BYTES = 128 * _MIB


class Room(NamedTuple):
    """All that a rank has, and where it is from. The smallest is the one that counts.

    ``reserve``: the share of it that is better left alone.
    """

    size_bytes: int
    origin: str
    reserve: float = 0.0

    @property
    def planned_bytes(self) -> int:
        """What a plan should stay within."""
        return int(self.size_bytes * (1 - self.reserve))

    def __str__(self) -> str:
        less = f", less {self.reserve:.0%}" if self.reserve else ""
        return f"{gib(self.planned_bytes)} ({self.origin}{less})"


def capacity_of(stated: str | None) -> Capacity | None:
    """Read ``train.capacity``.

    Raises:
        UserError: it is none.
    """
    return None if stated is None else parse_capacity(stated, key="train.capacity")


def smallest_room(capacity: Capacity | None) -> Room:
    """Return the room of the rank that has least; a collective call, for which the ranks join their group.

    It is to be asked before the model is built: a plan counts the weights.
    """
    with ranks.naming_the_lost():
        ranks.start()
        ranks.gather(None)  # not before all have loaded their libraries: ranks on one CPU see each other's
        return min(ranks.gather(_room(capacity)))


def host_room_bytes() -> int | None:
    """Return a rank's part of the host's free memory, beside a device of its own; None where the host is the device."""
    if ranks.on_cpu():
        return None
    return meters.available_bytes(torch.device("cpu")) // ranks.local_world_size()


def _room(capacity: Capacity | None) -> Room:
    device = ranks.device()
    available = meters.available_bytes(device)
    if device.type == "cpu":
        held, local = meters.resident_bytes() + _LIBRARIES_BYTES, ranks.local_world_size()
        free, of_stated = available // local - _LIBRARIES_BYTES, f" less {gib(held)} for process and libraries"
        origin = "free memory" if local == 1 else f"one part in {local} of the free memory"
    else:
        # The plan counts the CUDA context with a step's kernels. The bare context exists already, because asking for
        # free memory makes it, and is in what is used: add it back. A step's kernels are not loaded yet.
        held, of_stated = 0, ""
        bare = min(overheads_for(device.type).context_bytes, CUDA.context_bytes)
        free, origin = available + bare, "free on the device"
    free = max(0, free)
    if capacity is None:
        return Room(free, origin, RESERVE)
    stated = Room(max(0, capacity.size_bytes - held), f"train.capacity {capacity.text}{of_stated}")
    return min(stated, Room(free, origin))
