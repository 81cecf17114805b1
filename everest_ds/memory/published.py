"""The paper's published compute and memory, as printed (EVEREST, ICML 2024, arXiv 2211.10636). None: out of memory.

Compute is in giga multiply-accumulates of one clip's forward pass; memory in GB (1e9) over a node of 8 GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

NODE_GPUS = 8
TABLE3_CAPACITY_GB = 80  # A100-80GB
TABLE4_CAPACITY_GB = 48  # A6000
TABLE3_BATCHES = (128, 256, 512, 1024)
RECIPE_KEEP_RATIO = 0.3  # pre-training, Table 7
# Tables 1, 3 and 5 are on Kinetics-400.
CLASSES = 400


@dataclass(frozen=True, kw_only=True)
class Compute:
    """A published compute figure. ``keep_ratio`` is the one that reproduces it; VideoMAE keeps every token."""

    table: int
    phase: str
    method: str
    model: str
    published: float
    keep_ratio: float
    visible_ratio: float = 0.1
    frames: int = 16


@dataclass(frozen=True, kw_only=True)
class Memory:
    """A published memory figure. ``keep_ratio`` is that of Tables 7 and 8, the paper's recipes."""

    table: int
    method: str
    model: str
    global_batch: int
    published_gb: float | None
    capacity_gb: int
    classes: int | None = None
    keep_ratio: float = RECIPE_KEEP_RATIO


_SIZES = ("vit_small", "vit_base", "vit_large")


def _row(table: int, phase: str, method: str, keep_ratio: float, published: tuple[float, ...]) -> list[Compute]:
    cells = zip(_SIZES, published, strict=True)
    return [
        Compute(table=table, phase=phase, method=method, model=size, published=gmacs, keep_ratio=keep_ratio)
        for size, gmacs in cells
    ]


def _base(table: int, phase: str, published: float, keep_ratio: float, **rest: float) -> Compute:
    method = "videomae" if keep_ratio == 1 else "everest"
    fields = {"table": table, "phase": phase, "method": method, "model": "vit_base", **rest}
    return Compute(published=published, keep_ratio=keep_ratio, **fields)  # type: ignore[arg-type]


COMPUTE: tuple[Compute, ...] = (
    *_row(1, "pretrain", "videomae", 1.0, (11.6, 35.5, 83.1)),
    # Matches a keep ratio of 0.4, not the RECIPE_KEEP_RATIO that Table 7 gives for this training.
    *_row(1, "pretrain", "everest", 0.4, (6.3, 21.5, 60.8)),
    *_row(1, "finetune", "videomae", 1.0, (57.0, 180.5, 597.2)),
    *_row(1, "finetune", "everest", 0.6, (29.1, 98.1, 330.0)),
    *(_base(10, "pretrain", gmacs, keep) for keep, gmacs in ((0.5, 23.43), (0.4, 21.54), (0.3, 19.81), (0.2, 18.22))),
    _base(10, "pretrain", 57.50, 1.0, visible_ratio=0.25),
    _base(10, "pretrain", 35.48, 1.0),
    *(
        _base(10, "finetune", gmacs, keep)
        for keep, gmacs in ((1.0, 180.5), (0.8, 137.5), (0.7, 117.3), (0.6, 98.1), (0.5, 79.8))
    ),
    _base(12, "pretrain", 30.65, 0.3, frames=24),
    _base(12, "finetune", 159.4, 0.6, frames=24),
)

_TABLE3: dict[tuple[str, str], tuple[float | None, ...]] = {
    ("videomae", "vit_small"): (71.9, 117.4, 233.6, 443.6),
    ("videomae", "vit_base"): (258.4, 486.4, None, None),
    ("videomae", "vit_large"): (353.9, 634.1, None, None),
    ("everest", "vit_small"): (31.9, 59.9, 95.6, 173.1),
    ("everest", "vit_base"): (60.0, 91.2, 151.2, 273.6),
    ("everest", "vit_large"): (117.3, 164.1, 258.9, 428.4),
}


def _table3(method: str, model: str, cells: tuple[float | None, ...]) -> list[Memory]:
    return [
        Memory(
            table=3,
            method=method,
            model=model,
            global_batch=batch,
            published_gb=published_gb,
            capacity_gb=TABLE3_CAPACITY_GB,
        )
        for batch, published_gb in zip(TABLE3_BATCHES, cells, strict=True)
    ]


def _base_at_128(table: int, method: str, published_gb: float, capacity_gb: int, **rest: float) -> Memory:
    fields = {"table": table, "method": method, "model": "vit_base", "global_batch": 128, **rest}
    return Memory(published_gb=published_gb, capacity_gb=capacity_gb, **fields)  # type: ignore[arg-type]


MEMORY: tuple[Memory, ...] = (
    *chain.from_iterable(_table3(method, model, cells) for (method, model), cells in _TABLE3.items()),
    _base_at_128(4, "videomae", 150.3, TABLE4_CAPACITY_GB),
    _base_at_128(4, "everest", 66.3, TABLE4_CAPACITY_GB),
    # Fine-tuning; "videomae" stands for all tokens. The paper doesn't name the GPUs of Table 5: those of Table 3.
    _base_at_128(5, "videomae", 362.5, TABLE3_CAPACITY_GB, classes=CLASSES, keep_ratio=1.0),
    _base_at_128(5, "everest", 178.4, TABLE3_CAPACITY_GB, classes=CLASSES, keep_ratio=0.6),
)
