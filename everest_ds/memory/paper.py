"""Every published GFLOP and memory figure beside ours, and which of the paper's claims hold in which setting.

Memory is that of tensors: no CUDA context, no communication library, no fragmentation. The paper doesn't say whether
its figures are allocated, reserved or driver-reported, so residuals are shown and nothing is fitted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from everest_ds.config.finetuning import ClassifierConfig, FinetuneRecipe
from everest_ds.config.load import build
from everest_ds.config.schema import ModelConfig, Recipe
from everest_ds.memory.gpus import GB
from everest_ds.memory.official import official_plan
from everest_ds.memory.overheads import NONE
from everest_ds.memory.plan import Plan, plan
from everest_ds.memory.published import (
    CLASSES,
    COMPUTE,
    MEMORY,
    NODE_GPUS,
    RECIPE_KEEP_RATIO,
    TABLE3_BATCHES,
    Compute,
    Memory,
)
from everest_ds.models import MaskedAutoencoder, VideoClassifier
from everest_ds.models.flops import forward_macs

Progress = Callable[[str], None]
Rows = list[dict[str, Any]]

DECODER_DEPTHS = (4, 12)  # the official EVEREST scripts', and VideoMAE's own recipes for ViT-L and ViT-H
# What the two kinds of attention stand for.
PRACTICES = {
    "eager": "official code: DDP, fp16 autocast, materialised attention, fp32 softmax",
    "fused": "today: DeepSpeed ZeRO-2, bf16, fused attention",
}
_GIGA = 10**9
# "3.9 x" holds within 15 %.
RATIO_RANGE = (3.3, 4.5)


def gflops_rows(figures: Iterable[Compute] = COMPUTE, progress: Progress = lambda _: None) -> Rows:
    """Published and our own giga multiply-accumulates, counted on the models."""
    rows = []
    for figure in figures:
        progress(f"table {figure.table}: compute of {figure.method} {figure.model}, {figure.phase}")
        # The same setting stands in several tables; it is counted once.
        ours = _macs(dataclasses.replace(figure, table=0, published=0.0)) / _GIGA
        rows.append(
            {
                "table": figure.table,
                "phase": figure.phase,
                "method": figure.method,
                "model": figure.model,
                "keep_ratio": figure.keep_ratio,
                "visible_ratio": figure.visible_ratio if figure.phase == "pretrain" else figure.keep_ratio,
                "frames": figure.frames,
                "published": figure.published,
                "ours": round(ours, 3),
                "difference": round(ours / figure.published - 1, 5),
            }
        )
    return rows


def keep_ratio_note(rows: Rows) -> str:
    """Say which keep ratio Table 1's EVEREST row is of, from the rows of :func:`gflops_rows`."""
    figures = [f for f in COMPUTE if (f.table, f.phase, f.method) == (1, "pretrain", "everest")]
    at_recipe = gflops_rows(dataclasses.replace(figure, keep_ratio=RECIPE_KEEP_RATIO) for figure in figures)
    reproduced = [row for row in rows if (row["table"], row["phase"], row["method"]) == (1, "pretrain", "everest")]
    return (
        f"Table 1's EVEREST pre-training row ({_figures(reproduced, 'published')}) is that of a keep ratio of "
        f"{figures[0].keep_ratio} (ours: {_figures(reproduced, 'ours')}); at the {RECIPE_KEEP_RATIO} of Table 7, the "
        f"recipes', it would be {_figures(at_recipe, 'ours')}"
    )


def _figures(rows: Rows, key: str) -> str:
    return ", ".join(f"{row[key]:.4g}" for row in rows)


@lru_cache(maxsize=64)
def _macs(figure: Compute) -> int:
    if figure.phase == "finetune":
        return forward_macs(
            VideoClassifier,
            ClassifierConfig(size=figure.model, keep_ratio=figure.keep_ratio, frames=figure.frames, classes=CLASSES),
        )
    config = ModelConfig(
        method=figure.method,  # type: ignore[arg-type]
        size=figure.model,
        keep_ratio=figure.keep_ratio,
        visible_ratio=figure.visible_ratio,
        frames=figure.frames,
    )
    return forward_macs(MaskedAutoencoder, config)


def memory_rows(
    zero2: dict[str, Any],
    *,
    figures: Iterable[Memory] = MEMORY,
    attentions: Iterable[str] = tuple(PRACTICES),
    depths: Iterable[int] = DECODER_DEPTHS,
    progress: Progress = lambda _: None,
) -> Rows:
    """Published and predicted GB of a node, for each decoder depth and each of :data:`PRACTICES`.

    Args:
        zero2: ds_configs/zero2.json, for the fused rows.
        figures: which published figures.
        attentions: "eager", "fused" or both.
        depths: of the decoder; a classifier (Table 5) has none.
        progress: hears what is being traced.
    """
    figures, depths = list(figures), list(depths)
    rows = []
    for attention in attentions:
        plans: dict[tuple[Any, ...], Plan] = {}
        for figure in figures:
            for depth in depths if figure.classes is None else [None]:
                key = (figure.method, figure.model, figure.keep_ratio, figure.classes, depth)
                if key not in plans:
                    progress(
                        f"table {figure.table}: {figure.method} {figure.model}, decoder depth {depth}, {attention}"
                    )
                    plans[key] = _plan(figure, depth, attention, zero2)
                rows.append(_memory_row(figure, depth, attention, plans[key]))
    return rows


def _plan(figure: Memory, depth: int | None, attention: str, zero2: dict[str, Any]) -> Plan:
    decoder = {} if depth is None else {"decoder_depth": depth}
    recipe = _recipe(figure, {"attention": attention, **decoder})
    if attention == "eager":
        return official_plan(recipe, ranks=NODE_GPUS, overheads=NONE)
    return plan(recipe, zero2, ranks=NODE_GPUS, overheads=NONE)


def _recipe(figure: Memory, model_keys: dict[str, Any]) -> Recipe:
    keys = {"size": figure.model, "keep_ratio": figure.keep_ratio, **model_keys}
    if figure.classes is None:
        return build(Recipe, {"model": {"method": figure.method, **keys}, "train": {"micro_batch": 1}})
    return build(FinetuneRecipe, {"model": {"classes": figure.classes, **keys}, "train": {"micro_batch": 1}})


def _memory_row(figure: Memory, depth: int | None, attention: str, planned: Plan) -> dict[str, Any]:
    peak_bytes = planned.peak(figure.global_batch // NODE_GPUS)
    node_gb = round(peak_bytes * NODE_GPUS / GB, 1)
    fits = peak_bytes <= figure.capacity_gb * GB
    return {
        "table": figure.table,
        "method": figure.method,
        "model": figure.model,
        "global_batch": figure.global_batch,
        "decoder_depth": depth,
        "attention": attention,
        "published_gb": figure.published_gb,
        "ours_gb": node_gb if fits else None,
        # What it would take if it fitted, so that an out-of-memory cell hides nothing.
        "predicted_gb": node_gb,
        "residual_gb": None if figure.published_gb is None else round(node_gb - figure.published_gb, 1),
        "capacity_gb": figure.capacity_gb * NODE_GPUS,
        "practice": PRACTICES[attention],
    }


@dataclass(frozen=True)
class Setting:
    """Where a claim is looked at: the decoder depths of both methods, and the attention."""

    videomae_depth: int
    everest_depth: int
    attention: str

    def __str__(self) -> str:
        same = self.videomae_depth == self.everest_depth
        depths = (
            f"decoder depth {self.videomae_depth}"
            if same
            else f"decoder depth {self.videomae_depth} (VideoMAE) and {self.everest_depth} (EVEREST)"
        )
        return f"{depths}; {PRACTICES[self.attention]}"


SETTINGS = tuple(Setting(v, e, attention) for attention in PRACTICES for v, e in ((4, 4), (12, 12), (12, 4)))


def claims_rows(memory: Rows) -> Rows:
    """Which of the paper's claims hold, in each setting that ``memory`` (of :func:`memory_rows`) covers."""
    return [
        {
            "claim": claim,
            "setting": str(setting),
            "holds": holds,
            "found": found,
            "videomae_decoder_depth": setting.videomae_depth,
            "everest_decoder_depth": setting.everest_depth,
            "attention": setting.attention,
        }
        for setting in SETTINGS
        if (cells := _table3_cells(memory, setting))
        for claim, holds, found in _judge(cells)
    ]


Cells = dict[tuple[str, str, int], dict[str, Any]]


def _table3_cells(memory: Rows, setting: Setting) -> Cells:
    depths = {"videomae": setting.videomae_depth, "everest": setting.everest_depth}
    return {
        (row["method"], row["model"], row["global_batch"]): row
        for row in memory
        if row["table"] == 3 and row["attention"] == setting.attention and row["decoder_depth"] == depths[row["method"]]
    }


def _judge(cells: Cells) -> Iterator[tuple[str, bool, str]]:
    ratio = cells["videomae", "vit_large", 256]["predicted_gb"] / cells["everest", "vit_large", 256]["predicted_gb"]
    yield (
        "ViT-L at batch 256: VideoMAE takes 3.9 x EVEREST's memory (within 15 %)",
        RATIO_RANGE[0] <= ratio <= RATIO_RANGE[1],
        f"{ratio:.2f} x",
    )
    large = [("videomae", model, b) for model in ("vit_base", "vit_large") for b in TABLE3_BATCHES if b >= 512]
    yield _claim(cells, "VideoMAE B and L don't fit at 512 or more", large, fits=False)
    printed = [key for key, row in cells.items() if key[0] == "videomae" and row["published_gb"] is not None]
    yield _claim(cells, "VideoMAE fits wherever Table 3 prints a number", printed, fits=True)
    yield _claim(cells, "EVEREST fits everywhere", [key for key in cells if key[0] == "everest"], fits=True)
    off = [key for key, row in cells.items() if (row["published_gb"] is None) != (row["ours_gb"] is None)]
    found = f"{len(cells) - len(off)} of {len(cells)} cells"
    yield "all cells of Table 3 fit or don't, as printed", not off, found + (f"; not {_list(off)}" if off else "")


def _claim(cells: Cells, claim: str, keys: list[tuple[str, str, int]], *, fits: bool) -> tuple[str, bool, str]:
    against = [key for key in keys if (cells[key]["ours_gb"] is not None) != fits]
    found = f"{'out of memory' if fits else 'fitting'}: {_list(against)}" if against else f"all {len(keys)} cells"
    return claim, not against, found


def _list(keys: list[tuple[str, str, int]]) -> str:
    return ", ".join(f"{method} {model.removeprefix('vit_')} {batch}" for method, model, batch in keys)
