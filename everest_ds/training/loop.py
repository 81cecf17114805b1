"""The training loop."""

from __future__ import annotations

import logging
import sys
import time
from collections import ChainMap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from everest_ds.config.batches import Batches
from everest_ds.config.errors import RankError, UserError
from everest_ds.config.progress import ProgressLine
from everest_ds.config.schema import TrainConfig
from everest_ds.data.loader import BadCounts, BadSamples
from everest_ds.data.randomness import Stream, generator
from everest_ds.data.to_device import DeviceBatches
from everest_ds.memory.meters import peaks
from everest_ds.training import ranks
from everest_ds.training.average import Average
from everest_ds.training.bad_steps import BadSteps
from everest_ds.training.checkpoint import Checkpoints, Resumed
from everest_ds.training.metrics import MetricsFile
from everest_ds.training.objectives import Objective
from everest_ds.training.preemption import StopRequest
from everest_ds.training.schedule import CosineSchedule
from everest_ds.training.validation import Validation
from everest_ds.training.window import Window

log = logging.getLogger(__name__)

EXIT_BAD_NUMBERS = 3
EXIT_RESTART_ME = 75
_ENDINGS = {
    EXIT_BAD_NUMBERS: "loss or gradients are not finite; this state was not saved, the last checkpoint is untouched",
    EXIT_RESTART_ME: "asked to stop (or its launcher is gone), or out of time; saved, continue with --resume auto",
}


@dataclass(kw_only=True)
class Training:
    """All that the loop works on. ``step`` counts optimizer steps done; ``mfu`` makes MFU from clips/s."""

    engine: Any
    batches: Batches
    loader: DeviceBatches
    schedule: CosineSchedule
    config: TrainConfig
    steps_per_epoch: int
    bad_samples: BadSamples
    bad_steps: BadSteps
    metrics: MetricsFile | None
    checkpoints: Checkpoints
    objective: Objective
    resumed: Resumed
    saved_at: int
    average: Average | None = None
    validation: Validation | None = None
    mfu: Callable[[float], float] | None = None
    started: float = field(default_factory=time.monotonic)
    bad_named: float = 0

    def __post_init__(self) -> None:
        self.step = self.resumed.step
        self.bad_steps.restore(self.resumed.counters)

    def logs(self, step: int) -> bool:
        """Whether a line is logged after this step."""
        return step in (1, self.schedule.total_steps) or step % self.config.log_every_steps == 0

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is due after this step, besides the one at the end."""
        return bool(self.config.save_every_steps) and step % self.config.save_every_steps == 0

    @property
    def out_of_time(self) -> bool:
        """Whether ``train.max_minutes`` are over."""
        return 0 < self.config.max_minutes * 60 < time.monotonic() - self.started


def train(run: Training, stop: StopRequest) -> int:
    """Train to the schedule's end and save. Returns an exit code: 0 done, 3 bad numbers (not saved), 75 asked to stop.

    Raises:
        UserError: too many videos can't be read, or the state can't be saved at the end.
    """
    last = run.schedule.total_steps
    window = Window(run.engine.device)
    window.restore(run.resumed.own)
    run.bad_samples.restore(run.resumed.own)
    code = 0
    with ProgressLine(last, start_step=run.step, speaks=ranks.is_main()) as progress:
        try:
            if 0 < run.step < last:
                validate(run, window)  # where the run was stopped between saving and validating
            while run.step < last and not code:
                code = take_step(run, window, progress)
                if run.step < last and not code:
                    validate(run, window)
                    if ranks.any_rank(stop.asked or run.out_of_time):
                        code = EXIT_RESTART_ME
        finally:
            run.loader.close()  # ends its processes
        if code != EXIT_BAD_NUMBERS:
            save(run, window, at_the_end=True)
    if code and ranks.is_main():
        print(f"stopped after step {run.step}: {_ENDINGS[code]}", file=sys.stderr, flush=True)
    return code


def take_step(run: Training, window: Window, progress: ProgressLine) -> int:
    """Take one optimizer step, with all that may be due after it. Returns an exit code, 0 to go on."""
    window.add(optimizer_step(run, window))
    run.step += 1
    if run.average is not None:
        run.average.update()
    progress.advance(run.step)
    if run.logs(run.step):
        progress.report(close_window(run, window))
    if run.bad_steps.in_a_row >= run.config.max_bad_steps:
        return EXIT_BAD_NUMBERS
    if run.saves(run.step):
        save(run, window)
    return 0


def optimizer_step(run: Training, window: Window) -> Tensor:
    """Run one step over its accumulation passes. Returns the mean loss on the device, unread: no host sync of ours."""
    engine = run.engine
    seed_step(run.config.seed, run.step)
    lr = run.schedule(run.step)
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    losses, videos = [], []
    for _ in range(run.batches.accumulation):
        with window.waiting_for_data():
            batch = next(run.loader)
        window.read(batch)
        run.bad_samples.add(batch)
        loss = run.objective(engine, batch)
        engine.backward(loss)
        losses.append(loss.detach())
        videos.append(batch.index)  # not the batch: clips of every pass would stay
        run.loader.prefetch()
        engine.step()
    run.bad_steps.judge(run.step + 1, engine.was_step_applied(), losses, videos)
    return torch.stack(losses).mean()


def seed_step(seed: int, step: int) -> None:
    """Seed what is drawn while training, drop path and mixing: a function of (seed, step, rank), as resuming needs."""
    torch.manual_seed(int(generator(Stream.STEP, seed, step, ranks.rank()).integers(2**63)))


def close_window(run: Training, window: Window) -> dict[str, Any]:
    """Read what has gathered since the last logged step; the host waits for the device. Returns what is logged.

    Raises:
        UserError: too many videos can't be read.
    """
    peak_bytes = peaks(run.engine.device)
    sums = window.reduce(run.bad_samples.counts, list(peak_bytes.values()))
    counts = BadCounts(*map(round, sums.extra))
    name_bad_videos(run, counts.bad)
    run.bad_samples.check(counts)
    engine, norm = run.engine, run.engine.get_global_grad_norm()
    clips_per_s = run.batches.total / sums.step_s
    record = {
        "step": run.step,
        "epoch": run.step / run.steps_per_epoch,
        "loss": sums.loss,
        "lr": run.schedule(run.step - 1),
        "grad_norm": None if norm is None else float(norm),
        "clips_per_s": clips_per_s,
        **({} if run.mfu is None else {"mfu": run.mfu(clips_per_s)}),
        "data_wait_share": sums.data_wait_share,
        "decode_s": sums.decode_s,
        "transform_s": sums.transform_s,
        "step_s": sums.step_s,
        **dict(zip(peak_bytes, map(round, sums.most), strict=True)),
        "bad_samples": counts.bad,
        "bad_steps": run.bad_steps.total,
    }
    if engine.fp16_enabled():
        record |= {"loss_scale": engine.optimizer.loss_scale, "skipped_steps": run.bad_steps.scaler_skips}
    if run.metrics is not None:
        run.metrics.write(record)
    return record


def name_bad_videos(run: Training, bad: float) -> None:
    """Let rank 0 name each unreadable video once, whichever rank met it; ``bad`` is the count over all ranks."""
    if bad == run.bad_named:
        return
    run.bad_named = bad
    found = ranks.gather(run.bad_samples.reasons)
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
    except RankError:
        raise  # the others don't know of it
    except UserError:
        save(run, window, at_the_end=True)
        raise


def save(run: Training, window: Window, *, at_the_end: bool = False) -> None:
    """Save the state after the current step, once; a collective call.

    Not in the middle of bad steps: their own weights are those of the step before, but it may be that one that spoilt
    them. At the end they are saved, with the count of bad steps.

    Raises:
        UserError: too many videos couldn't be read, or the state can't be written and the run ends here or shall
            (``train.on_save_error``).
    """
    if run.saved_at == run.step or (run.bad_steps.in_a_row and not at_the_end):
        return
    by_rank = ranks.gather(tuple(run.bad_samples.counts))
    run.bad_samples.check(BadCounts(*(round(sum(counts)) for counts in zip(*by_rank, strict=True))))
    with window.paused():
        own = {**window.sums(), **run.bad_samples.sums()}
        problem = run.checkpoints.save(run.step, run.bad_steps.counters, own)
    if not problem:
        run.saved_at = run.step
        run.checkpoints.thin_out(keep_last=run.config.keep_last, keep_every=run.config.keep_every_steps)
        return
    told = f"the state after step {run.step} could not be saved ({problem}); checkpoints before it are untouched"
    if at_the_end or run.config.on_save_error == "stop":
        raise UserError(f"train.output_dir: {told}; make room, and continue with --resume auto")
    log.warning("%s; the run goes on (train.on_save_error)", told)
