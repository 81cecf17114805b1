"""MFU (model FLOPs utilisation): the share of the devices' dense peak that training's arithmetic comes to."""

from __future__ import annotations

from dataclasses import dataclass

from everest_ds.memory.gpus import gpu_of_card


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The dense FLOP/s of one device in one precision; ``data_sheet``: the GPU's whose it is, None: a user's number."""

    flops_per_s: float
    data_sheet: str | None


def peak_of(card: str, precision: str, stated: float | None = None) -> Peak | None:
    """Return a device's peak: the stated one, or its data sheet's; None where neither is there.

    Args:
        card: what the driver calls the device.
        precision: that matrix products compute in: bf16, fp16 or fp32.
        stated: FLOP/s, ``train.peak_flops``.
    """
    if stated is not None:
        return Peak(flops_per_s=stated, data_sheet=None)
    gpu = gpu_of_card(card)
    if gpu is None or precision not in gpu.rates:
        return None
    return Peak(flops_per_s=gpu.rates[precision], data_sheet=gpu.name)


def mfu(clips_per_s: float, *, flops_per_clip: float, peak: Peak, devices: int) -> float:
    """Return the MFU of devices that train on so many clips per second together.

    ``flops_per_clip`` is :func:`everest_ds.memory.arithmetic.step_flops`: recomputation doesn't count as work.
    """
    return clips_per_s * flops_per_clip / (devices * peak.flops_per_s)
