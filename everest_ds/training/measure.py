"""Really run steps and read memory's meters: what was predicted is measured here, with the very same engine.

One process per rank, started by the deepspeed launcher: ``deepspeed --module everest_ds.training.measure JOBS OUT``.
Clips are random bytes made in memory; no video is read.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed.comm
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from everest_ds.config.batches import ACCUMULATION, GLOBAL, MICRO, Batches
from everest_ds.config.ds_config import zero_stage
from everest_ds.config.errors import one_line_errors
from everest_ds.config.finetuning import PHASES, FinetuneRecipe
from everest_ds.config.launcher import follow_launcher
from everest_ds.config.load import build
from everest_ds.config.logs import set_up_logging
from everest_ds.config.schema import Recipe
from everest_ds.data.loader import Batch
from everest_ds.data.to_device import DeviceBatches
from everest_ds.memory import meters
from everest_ds.memory.arithmetic import FLOPS_PER_MAC, step_flops
from everest_ds.memory.objectives import heaviest_mixing, random_batch
from everest_ds.training import ranks
from everest_ds.training.average import Average, build_average
from everest_ds.training.engine import Built, build_model, initialise, resolve
from everest_ds.training.monitors import SECTIONS
from everest_ds.training.objectives import Objective, objective_for

# Steps before a step is like the ones to come: Adam makes its states in the first; ZeRO-3 records the order of modules
# in its first two.
_WARM_UP_STEPS = 2
_WARM_UP_STEPS_ZERO3 = 3
_MATMUL_SIDE, _MATMUL_SIDE_GPU = 1024, 8192  # a GPU is done with the smaller one before it is asked for the next
_MATMULS, _MATMULS_S = 10, 1.0  # at most so many, and no new one after so many seconds
# DeepSpeed's names of its collectives, and what each is one of.
_COLLECTIVES = {
    "all_reduce": "all_reduce",
    "reduce_scatter_tensor": "reduce_scatter",
    "reduce_scatter": "reduce_scatter",
    "all_gather_into_tensor": "all_gather",
    "all_gather": "all_gather",
}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One rank's measurement. Bytes and seconds.

    ``measured_peak_bytes``: of a step, tensor storages (CPU) or the device allocator, as ``measured_by`` says.
    ``states_bytes``: tensors held between steps. ``device_memory``: :class:`everest_ds.memory.meters.DevicePeaks` of a
    step, empty on a CPU. ``step_s`` is the median, ``step_spread_s`` the slowest less the fastest.
    ``flops_per_s``: by :func:`everest_ds.memory.arithmetic.step_flops`.
    ``messages``: bytes of a step's messages by collective, as DeepSpeed's comms logger counts them.
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
    messages: dict[str, int]
    optimizer: str


def measure(recipe: Recipe, raw_ds_config: dict[str, Any], *, steps: int = 3, snapshot: Path | None = None) -> Measured:
    """Build an engine, run steps, and measure this rank; the group must have been joined (``ranks.start``).

    ``snapshot``: where the allocator's history of one step goes, without stacks; None: nowhere.
    """
    device = ranks.device()
    # A process may measure several engines, and DeepSpeed leaves parts of an earlier one behind.
    meters.forget_workspaces(device)
    leftover = meters.states_bytes(device)
    resident = meters.ResidentMeter()
    run = Run.start(recipe, raw_ds_config)
    for _ in range(_WARM_UP_STEPS_ZERO3 if zero_stage(run.ds_config) == 3 else _WARM_UP_STEPS):
        run.step()
    meters.return_free_memory()
    resident.forget_peak()
    seconds = [timed(run.step) for _ in range(steps)]
    rss_growth = resident.growth_bytes()
    with meters.allocator_snapshot(device, snapshot, stacks=False):
        peak, device_peaks = meters.peak_of(run.step, device)
    # Only now: until here the allocator keeps what it reserved, as in training. The plan counts workspaces with a step.
    meters.forget_workspaces(device)
    held = meters.states_bytes(device) - leftover - (_bytes(run.batch) if device.type == "cpu" else 0)
    messages = _messages(run.step)
    step_s = statistics.median(seconds)
    clips_per_s = run.batches.micro * run.batches.accumulation / step_s
    run.built.engine.destroy()
    return Measured(
        rank=ranks.rank(),
        measured_peak_bytes=peak - leftover,
        measured_by="tensor storages" if device.type == "cpu" else "device allocator",
        states_bytes=held,
        rss_growth_bytes=rss_growth,
        device_memory={} if device_peaks is None else dataclasses.asdict(device_peaks.beyond(leftover)),
        step_s=step_s,
        step_spread_s=max(seconds) - min(seconds),
        clips_per_s=clips_per_s,
        flops_per_s=step_flops(recipe.model) * clips_per_s,
        matmul_flops_per_s=matmul_rate(device, next(iter(run.built.engine.module.parameters())).dtype),
        messages=messages,
        optimizer=run.built.optimizer,
    )


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a step needs: as in training/loop.py, but for the same clips at every step."""

    built: Built
    ds_config: dict[str, Any]
    batches: Batches
    objective: Objective
    batch: Batch
    loader: DeviceBatches
    average: Average | None

    @classmethod
    def start(cls, recipe: Recipe, raw_ds_config: dict[str, Any]) -> Run:
        """Build the engine, and clips of random bytes."""
        model = build_model(recipe)
        # No monitors: what is measured is no run.
        unwatched = {key: value for key, value in raw_ds_config.items() if key not in SECTIONS}
        ds_config, batches = resolve(unwatched, recipe)
        built = initialise(model, recipe, ds_config)
        generator = torch.Generator().manual_seed(recipe.train.seed + ranks.rank())
        batch = random_batch(model, batches.micro, generator)
        if not ranks.on_cpu():
            batch = batch._replace(clips=batch.clips.pin_memory())
        return cls(
            built=built,
            ds_config=ds_config,
            batches=batches,
            objective=objective_for(with_heaviest_mixing(recipe)),
            batch=batch,
            loader=DeviceBatches.on(ranks.device(), _Same(batch)),
            average=build_average(built.engine.module, recipe),
        )

    def step(self) -> Tensor:
        """Run one optimizer step; return its mean loss, unread."""
        engine, losses = self.built.engine, []  # losses live as long as in training/loop.py
        for _ in range(self.batches.accumulation):
            loss = self.objective(engine, next(self.loader))
            engine.backward(loss)
            losses.append(loss.detach())
            self.loader.prefetch()
            engine.step()
        if self.average is not None:
            self.average.update()
        return torch.stack(losses).mean()


@dataclass(frozen=True)
class _Same:
    """A source of the same batch, again and again, which is always there."""

    batch: Batch

    def __next__(self) -> Batch:
        return self.batch

    def poll(self) -> Batch:
        """Return it."""
        return self.batch

    def close(self) -> None:
        """There is nothing to end."""


def with_heaviest_mixing(recipe: Recipe) -> Recipe:
    """Return a recipe that mixes in every pass, and in the way that takes most memory: a run meets it soon enough."""
    if not isinstance(recipe, FinetuneRecipe):
        return recipe
    kind = heaviest_mixing(recipe.augment)
    if kind == "none":
        return recipe
    augment = dataclasses.replace(recipe.augment, mix_probability=1.0, cutmix_share=float(kind == "cutmix"))
    return dataclasses.replace(recipe, augment=augment)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of square matrix products: the fastest of a few."""
    side = _MATMUL_SIDE if device.type == "cpu" else _MATMUL_SIDE_GPU
    left, right = (torch.rand(side, side, device=device).to(dtype) for _ in range(2))
    seconds: list[float] = []
    # A CPU without bf16 arithmetic takes seconds for one.
    while len(seconds) < _MATMULS and sum(seconds) < _MATMULS_S:
        seconds.append(timed(lambda: left @ right))
    return FLOPS_PER_MAC * side**3 / min(seconds)


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that something takes, the device waited for."""
    get_accelerator().synchronize()
    start = time.perf_counter()
    work()
    get_accelerator().synchronize()
    return time.perf_counter() - start


def _messages(step: Any) -> dict[str, int]:
    """Return the bytes that a step gives to each collective, by DeepSpeed's comms logger."""
    logger = deepspeed.comm.comm.comms_logger
    before = logger.enabled, logger.prof_all
    deepspeed.comm.reset_log()
    deepspeed.comm.configure(enabled=True, prof_all=True)
    step()
    deepspeed.comm.configure(enabled=before[0], prof_all=before[1])
    found: dict[str, int] = {}
    for operation, records in logger.get_raw_data().items():
        size_bytes = sum(size * record[0] for size, record in records.items())
        if size_bytes:  # a barrier has none
            collective = _COLLECTIVES.get(operation, operation)
            found[collective] = found.get(collective, 0) + size_bytes
    return found


def _bytes(batch: Batch) -> int:
    return sum(tensor.nbytes for tensor in (batch.clips, batch.noise, batch.labels, batch.index))


def _load_libraries(jobs: list[dict[str, Any]]) -> None:
    """Run a tiny model under each configuration: what is loaded on first use shouldn't count as a job's memory."""
    tiny = {"size": "vit_micro", "image_size": 32}
    models = {"pretrain": tiny, "finetune": {**tiny, "classes": 2}}
    different = {json.dumps([job["phase"], job["ds_config"]]): job for job in jobs}
    for job in different.values():
        recipe = build(PHASES[job["phase"]], {"model": models[job["phase"]], "train": {"micro_batch": 1}})
        batch_free = {key: value for key, value in job["ds_config"].items() if key not in (GLOBAL, MICRO, ACCUMULATION)}
        measure(recipe, batch_free, steps=1)


def main(jobs_file: str, out: str) -> None:
    """Measure every job of a JSON file in this process, one after another; write ``OUT/rank-N.json``.

    The file holds ``jobs`` and ``load_libraries``: whether to run each configuration on a tiny model first.
    """
    follow_launcher()
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
            recipe = build(PHASES[job["phase"]], job["recipe"])
            results.append(dataclasses.asdict(measure(recipe, job["ds_config"], steps=job["steps"])))
            gc.collect()
        Path(out, f"rank-{ranks.rank()}.json").write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[-2:])
