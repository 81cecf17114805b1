"""What gathers between two logged steps, without the host waiting for the device."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from everest_ds.data.dataset import NO_TIME, ReadingTime
from everest_ds.data.loader import Batch


@dataclass(frozen=True, kw_only=True)
class Sums:
    """A closed window, over all ranks: mean loss, seconds per step, share of it spent waiting for data.

    ``decode_s`` and ``transform_s``: seconds of a data worker per clip.
    """

    loss: float
    step_s: float
    data_wait_share: float
    decode_s: float
    transform_s: float
    bad_in_a_row: int
    extra: list[float]


class Window:
    """Sums losses on the device and waiting times on the host until :meth:`reduce` reads them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._bad_in_a_row = torch.zeros((), device=device)
        self._open()

    def _open(self) -> None:
        self._loss = torch.zeros((), device=self._device)
        self._steps = 0
        self._waited_s = 0.0
        self._clips, self._seconds = 0, NO_TIME
        self._opened = time.perf_counter()

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        start = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - start

    def read(self, batch: Batch) -> None:
        """Count what reading a batch took its workers."""
        self._clips += len(batch.index)
        self._seconds = ReadingTime(*(total + more for total, more in zip(self._seconds, batch.seconds, strict=True)))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside out: validating and saving are no training steps."""
        get_accelerator().synchronize()  # steps under way are training's time
        start = time.perf_counter()
        yield
        self._opened += time.perf_counter() - start

    def add(self, loss: Tensor) -> None:
        """Add a step's loss, a scalar on the device."""
        loss = loss.float()
        self._loss += loss
        self._bad_in_a_row = torch.where(loss.isfinite(), 0.0, self._bad_in_a_row + 1)
        self._steps += 1

    def gone_wrong(self, gradient_norm: float | None) -> bool:
        """Say whether the last step's loss, or its gradient norm, was not finite on any rank; a collective call."""
        wrong = self._bad_in_a_row + (gradient_norm is not None and not math.isfinite(gradient_norm))
        if dist.is_initialized():
            dist.all_reduce(wrong)
        return wrong.item() > 0

    def reduce(self, extra: Sequence[float]) -> Sums:
        """Read the window, summed over ranks along with ``extra``, and open the next one; a collective call."""
        loss = (self._loss / self._steps).item()
        elapsed_s = time.perf_counter() - self._opened
        per_clip = [seconds / self._clips if self._clips else 0.0 for seconds in self._seconds]
        means = [loss, elapsed_s / self._steps, self._waited_s / elapsed_s, *per_clip, self._bad_in_a_row.item()]
        numbers = [*means, *extra]
        totals = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        if dist.is_initialized():
            dist.all_reduce(totals)
            totals[: len(means)] /= dist.get_world_size()
        mean_loss, step_s, waited, decode_s, transform_s, bad, *rest = totals.tolist()
        self._open()
        return Sums(
            loss=mean_loss,
            step_s=step_s,
            data_wait_share=waited,
            decode_s=decode_s,
            transform_s=transform_s,
            bad_in_a_row=round(bad),
            extra=rest,
        )
