"""The settings that are looked at, as rows: a model, clips, and a way to train it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everest_ds.config.ds_config import load_ds_config, with_precision
from everest_ds.config.finetuning import PHASES
from everest_ds.config.load import load_as
from everest_ds.config.schema import Recipe
from everest_ds.gpu_check.cases import Asked
from everest_ds.memory.gpus import GIB

ROOT = Path(__file__).resolve().parents[2]
_DS_CONFIGS = ROOT / "ds_configs"
_TINY_SIZE, _TINY_SIDE, _TINY_CLIPS = "vit_micro", 48, 4


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A row.

    ``clips`` per pass, of ``passes`` per step; ``keys`` of the recipe besides. ``official``: trained as the official
    code does, under fp16 autocast without DeepSpeed. ``in_tiny``: part of the tiny check too, with vit_micro.
    """

    name: str
    size: str = "vit_base"
    method: str = "everest"
    clips: int = 32
    passes: int = 1
    keys: tuple[str, ...] = ()
    phase: str = "pretrain"
    zero: str = "zero2"
    precision: str = "bf16"
    ranks: int = 1
    official: bool = False
    in_tiny: bool = False

    @property
    def slug(self) -> str:
        """The name, for files."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")

    def asked_for(self, asked: Asked) -> bool:
        """Whether the row is part of this check."""
        return self.in_tiny or not asked.tiny

    def recipe(self, asked: Asked, clips: int | None = None) -> Recipe:
        """Return the recipe; at another micro-batch, if one is given."""
        clips = clips or (min(self.clips, _TINY_CLIPS) if asked.tiny else self.clips)
        keys = [f"model.size={_TINY_SIZE if asked.tiny else self.size}"]
        keys.append("model.classes=400" if self.phase == "finetune" else f"model.method={self.method}")
        if asked.tiny and not any(key.startswith("model.image_size") for key in self.keys):
            keys.append(f"model.image_size={_TINY_SIDE}")
        batch = [f"train.micro_batch={clips}", f"train.global_batch={clips * self.passes * self.ranks}"]
        return load_as(PHASES[self.phase], None, [*keys, *self.keys, *batch])

    def ds_config(self) -> dict[str, Any]:
        """Return the DeepSpeed JSON."""
        return with_precision(load_ds_config(_DS_CONFIGS / f"{self.zero}.json"), self.precision)


def plain_name(name: str) -> str:
    """Return a card's name, for files."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")


def _name(size: str, method: str, *rest: str) -> str:
    letter = size.removeprefix("vit_")[0].upper()
    return " ".join([f"ViT-{letter}", {"everest": "EVEREST", "videomae": "VideoMAE"}[method], *rest])


def _setting(size: str, method: str, clips: int, *says: str, **fields: Any) -> Setting:
    return Setting(name=_name(size, method, str(clips), *says), size=size, method=method, clips=clips, **fields)


_FUSED, _EAGER = ("model.attention=fused",), ("model.attention=eager",)
STAGES = ("zero0", "zero1", "zero2", "zero3")
B, L, H = "vit_base", "vit_large", "vit_huge"

MEMORY = (
    *(_setting(B, "everest", 32, zero, keys=_FUSED, zero=zero, in_tiny=True) for zero in STAGES[:-1]),
    _setting(B, "everest", 32, "fp32", keys=_FUSED, precision="fp32", in_tiny=True),
    _setting(B, "everest", 32, "fp16", keys=_FUSED, precision="fp16", in_tiny=True),
    _setting(B, "everest", 32, "2 passes", keys=_FUSED, passes=2, in_tiny=True),
    _setting(B, "everest", 32, "eager", keys=_EAGER),
    _setting(B, "videomae", 32, "eager", keys=_EAGER, in_tiny=True),
    _setting(B, "videomae", 32, keys=_FUSED),
    _setting(L, "everest", 32, keys=_FUSED),
    _setting(L, "videomae", 32, keys=_FUSED),
    _setting(L, "everest", 128, keys=_FUSED),
    _setting(B, "everest", 256, "checkpointing encoder", keys=(*_FUSED, "model.checkpointing=encoder")),
    _setting(B, "everest", 256, "checkpointing full", keys=(*_FUSED, "model.checkpointing=full"), in_tiny=True),
    Setting(
        name="ViT-B fine-tuning 16, all tokens, MixUp",
        clips=16,
        phase="finetune",
        keys=(*_FUSED, "model.keep_ratio=1.0", "augment.cutmix=0"),
        in_tiny=True,
    ),
    Setting(
        name="ViT-B fine-tuning 16, 0.6 of the tokens, EMA",
        clips=16,
        phase="finetune",
        keys=(*_FUSED, "model.keep_ratio=0.6", "train.ema_decay=0.9999"),
        in_tiny=True,
    ),
    _setting(B, "everest", 32, "official", keys=_EAGER, precision="fp16", official=True, in_tiny=True),
    _setting(B, "videomae", 32, "official", keys=_EAGER, precision="fp16", official=True),
    _setting(B, "everest", 32, "torch's Adam", keys=(*_FUSED, "optim.implementation=torch"), in_tiny=True),
    _setting(H, "everest", 32, "checkpointing full", keys=(*_FUSED, "model.checkpointing=full")),
    # Last: DeepSpeed doesn't let go of a ZeRO-3 engine, and what it keeps is in the segments of those after it.
    _setting(B, "everest", 32, STAGES[-1], keys=_FUSED, zero=STAGES[-1], in_tiny=True),
)
MEMORY_8 = tuple(
    _setting(B, "everest", 32, zero, "rank 0 of 8", keys=_FUSED, zero=zero, ranks=8, in_tiny=True) for zero in STAGES
)
SPEED = tuple(
    _setting(size, method, 256, "speed", keys=_FUSED, in_tiny=size == B)
    for size in (B, L, "vit_small", H)
    for method in ("everest", "videomae")
)
# On a CPU a clip must take more than what a process holds besides: 320 MiB in attention's matrices of 2048 x 2048.
EDGE_TINY = Setting(
    name="128 px, eager",
    method="videomae",
    clips=1,
    keys=(*_EAGER, "model.image_size=128"),
    precision="fp32",
    in_tiny=True,
)
EDGE = (_setting(B, "everest", 1, "edge", keys=_FUSED), EDGE_TINY)


def edge_capacity_bytes(asked: Asked) -> int:
    """Return what the edge is looked for at: a card of 16 GiB, or what a process may take beyond its libraries."""
    return GIB if asked.tiny else 16 * GIB
