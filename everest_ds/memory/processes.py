"""What ranks that compute on the CPU take together: their plans, their interpreters, and the launcher's."""

from __future__ import annotations

from everest_ds.memory.plan import Plan

_MIB = 2**20
# Memory of a process's own, no file's, so that pages of libraries don't count. Measured (Anonymous in
# /proc/PID/smaps_rollup, torch 2.14, DeepSpeed 0.19): `memprof measure` of ViT-micro on two ranks under zero3_offload,
# less its tensors; and DeepSpeed's two launching processes together.
RANK_BYTES = 512 * _MIB
LAUNCHER_BYTES = 600 * _MIB


def together_bytes(planned: Plan) -> int:
    """Return what all ranks of a plan take on one machine.

    What the C library keeps of freed memory comes on top, unless it is told to give it back (``memprof measure
    --trim``).
    """
    ranks = planned.setting.ranks
    return ranks * (planned.process_peak_bytes + RANK_BYTES) + LAUNCHER_BYTES
