"""The largest micro-batch that fits, per DeepSpeed configuration and checkpointing mode, and which is fastest."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from everest_ds.config.batches import ACCUMULATION, AUTO, GLOBAL, MICRO
from everest_ds.config.errors import UserError
from everest_ds.config.finetuning import FinetuneRecipe, phase_of
from everest_ds.config.schema import Recipe
from everest_ds.memory.arithmetic import FLOPS_PER_MAC, StepMacs, step_macs
from everest_ds.memory.compare import CHECKPOINTING, check_known, plan_any_batch
from everest_ds.memory.gpus import Capacity
from everest_ds.memory.overheads import overheads_for
from everest_ds.memory.plan import Plan, name_of
from everest_ds.models.backbone import use_fused_attention

_GATHERS = 3  # the ZeRO stage that gathers parameters in every pass


@dataclass(frozen=True, kw_only=True)
class FitRow:
    """One DeepSpeed configuration and checkpointing mode; bytes are one rank's, at ``max_micro_batch``.

    ``max_micro_batch`` is 0 where not even one clip fits; the bytes are then those of one clip. ``offload`` is none,
    optimizer or optimizer+param. ``upper_bound_clips_per_s`` is per GPU, from the data sheet's peak rate and the
    step's matrix products by the published count: no run comes near it. None without a named GPU, or where it lacks
    the precision.
    """

    phase: str
    model: str
    method: str
    ds_config: str
    zero: int
    offload: str
    checkpointing: str
    attention: str
    precision: str
    max_micro_batch: int
    max_global_batch: int
    predicted_peak_bytes: int
    host_bytes: int
    forward_macs: int
    recomputed_macs: int
    step_macs: int
    arithmetic: float
    upper_bound_clips_per_s: float | None
    plan: Plan = field(repr=False, compare=False)

    def as_json(self) -> dict[str, Any]:
        """The row's fields, without the plan behind it."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "plan"}


def fit(
    recipe: Recipe,
    ds_configs: Mapping[str, Mapping[str, Any]],
    *,
    ranks: int,
    capacity: Capacity,
    checkpointing: Iterable[str] | None = None,
    accumulation: int = 1,
    device_type: str = "cuda",
    progress: Callable[[str], None] = lambda _: None,
) -> list[FitRow]:
    """Find the largest micro-batch of every combination.

    Args:
        recipe: the model, of pre-training or fine-tuning; its batch numbers and checkpointing mode are left out.
        ds_configs: name to DeepSpeed JSON as loaded.
        ranks: of the run.
        capacity: a device's memory.
        checkpointing: which modes; None: all that differ.
        accumulation: passes per optimizer step.
        device_type: "cuda" or "cpu".
        progress: hears what is being planned.
    """
    modes = modes_of(recipe) if checkpointing is None else tuple(checkpointing)
    check_known("checkpointing", modes, CHECKPOINTING)
    for name, number in (("world size", ranks), ("accumulation", accumulation)):
        if number < 1:
            raise UserError(f"{name}: must be positive, got {number}")
    rows = []
    for mode in modes:
        model = dataclasses.replace(recipe.model, checkpointing=mode)  # type: ignore[arg-type]
        changed = dataclasses.replace(recipe, model=model)
        macs = step_macs(changed.model)
        for name, ds_config in ds_configs.items():
            progress(f"{name_of(changed.model)}, {name}, checkpointing {mode}")
            planned = plan_any_batch(
                changed,
                ds_config,
                ranks=ranks,
                accumulation=accumulation,
                device_type=device_type,
                overheads=overheads_for(device_type, capacity.card),
            )
            rows.append(_row(planned, name, capacity, macs))
    return rows


def at_capacity(rows: Iterable[FitRow], capacity: Capacity) -> list[FitRow]:
    """The same combinations at another memory, without planning again."""
    return [_row(row.plan, row.ds_config, capacity, step_macs(row.plan.recipe.model)) for row in rows]


def modes_of(recipe: Recipe) -> tuple[str, ...]:
    """The checkpointing modes that differ: a classifier has no decoder."""
    return ("none", "encoder") if isinstance(recipe, FinetuneRecipe) else CHECKPOINTING


def fastest(rows: Iterable[FitRow], *, least_micro_batch: int = 1) -> FitRow | None:
    """The row with the least arithmetic per clip among those that fit ``least_micro_batch``; None if none does.

    Between equals: no offload before offload (the host's memory and its CPU Adam are slower), then without ZeRO-3's
    gathering in every pass (what stages 1 and 2 send more than stage 0 they save in Adam's work, within a node), then
    the larger micro-batch.
    """
    able = [row for row in rows if row.max_micro_batch >= least_micro_batch]
    return min(able, key=_cost, default=None)


def _cost(row: FitRow) -> tuple[float, ...]:
    return row.step_macs, row.offload != "none", row.zero == _GATHERS, -row.max_micro_batch, row.zero


def suggested_ds_config(ds_config: Mapping[str, Any], row: FitRow) -> dict[str, Any]:
    """The DeepSpeed JSON of a row with its largest micro-batch filled in; the other batch numbers stay "auto"."""
    batch = {GLOBAL: AUTO, MICRO: row.max_micro_batch, ACCUMULATION: AUTO}
    return batch | {key: value for key, value in copy.deepcopy(dict(ds_config)).items() if key not in batch}


def _row(planned: Plan, name: str, capacity: Capacity, macs: StepMacs) -> FitRow:
    model, setting = planned.recipe.model, planned.setting
    largest = planned.largest_micro_batch(capacity.size_bytes)
    rate = capacity.gpu.rates.get(setting.precision) if capacity.gpu else None
    return FitRow(
        phase=phase_of(planned.recipe),
        model=model.size,
        method=model.method,
        ds_config=name,
        zero=setting.stage,
        offload=_offload(planned),
        checkpointing=model.checkpointing,
        attention=_attention(planned),
        precision=setting.precision,
        max_micro_batch=largest,
        max_global_batch=largest * setting.accumulation * setting.ranks,
        predicted_peak_bytes=planned.peak(max(largest, 1)),
        host_bytes=sum(planned.host.values()),
        forward_macs=macs.forward,
        recomputed_macs=macs.recomputed,
        step_macs=macs.total,
        arithmetic=round(macs.relative, 4),
        upper_bound_clips_per_s=None if rate is None else round(rate / (FLOPS_PER_MAC * macs.total), 1),
        plan=planned,
    )


def _attention(planned: Plan) -> str:
    attention, device_type = planned.recipe.model.attention, planned.device_type
    if device_type == "cpu":  # the faster for each stack of blocks
        return attention
    return "fused" if use_fused_attention(attention, tokens=0, device_type=device_type) else "eager"


def _offload(planned: Plan) -> str:
    parts = {"optimizer": planned.setting.offload_optimizer, "param": planned.setting.offload_param}
    return "+".join(part for part, offloaded in parts.items() if offloaded) or "none"
