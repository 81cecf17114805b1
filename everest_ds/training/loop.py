"""The training loop."""

from __future__ import annotations

import sys
import time
from collections import ChainMap
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from everest_ds.config.batches import Batches
from everest_ds.config.errors import UserError
from everest_ds.config.progress import ProgressLine
from everest_ds.config.schema import TrainConfig
from everest_ds.data.loader import BadSamples, Batch
from everest_ds.data.randomness import Stream, generator
from everest_ds.memory.meters import peak_bytes
from everest_ds.training import ranks
from everest_ds.training.average import Average
from everest_ds.training.metrics import MetricsFile
from everest_ds.training.objectives import Objective
from everest_ds.training.schedule import CosineSchedule
from everest_ds.training.validation import Validation
from everest_ds.training.window import Window

EXIT_BAD_NUMBERS = 3
EXIT_RESTART_ME = 75
_ENDINGS = {
    EXIT_BAD_NUMBERS: "loss or gradients are not finite; this state was not saved, the last checkpoint is untouched",
    EXIT_RESTART_ME: "train.max_minutes are over; saved, continue with --resume auto",
}


@dataclass(kw_only=True)
class Training:
    """All that the loop works on. ``step`` counts optimizer steps done."""

    engine: Any
    batches: Batches
    loader: Iterator[Batch]
    schedule: CosineSchedule
    config: TrainConfig
    steps_per_epoch: int
    bad_samples: BadSamples
    metrics: MetricsFile | None
    save: Any  # called with the step after which to save; collective
    objective: Objective
    average: Average | None = None
    validation: Validation | None = None
    step: int = 0
    saved_at: int = -1
    started: float = field(default_factory=time.monotonic)
    grad_norm: Tensor | None = None
    bad_named: int = 0

    def logs(self, step: int) -> bool:
        """Whether a line is logged after this step."""
        return step in (1, self.schedule.total_steps) or step % self.config.log_every_steps == 0

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is due after this step, besides the one at the end."""
        return bool(self.config.save_every_steps) and step % self.config.save_every_steps == 0

    def gradient_norm(self) -> float | None:
        """Read the last step's gradient norm; the host waits for the device."""
        norm = self.grad_norm if self.plain_norm else self.engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    @property
    def plain_norm(self) -> bool:
        """Whether the gradient norm is ours to compute: DeepSpeed does it in all its optimizers but a bare one."""
        return not hasattr(self.engine.optimizer, "_global_grad_norm")


def train(run: Training) -> int:
    """Train to the schedule's end and save. Returns an exit code: 0 done, 3 bad numbers (not saved), 75 out of time."""
    last = run.schedule.total_steps
    window = Window(run.engine.device)
    code = 0
    with ProgressLine(last, start_step=run.step, speaks=ranks.is_main()) as progress:
        if 0 < run.step < last:
            validate(run, window)  # where the run was stopped between saving and validating
        while run.step < last and not code:
            loss = optimizer_step(run, window)
            window.add(loss)
            run.step += 1
            if run.average is not None:
                run.average.update()
            progress.advance(run.step)
            if run.logs(run.step):
                record, code = close_window(run, window)
                progress.report(record)
            if run.saves(run.step) and not code:
                save(run, window)
            if run.step < last and not code:
                validate(run, window)
    if not save(run, window):
        code = EXIT_BAD_NUMBERS
    if code and ranks.is_main():
        print(f"stopped after step {run.step}: {_ENDINGS[code]}", file=sys.stderr, flush=True)
    return code


def optimizer_step(run: Training, window: Window) -> Tensor:
    """Run one step over its accumulation passes. Returns the mean loss on the device, unread: no host sync here."""
    engine = run.engine
    seed_step(run.config.seed, run.step)
    lr = run.schedule(run.step)
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    losses = []
    for _ in range(run.batches.accumulation):
        with window.waiting_for_data():
            batch = next(run.loader)
        window.read(batch)
        run.bad_samples.add(batch)
        loss = run.objective(engine, batch)
        engine.backward(loss)
        losses.append(loss.detach())
        read = run.logs(run.step + 1) or run.saves(run.step + 1)
        if read and run.plain_norm and engine.is_gradient_accumulation_boundary():
            run.grad_norm = torch.nn.utils.get_total_norm(p.grad for p in engine.module.parameters())
        engine.step()
    return torch.stack(losses).mean()


def seed_step(seed: int, step: int) -> None:
    """Seed what is drawn while training, drop path and mixing: a function of (seed, step, rank), as resuming needs."""
    torch.manual_seed(int(generator(Stream.STEP, seed, step, ranks.rank()).integers(2**63)))


def close_window(run: Training, window: Window) -> tuple[dict[str, Any], int]:
    """Read what has gathered since the last logged step: the one place where the host waits for the device.

    Returns:
        The record for metrics.jsonl, and an exit code if the run has to stop.

    Raises:
        UserError: too many videos can't be read.
    """
    counts = run.bad_samples.counts
    out_of_time = (
        0 < run.config.max_minutes * 60 < time.monotonic() - run.started and run.step < run.schedule.total_steps
    )
    sums = window.reduce([*counts, float(out_of_time)])
    tried, bad, lost, late = (int(total) for total in sums.extra)
    name_bad_videos(run, bad)
    run.bad_samples.check(type(counts)(tried, bad, lost))
    engine = run.engine
    norm = run.gradient_norm()
    record = {
        "step": run.step,
        "epoch": run.step / run.steps_per_epoch,
        "loss": sums.loss,
        "lr": run.schedule(run.step - 1),
        "grad_norm": norm,
        "clips_per_s": run.batches.total / sums.step_s,
        "data_wait_share": sums.data_wait_share,
        "decode_s": sums.decode_s,
        "transform_s": sums.transform_s,
        "step_s": sums.step_s,
        "peak_memory_bytes": peak_bytes(engine.device),
        "bad_samples": bad,
    }
    if engine.fp16_enabled():
        record |= {"loss_scale": engine.optimizer.loss_scale, "skipped_steps": engine.skipped_steps}
    if run.metrics is not None:
        run.metrics.write(record)
    stop = EXIT_BAD_NUMBERS if sums.bad_in_a_row >= run.config.max_bad_steps else EXIT_RESTART_ME if late else 0
    return record, stop


def name_bad_videos(run: Training, bad: int) -> None:
    """Let rank 0 name each unreadable video once, whichever rank met it; ``bad`` is the count over all ranks."""
    if bad == run.bad_named:
        return
    run.bad_named = bad
    found: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(found, run.bad_samples.reasons)
    if ranks.is_main():
        run.bad_samples.name(dict(ChainMap(*found)))


def validate(run: Training, window: Window) -> None:
    """Validate in the middle of a run, if it is time.

    Raises:
        UserError: too many videos can't be read; the state is saved before.
    """
    if run.validation is None or not run.validation.due(run.step):
        return
    try:
        with window.paused():
            run.validation(run.step)
    except UserError:
        save(run, window)
        raise


def save(run: Training, window: Window) -> bool:
    """Save the state after the current step, once, unless its numbers have gone wrong. Returns whether they are right.

    A collective call. A step whose loss is finite but whose gradients aren't has spoilt the weights too; under fp16
    DeepSpeed skips such a step itself.
    """
    norm = None if run.engine.fp16_enabled() else run.gradient_norm()
    if window.gone_wrong(norm):
        return False
    if run.saved_at != run.step:
        with window.paused():
            run.save(run.step)
        run.saved_at = run.step
    return True
