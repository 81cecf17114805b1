"""Predicted beside measured: what of a plan a meter can see, and what a run's ``memory.json`` says."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from everest_ds.memory.gpus import size
from everest_ds.memory.plan import Plan
from everest_ds.memory.states import Place

OTHER = "other"
Items = dict[str, int]

_RESIDENT = (
    "resident set",
    "growth of the process's resident set since before the model was built: with libraries loaded on first use, "
    "batches of clips, checkpoints and validations, and freed memory that the C library keeps",
)
_ALLOCATED = (
    "device allocator",
    "the allocator's blocks since before the model was built: with checkpoints and validations",
)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one rank held between steps at the end of a run, and its peak. Bytes.

    ``held_bytes``: tensors of the device, without those that were there before; ``held``: by place ("device" or
    "host"; on a CPU all is the device's) and item, what is none of them as :data:`OTHER`. ``peak_bytes``: growth of the
    resident set (CPU), or the highest that the device's allocator had given out, which had reserved ``reserved_bytes``.
    """

    rank: int
    held_bytes: int
    held: dict[str, Items]
    peak_bytes: int
    reserved_bytes: int | None = None


def seen_peak_bytes(planned: Plan) -> int:
    """Return what a meter sees of a plan's peak: tensors of the device, on a CPU those of the host too.

    The allocator knows nothing of the context and of NCCL.
    """
    if planned.device_type == "cpu":
        return planned.process_peak_bytes
    outside = sum(planned.overheads.items(planned.setting.ranks).values()) - planned.overheads.libraries_bytes
    return planned.predicted_peak_bytes - outside


def _growth_or_blocks(planned: Plan) -> int:
    """Return what of a plan's peak :attr:`Measured.peak_bytes` is to be held against."""
    on_cpu = planned.device_type == "cpu"
    return planned.needed_bytes(planned.batches.micro) if on_cpu else seen_peak_bytes(planned)


def seen_held_bytes(planned: Plan) -> int:
    """Return what a meter sees of what is held between steps: on a CPU the host's memory is the device's."""
    return planned.held_bytes(*_places(planned)["device"])


def held_items(planned: Plan) -> dict[str, Items]:
    """Return what is held between steps by place and item, as in :attr:`Measured.held`."""
    found: dict[str, Items] = {}
    for name, places in _places(planned).items():
        for item in planned.states:
            if item.place in places:
                there = found.setdefault(name, {})
                size_bytes = item.size_bytes + planned.batches.micro * item.per_clip_bytes
                there[item.name] = there.get(item.name, 0) + size_bytes
    return found


def _places(planned: Plan) -> dict[str, tuple[Place, ...]]:
    return (
        {"device": ("device", "host")} if planned.device_type == "cpu" else {"device": ("device",), "host": ("host",)}
    )


def difference(predicted: int, measured: int) -> dict[str, Any]:
    """Return measured less predicted, in bytes and as a share of what was measured."""
    return {
        "predicted_bytes": predicted,
        "measured_bytes": measured,
        "bytes": measured - predicted,
        "share": (measured - predicted) / max(measured, 1),
    }


def as_record(planned: Plan, per_rank: Sequence[Measured], *, steps: Iterable[int]) -> dict[str, Any]:
    """Return what ``memory.json`` holds: rank 0's tensors, and the peak of the rank that needed most.

    Args:
        planned: rank 0's plan.
        per_rank: what each rank measured.
        steps: the step that the run began, or went on, from, and its last.
    """
    by, peak_of = _RESIDENT if planned.device_type == "cpu" else _ALLOCATED
    first, most = per_rank[0], max(per_rank, key=lambda measured: measured.peak_bytes)
    predicted_items = held_items(planned)
    reserved = {} if most.reserved_bytes is None else {"peak_reserved_bytes": most.reserved_bytes}
    return {
        "run": planned.name,
        "steps": list(steps),
        "predicted": {
            "peak_bytes": planned.predicted_peak_bytes,
            "held_bytes": planned.held_bytes("device", "host"),
            "held": predicted_items,
            "device": planned.device,
            "host": planned.host,
            "nvme": planned.nvme,
        },
        "measured": {
            "by": by,
            "held_bytes": first.held_bytes,
            "held": first.held,
            "peak_bytes": most.peak_bytes,
            **reserved,
            "peak_rank": most.rank,
            "peak_of": peak_of,
        },
        "difference": {
            "held": difference(seen_held_bytes(planned), first.held_bytes),
            "peak": difference(_growth_or_blocks(planned), most.peak_bytes),
            "items": {place: _by_item(items, first.held.get(place, {})) for place, items in predicted_items.items()},
        },
        "not_measured": "what the peak is made of, items in files (nvme)",
        "per_rank": [dataclasses.asdict(measured) for measured in per_rank],
    }


def _by_item(predicted: Items, measured: Items) -> dict[str, Any]:
    names = dict.fromkeys((*predicted, *measured))
    return {name: difference(predicted.get(name, 0), measured.get(name, 0)) for name in names}


def in_a_line(record: Mapping[str, Any]) -> str:
    """Return what a record says, for people."""
    measured, (held, peak) = record["measured"], (record["difference"][name] for name in ("held", "peak"))
    told = f"memory: held between steps {_in_words(held)} ({held['share']:+.1%}); "
    if "peak_reserved_bytes" in measured:
        reserved = size(measured["peak_reserved_bytes"])
        return f"{told}peak allocated {_in_words(peak)} ({peak['share']:+.1%}), reserved {reserved}"
    # No share: it holds more than the plan speaks of.
    return f"{told}the resident set grew by {_in_words(peak)} of tensors"


def _in_words(pair: Mapping[str, Any]) -> str:
    return f"{size(pair['measured_bytes'])}, predicted {size(pair['predicted_bytes'])}"
