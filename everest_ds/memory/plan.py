"""What one rank of a training run needs, on its device and on the host, before anything is run.

``plan(recipe, ds_config, ranks=8)`` joins three things: the traced step of the very model (trace.py), what DeepSpeed
holds between steps and does within one (states.py, step*.py), and stated overheads (overheads.py).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from everest_ds.config.batches import Batches
from everest_ds.config.ds_config import Facts, resolve_ds_config
from everest_ds.config.ds_keys import ADAM_TYPES
from everest_ds.config.errors import UserError, shown
from everest_ds.config.finetuning import ClassifierConfig, FinetuneRecipe
from everest_ds.config.load import to_tree
from everest_ds.config.schema import ModelConfig, Recipe
from everest_ds.data.ahead import pinned_bytes
from everest_ds.memory.overheads import Overheads, overheads_for
from everest_ds.memory.setting import ZeroSetting
from everest_ds.memory.states import REDUCE_BUCKET, Item, Place, averaged_weights, clips_ahead, states
from everest_ds.memory.step import Step
from everest_ds.memory.step_zero3 import StepZero3
from everest_ds.memory.step_zero12 import StepZero12
from everest_ds.memory.timeline import Curve
from everest_ds.memory.trace import StepTrace, TraceSpec, count_parameters, trace_one_clip, trace_step

log = logging.getLogger(__name__)

_STEPS: dict[int, type[Step]] = {0: Step, 1: StepZero12, 2: StepZero12, 3: StepZero3}
_LARGEST_BATCH = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A rank's memory. Bytes throughout; every dictionary maps an item's name to its bytes."""

    recipe: Recipe
    ds_config: dict[str, Any]
    batches: Batches
    setting: ZeroSetting
    device_type: str
    overheads: Overheads
    trace: StepTrace = field(repr=False)
    states: list[Item] = field(repr=False)
    step: type[Step] = field(repr=False)
    ranks_looked_at: tuple[int, ...] = (0,)

    @cached_property
    def curves(self) -> tuple[Curve, ...]:
        """Bytes over time, per rank looked at, for micro-batches of two and more."""
        return self._run(self.trace)

    @cached_property
    def one_clip_curves(self) -> tuple[Curve, ...]:
        """The same for a micro-batch of one."""
        return self._run(trace_one_clip(self.trace.spec))

    def _run(self, trace: StepTrace) -> tuple[Curve, ...]:
        settings = (dataclasses.replace(self.setting, rank=rank) for rank in self.ranks_looked_at)
        return tuple(self.step(trace, setting, self.states).run() for setting in settings)

    @property
    def predicted_peak_bytes(self) -> int:
        """The device's peak, at the planned micro-batch."""
        return self.peak(self.batches.micro)

    @property
    def device(self) -> dict[str, int]:
        """What the device holds at the peak; sums to :attr:`predicted_peak_bytes`."""
        return self.breakdown(self.batches.micro)

    @cached_property
    def host(self) -> dict[str, int]:
        """What the rank's process holds on the host for the optimizer and the parameters, when they are offloaded."""
        return self._held("host")

    @cached_property
    def nvme(self) -> dict[str, int]:
        """What of the optimizer is in this rank's files, when it is offloaded to NVMe."""
        return self._held("nvme")

    def _held(self, place: Place) -> dict[str, int]:
        items: dict[str, int] = {}
        for item in self.states:
            if item.place == place:
                size = pinned_bytes(item.size_bytes) if item.pinned and self.setting.pin_memory else item.size_bytes
                items[item.name] = items.get(item.name, 0) + size
        return items

    @property
    def process_peak_bytes(self) -> int:
        """Device and host together: what a process that computes on the CPU holds."""
        return self.predicted_peak_bytes + sum(self.host.values())

    @property
    def states_bytes(self) -> int:
        """Held between steps, device and host, without overheads."""
        return self.held_bytes("device", "host")

    def held_bytes(self, *places: Place) -> int:
        """Held between steps in some places, without overheads."""
        held = [item for item in self.states if item.place in places]
        return sum(item.size_bytes + self.batches.micro * item.per_clip_bytes for item in held)

    def peak(self, micro_batch: int) -> int:
        """The device's peak at another micro-batch; no new trace."""
        curves = self.one_clip_curves if micro_batch == 1 else self.curves
        tensors = max(curve.peak(micro_batch, self.overheads.granule_bytes) for curve in curves)
        return tensors + sum(self.overheads.items(self.setting.ranks).values())

    def needed_bytes(self, micro_batch: int) -> int:
        """What must fit a device at another micro-batch: its peak, and on a CPU, one memory, the host's share too."""
        if self.device_type != "cpu":
            return self.peak(micro_batch)
        return self._touched.peak(micro_batch) + sum(self.host.values())

    @cached_property
    def _touched(self) -> Plan:
        """The plan with buckets no larger than all gradients.

        DeepSpeed allocates more, but a CPU has no memory behind pages that nobody writes to.
        """
        filled = min(self.setting.reduce_bucket, self.trace.elements)
        setting = dataclasses.replace(self.setting, reduce_bucket=filled)
        buckets = {item.name: item for item in states(self.trace.parameters, setting, self.trace.buffer_bytes)}
        items = [buckets.get(item.name, item) if item.name == REDUCE_BUCKET else item for item in self.states]
        return dataclasses.replace(self, setting=setting, states=items)

    def peaks(self, micro_batches: Iterable[int]) -> dict[int, int]:
        """The device's peak at each of many micro-batches."""
        return {batch: self.peak(batch) for batch in micro_batches}

    def breakdown(self, micro_batch: int) -> dict[str, int]:
        """What the device holds at the peak, at another micro-batch."""
        granule = self.overheads.granule_bytes
        curves = self.one_clip_curves if micro_batch == 1 else self.curves
        curve = max(curves, key=lambda c: c.peak(micro_batch, granule))
        items = curve.at_peak(micro_batch, granule)
        return dict(sorted(items.items(), key=lambda i: -i[1])) | self.overheads.items(self.setting.ranks)

    def largest_micro_batch(self, capacity_bytes: int) -> int:
        """The largest micro-batch that fits; 0 if not even one clip does."""
        if self.needed_bytes(2) > capacity_bytes:
            return int(self.needed_bytes(1) <= capacity_bytes)
        low, high = 2, 4
        while high < _LARGEST_BATCH and self.needed_bytes(high) <= capacity_bytes:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.needed_bytes(middle) <= capacity_bytes else (low, middle)
        return low

    @property
    def name(self) -> str:
        """What is trained, and how, in a few words."""
        setting, batches = self.setting, self.batches
        return (
            f"{name_of(self.recipe.model)}, {setting.precision}, ZeRO-{setting.stage}, micro-batch {batches.micro} x "
            f"accumulation {batches.accumulation} x ranks {batches.ranks}"
        )

    def describe(self) -> dict[str, Any]:
        """The resolved configuration, as ``--json`` reports it."""
        return {
            "model": to_tree(self.recipe.model),
            "batches": dataclasses.asdict(self.batches) | {"total": self.batches.total},
            "precision": self.setting.precision,
            "zero": dataclasses.asdict(self.setting),
            "device_type": self.device_type,
            "overheads": dataclasses.asdict(self.overheads),
            "parameters": self.trace.elements,
            "ds_config": self.ds_config,
        }


def plan(
    recipe: Recipe,
    ds_config: dict[str, Any],
    *,
    ranks: int,
    device_type: str = "cuda",
    rank: int | None = None,
    overheads: Overheads | None = None,
) -> Plan:
    """Plan one rank's memory.

    Args:
        recipe: the model and the batch (``train.micro_batch`` or ``train.global_batch``); of fine-tuning or
            pre-training, as its type says.
        ds_config: a DeepSpeed JSON as loaded, its "auto" values unfilled.
        ranks: of the run.
        device_type: "cuda" or "cpu".
        rank: whose memory; None: the rank that needs most.
        overheads: besides tensors; None: the stated ones of the device type.

    Raises:
        UserError: recipe and JSON contradict each other, the ranks don't divide the batch, or a classifier's number of
            classes is missing.
    """
    if ranks < 1:
        raise UserError(f"world size: must be positive, got {ranks}")
    facts = facts_for(recipe, ranks, device_type)
    ds, batches = resolve_ds_config(ds_config, recipe, facts)
    _warn_of_other_optimizers(ds)
    setting = ZeroSetting.read(ds, ranks=ranks, on_cpu=device_type == "cpu")
    trace = trace_step(
        TraceSpec.of(
            recipe,
            precision=setting.precision,  # type: ignore[arg-type]
            device_type=device_type,
            module_marks=setting.stage == 3,
        )
    )
    items = states(trace.parameters, dataclasses.replace(setting, rank=rank or 0), trace.buffer_bytes)
    if isinstance(recipe, FinetuneRecipe) and recipe.train.ema_decay:
        items.append(averaged_weights(trace.parameters))
    if device_type != "cpu":
        items.append(clips_ahead(recipe.model))
    return Plan(
        recipe=recipe,
        ds_config=ds,
        batches=batches,
        setting=setting,
        device_type=device_type,
        overheads=overheads or overheads_for(device_type),
        trace=trace,
        states=items,
        step=_STEPS[setting.stage],
        ranks_looked_at=tuple(_ranks_to_look_at(setting)) if rank is None else (rank,),
    )


def _warn_of_other_optimizers(ds: dict[str, Any]) -> None:
    kind = (ds.get("optimizer") or {}).get("type", ADAM_TYPES[0])
    if str(kind).lower() not in ADAM_TYPES:
        log.warning(
            "ds_config optimizer.type: what %s keeps isn't known here; Adam's two moments are counted", shown(kind)
        )


def name_of(model: ModelConfig) -> str:
    """A network in a few words."""
    if isinstance(model, ClassifierConfig):
        return f"{model.size} classifier of {model.classes} classes, keep ratio {model.keep_ratio:g}"
    return f"{model.method} {model.size}"


def device_type_here() -> str:
    """What ranks on this machine compute on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def facts_for(recipe: Recipe, ranks: int, device_type: str) -> Facts:
    """What "auto" values depend on, of a device that may not be here: any GPU since 2020 knows bf16 and fp16."""
    sizes = [elements for _, elements in count_parameters(recipe.model)]
    return Facts(
        parameters=sum(sizes),
        largest=max(sizes),
        width=recipe.model.row.width,
        ranks=ranks,
        on_cpu=device_type == "cpu",
        bf16_supported=True,
        fp16_supported=True,
    )


def _ranks_to_look_at(setting: ZeroSetting) -> list[int]:
    # Under ZeRO-1 and 2 partitions differ by which parameters they hold, and so by when their gradients are kept: the
    # first owns what the backward pass reaches last, the last what it reaches first.
    return sorted({0, setting.ranks // 2, setting.ranks - 1}) if setting.stage in (1, 2) else [0]
