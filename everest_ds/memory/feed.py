"""How many cores it takes to read clips as fast as GPUs train on them."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from typing import Any

from everest_ds.config.errors import UserError
from everest_ds.config.schema import Recipe
from everest_ds.data.rate import ReadingRate
from everest_ds.memory.arithmetic import step_flops
from everest_ds.memory.gpus import Gpu, gpu_hint, named_gpu

_GPUS = re.compile(r"(?:(\d+)\s*[x*]\s*)?(\S.*)")


@dataclass(frozen=True, kw_only=True)
class Feed:
    """What N GPUs ask for and what a core gives; ``gpu_flops_per_s`` is one GPU's dense peak in ``precision``."""

    gpu: str
    gpus: int
    precision: str
    gpu_flops_per_s: float
    utilisation: float
    step_flops_per_clip: int
    wanted_clips_per_s: float
    clips_per_s_per_core: float
    decode_s: float
    transform_s: float
    cores: int

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def __str__(self) -> str:
        """Two lines for people."""
        return (
            f"{self.gpus} x {self.gpu} at {100 * self.utilisation:.0f} % of {self.gpu_flops_per_s / 1e12:.0f} TFLOP/s "
            f"({self.precision}) train on {self.wanted_clips_per_s:.0f} clips/s.\n"
            f"One core here reads {self.clips_per_s_per_core:.1f} clips/s ({1000 * self.decode_s:.1f} ms decoding and "
            f"{1000 * self.transform_s:.1f} ms cropping per clip): {self.cores} such cores feed them."
        )


def parse_gpus(text: str) -> tuple[int, Gpu]:
    """Read "8xA100-80" or "H100".

    Raises:
        UserError: no such GPU, or none of them.
    """
    match = _GPUS.fullmatch(text.strip())
    count = int(match[1] or 1) if match else 0
    name = match[2] if match else ""
    gpu = named_gpu(name)
    if count < 1 or gpu is None:
        hint = gpu_hint(name) if gpu is None else ""
        raise UserError(f"--gpus: expected a number and a GPU, such as 8xA100-80, got '{text}'{hint}")
    return count, gpu


def feed(recipe: Recipe, rate: ReadingRate, *, gpus: int, gpu: Gpu, utilisation: float) -> Feed:
    """Return how many cores that read at ``rate`` keep the GPUs busy.

    Args:
        recipe: of the model that is trained.
        rate: measured, with the recipe's data settings.
        gpus: how many.
        gpu: which; its bf16 rate counts, or fp16's where it has none.
        utilisation: share of the peak that training reaches, 0 to 1.

    Raises:
        UserError: the utilisation is no share.
    """
    if not 0 < utilisation <= 1:
        raise UserError(f"--utilisation: must be in (0, 1], got {utilisation:g}")
    precision = "bf16" if "bf16" in gpu.rates else "fp16"
    flops = step_flops(recipe.model)
    wanted = gpus * gpu.rates[precision] * utilisation / flops
    return Feed(
        gpu=gpu.name,
        gpus=gpus,
        precision=precision,
        gpu_flops_per_s=gpu.rates[precision],
        utilisation=utilisation,
        step_flops_per_clip=flops,
        wanted_clips_per_s=wanted,
        clips_per_s_per_core=rate.clips_per_s,
        decode_s=rate.seconds.decode,
        transform_s=rate.seconds.transform,
        cores=math.ceil(wanted / rate.clips_per_s),
    )
