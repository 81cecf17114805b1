"""Really run steps and read memory's meters: what was predicted is measured here, with the very same engine.

One process per rank, started by the deepspeed launcher: ``deepspeed --module everest_ds.training.measure JOBS OUT``.
Clips are random bytes made in memory; no video is read.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from everest_ds.config.batches import ACCUMULATION, GLOBAL, MICRO
from everest_ds.config.ds_config import zero_stage
from everest_ds.config.errors import one_line_errors
from everest_ds.config.load import build
from everest_ds.config.logs import set_up_logging
from everest_ds.config.schema import Recipe
from everest_ds.memory import meters
from everest_ds.models import MaskedAutoencoder, forward_macs
from everest_ds.models.patches import CHANNELS
from everest_ds.training import ranks
from everest_ds.training.engine import build_pretraining_model, initialise, resolve

# Steps before a step is like the ones to come: Adam makes its states in the first; ZeRO-3 records the order of modules
# in its first two.
_WARM_UP_STEPS = 2
_WARM_UP_STEPS_ZERO3 = 3
_FORWARD_AND_BACKWARD = 3  # the backward pass takes two products for each of the forward's
_MATMUL_SIDE = 1024


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One rank's measurement. Bytes and seconds.

    ``measured_peak_bytes``: of a step, tensor storages (CPU) or the device allocator, as ``measured_by`` says.
    ``states_bytes``: held between steps. ``step_s`` is the median, ``step_spread_s`` the slowest less the fastest.
    ``flops_per_s``: two per multiply-accumulate of matrix products, forward and backward, nothing for recomputation.
    """

    rank: int
    measured_peak_bytes: int
    measured_by: str
    states_bytes: int
    rss_growth_bytes: int
    device_memory: dict[str, int]
    step_s: float
    step_spread_s: float
    clips_per_s: float
    flops_per_s: float
    matmul_flops_per_s: float
    optimizer: str


def measure(recipe: Recipe, raw_ds_config: dict[str, Any], *, steps: int = 3, snapshot: Path | None = None) -> Measured:
    """Build an engine, run steps, and measure this rank; the group must have been joined (``ranks.start``)."""
    # A process may measure several engines, and DeepSpeed leaves parts of an earlier one behind.
    leftover = meters.states_bytes(ranks.device())
    resident = meters.ResidentMeter()
    model = build_pretraining_model(recipe)
    ds, batches = resolve(raw_ds_config, recipe, model)
    built = initialise(model, recipe, ds)
    engine, device = built.engine, ranks.device()
    clips, noise = (t.to(device) for t in synthetic_batch(recipe, model, batches.micro))
    del model

    def step() -> None:
        losses = []  # as training/loop.py holds them
        for _ in range(batches.accumulation):
            loss = engine(clips, noise).loss
            engine.backward(loss)
            losses.append(loss.detach())
            engine.step()

    for _ in range(_WARM_UP_STEPS_ZERO3 if zero_stage(ds) == 3 else _WARM_UP_STEPS):
        step()
    meters.return_free_memory()
    resident.forget_peak()
    seconds = [_timed(step) for _ in range(steps)]
    rss_growth = resident.growth_bytes()
    held = meters.states_bytes(device) - _bytes(clips) - _bytes(noise) - leftover
    with meters.allocator_snapshot(device, snapshot):
        peak, device_memory = _peak(step, device)
    step_s = statistics.median(seconds)
    clips_per_s = batches.micro * batches.accumulation / step_s
    macs = forward_macs(MaskedAutoencoder, recipe.model)
    engine.destroy()
    return Measured(
        rank=ranks.rank(),
        measured_peak_bytes=peak - leftover,
        measured_by="tensor storages" if device.type == "cpu" else "device allocator",
        states_bytes=held,
        rss_growth_bytes=rss_growth,
        device_memory=device_memory,
        step_s=step_s,
        step_spread_s=max(seconds) - min(seconds),
        clips_per_s=clips_per_s,
        flops_per_s=2 * _FORWARD_AND_BACKWARD * macs * clips_per_s,
        matmul_flops_per_s=matmul_rate(device, next(iter(engine.module.parameters())).dtype),
        optimizer=built.optimizer,
    )


def synthetic_batch(recipe: Recipe, model: MaskedAutoencoder, micro_batch: int) -> tuple[Tensor, Tensor]:
    """Random clips, (B, 3, T, H, W) uint8, and the noise that selects their tokens."""
    config = recipe.model
    generator = torch.Generator().manual_seed(recipe.train.seed + ranks.rank())
    shape = (micro_batch, CHANNELS, config.frames, config.image_size, config.image_size)
    clips = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return clips, torch.rand(micro_batch, model.budget.total, generator=generator)


def matmul_rate(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """Floating-point operations per second of square matrix products: the fastest of a few."""
    left, right = (torch.rand(_MATMUL_SIDE, _MATMUL_SIDE, device=device).to(dtype) for _ in range(2))
    best = min(_timed(lambda: left @ right) for _ in range(repeats + 1))
    return 2 * _MATMUL_SIDE**3 / best


def _timed(work: Any) -> float:
    get_accelerator().synchronize()
    start = time.perf_counter()
    work()
    get_accelerator().synchronize()
    return time.perf_counter() - start


def _peak(step: Any, device: torch.device) -> tuple[int, dict[str, int]]:
    if device.type == "cpu":
        with meters.StorageMeter() as meter:
            step()
        return meter.peak_bytes, {}
    with meters.DeviceMeter(device) as device_meter:
        step()
    memory = {
        "allocated_bytes": device_meter.allocated_bytes,
        "reserved_bytes": device_meter.reserved_bytes,
        "driver_bytes": device_meter.driver_bytes,
    }
    return device_meter.allocated_bytes, memory


def _bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def _load_libraries(jobs: list[dict[str, Any]]) -> None:
    """Run a tiny model under each configuration: what is loaded on first use shouldn't count as a job's memory."""
    tiny = build(Recipe, {"model": {"size": "vit_micro", "image_size": 32}, "train": {"micro_batch": 1}})
    for ds_config in {json.dumps(job["ds_config"]): job["ds_config"] for job in jobs}.values():
        batch_free = {key: value for key, value in ds_config.items() if key not in (GLOBAL, MICRO, ACCUMULATION)}
        measure(tiny, batch_free, steps=1)


def main(jobs_file: str, out: str) -> None:
    """Measure every job of a JSON file in this process, one after another; write ``OUT/rank-N.json``.

    The file holds ``jobs`` and ``load_libraries``: whether to run each configuration on a tiny model first.
    """
    set_up_logging()
    asked = json.loads(Path(jobs_file).read_text(encoding="utf-8"))
    jobs = asked["jobs"]
    with one_line_errors("memprof"):
        ranks.start()
        if asked["load_libraries"]:
            _load_libraries(jobs)
        results = []
        for number, job in enumerate(jobs):
            if ranks.is_main():
                print(f"measuring {number + 1}/{len(jobs)}: {job['name']}", file=sys.stderr, flush=True)
            results.append(asdict(measure(build(Recipe, job["recipe"]), job["ds_config"], steps=job["steps"])))
            gc.collect()
        Path(out, f"rank-{ranks.rank()}.json").write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[-2:])
