"""The learning rate of each step: linear warm-up, then cosine decay."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

from everest_ds.config.ds_config import scaled_lr
from everest_ds.config.schema import OptimConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CosineSchedule:
    """The official schedule, a pure function of the step (0-based).

    Warm-up is ``warmup_steps`` points from ``start`` to ``peak``, both ends included; the cosine starts at
    ``peak`` again and approaches ``final`` without reaching it (tests/golden/lr_schedule.json).
    """

    peak: float
    final: float
    start: float
    warmup_steps: int
    total_steps: int

    def __call__(self, step: int) -> float:
        """Return the learning rate of a step."""
        if step < self.warmup_steps:
            return self.start + (self.peak - self.start) * step / max(self.warmup_steps - 1, 1)
        phase = math.pi * (step - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1)
        return self.final + 0.5 * (self.peak - self.final) * (1 + math.cos(phase))


def build_schedule(optim: OptimConfig, global_batch: int, steps_per_epoch: int, total_steps: int) -> CosineSchedule:
    """Scale the recipe's rates by the global batch and its epochs to steps."""
    warmup = optim.warmup_steps if optim.warmup_steps is not None else round(optim.warmup_epochs * steps_per_epoch)
    if warmup >= total_steps:
        log.warning("the run ends inside its warm-up: %d steps of %d; see optim.warmup_steps", total_steps, warmup)
    return CosineSchedule(
        peak=scaled_lr(optim.base_lr, global_batch),
        final=scaled_lr(optim.min_lr, global_batch),
        start=scaled_lr(optim.warmup_lr, global_batch),
        warmup_steps=warmup,
        total_steps=total_steps,
    )
