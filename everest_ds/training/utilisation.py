"""The MFU of a run: of which peak, and by which count."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from everest_ds.config.ds_config import products_precision
from everest_ds.config.schema import Recipe
from everest_ds.memory.arithmetic import step_flops
from everest_ds.memory.utilisation import mfu, peak_of
from everest_ds.training import ranks


class Utilisation(NamedTuple):
    """``mfu`` makes a share of the peak from all ranks' clips/s, None where no peak is known; ``said`` at the start."""

    mfu: Callable[[float], float] | None
    said: list[str]


def utilisation(recipe: Recipe, ds_config: dict[str, Any]) -> Utilisation:
    """Count a run's arithmetic, which takes a second or two, and find the peak of this rank's device.

    Args:
        recipe: of the run.
        ds_config: the resolved DeepSpeed configuration.
    """
    precision, card = products_precision(ds_config), ranks.device_name()
    peak = peak_of(card, precision, recipe.train.peak_flops)
    if peak is not None:
        flops = step_flops(recipe.model)
        origin = "train.peak_flops" if peak.data_sheet is None else f"{peak.data_sheet}'s data sheet, {precision}"
        line = (
            f"MFU: {flops / 1e9:.4g} GFLOP per clip (backward pass counted, recomputation not), of "
            f"{peak.flops_per_s / 1e12:g} TFLOP/s per device ({origin})"
        )
        return Utilisation(partial(mfu, flops_per_clip=flops, peak=peak, devices=ranks.world_size()), [line])
    if ranks.on_cpu():
        return Utilisation(None, [])
    return Utilisation(
        None, [f"no MFU: the peak of {card} in {precision} is not known here; say it: train.peak_flops=FLOP/s"]
    )
