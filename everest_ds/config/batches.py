"""The batch equation: global batch = micro-batch x accumulation x ranks, from whichever of them are known.

Where the global batch alone is known, ``train.micro_batch=auto`` leaves the other two open: :func:`open_share`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from everest_ds.config.errors import UserError, shown
from everest_ds.config.schema import TrainConfig

AUTO = "auto"
# The DeepSpeed JSON's names for the three numbers.
GLOBAL, MICRO, ACCUMULATION = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"


@dataclass(frozen=True, kw_only=True)
class Batches:
    """Clips per rank per pass, passes per step, and ranks."""

    micro: int
    accumulation: int
    ranks: int

    @property
    def total(self) -> int:
        """The global batch: clips per optimizer step."""
        return self.micro * self.accumulation * self.ranks

    @classmethod
    def resolve(cls, train: TrainConfig, ds: Mapping[str, Any], ranks: int) -> Batches:
        """Solve the equation from the recipe and the DeepSpeed JSON.

        Raises:
            UserError: recipe and JSON disagree, nothing is known, the equation has no solution, or the micro-batch is
                still to be chosen.
        """
        micro = train.micro_batch
        if isinstance(micro, str):
            raise UserError("train.micro_batch: auto is chosen when training starts; give a number of clips here")
        total = _agree("train.global_batch", train.global_batch, GLOBAL, ds)
        micro = _agree("train.micro_batch", micro, MICRO, ds)
        accumulation = _agree("", None, ACCUMULATION, ds)
        if total is None and micro is None:
            raise UserError("batch: set train.global_batch or train.micro_batch (clips)")
        if total is None:
            return cls(micro=micro or 0, accumulation=accumulation or 1, ranks=ranks)
        if micro is None:
            micro = total // ((accumulation or 1) * ranks)
        if accumulation is None:
            accumulation = total // (micro * ranks) if micro else 0
        if micro and not accumulation:
            raise UserError(
                f"batch: {ranks} ranks with a micro-batch of {micro} take {micro * ranks} clips in one pass, more than "
                f"the global batch of {total}; change {GLOBAL}, train.global_batch, train.micro_batch or the ranks"
            )
        if micro * accumulation * ranks != total or not total:
            raise UserError(
                f"batch: global batch {total} is not micro-batch {micro} x accumulation {accumulation} x ranks {ranks} "
                f"= {micro * accumulation * ranks}; change train.global_batch, train.micro_batch or the number of ranks"
            )
        return cls(micro=micro, accumulation=accumulation, ranks=ranks)

    def as_deepspeed(self) -> dict[str, int]:
        """The three numbers under DeepSpeed's names."""
        return {GLOBAL: self.total, MICRO: self.micro, ACCUMULATION: self.accumulation}


def open_share(train: TrainConfig, ds: Mapping[str, Any], ranks: int, unit: int) -> int:
    """Return a rank's clips per step, of which ``train.micro_batch=auto`` is to be a part.

    Args:
        train: the recipe's batches.
        ds: the DeepSpeed JSON, "auto" values unfilled.
        ranks: of the run.
        unit: clips that stay together, ``data.clips_per_video``: the smallest micro-batch.

    Raises:
        UserError: the global batch isn't known, can't be shared out so, or the JSON leaves nothing open.
    """
    key = "train.micro_batch=auto"
    total = _agree("train.global_batch", train.global_batch, GLOBAL, ds)
    if total is None:
        raise UserError(f"{key}: give train.global_batch (clips per step over all ranks), which it is to be a part of")
    for name in (MICRO, ACCUMULATION):
        if ds.get(name, AUTO) != AUTO:
            raise UserError(f"{key}: ds_config {name} = {shown(ds[name])} leaves nothing to choose; use 'auto' there")
    if total % (ranks * unit):
        videos = f" x data.clips_per_video {unit}" if unit > 1 else ""
        raise UserError(
            f"{key}: global batch {total} is not a multiple of ranks {ranks}{videos} = {ranks * unit}; change "
            "train.global_batch or the number of ranks"
        )
    return total // ranks


def largest_divisor(number: int, at_most: int, multiple_of: int = 1) -> int:
    """Return the largest divisor of a number up to a limit that is a multiple of another; 0 if there is none."""
    highest = min(number, at_most) // multiple_of * multiple_of
    return next((size for size in range(highest, 0, -multiple_of) if number % size == 0), 0)


def _agree(recipe_key: str, recipe_value: int | None, ds_key: str, ds: Mapping[str, Any]) -> int | None:
    ds_value = ds.get(ds_key, AUTO)
    if ds_value == AUTO:
        return recipe_value
    if not isinstance(ds_value, int) or isinstance(ds_value, bool) or ds_value < 1:
        raise UserError(f"ds_config {ds_key}: expected a positive whole number or 'auto', got {shown(ds_value)}")
    if recipe_value not in (None, ds_value):
        raise UserError(f"ds_config {ds_key} = {ds_value} contradicts {recipe_key} = {recipe_value}; use 'auto' in one")
    return ds_value
