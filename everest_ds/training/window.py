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
    """A closed window, over all ranks: mean of the finite losses, seconds per step, share of it waiting for data.

    ``decode_s`` and ``transform_s``: seconds of a data worker per clip. ``most``: of each number that was given as such
    that of the rank where it is largest.
    """

    loss: float
    step_s: float
    data_wait_share: float
    decode_s: float
    transform_s: float
    extra: list[float]
    most: list[float]


class Window:
    """Sums losses on the device and waiting times on the host until :meth:`reduce` reads them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._open()

    def _open(self) -> None:
        self._loss, self._finite = torch.zeros((), device=self._device), torch.zeros((), device=self._device)
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
        loss, finite = loss.float(), loss.isfinite()
        self._loss += torch.where(finite, loss, 0.0)
        self._finite += finite
        self._steps += 1

    def sums(self) -> dict[str, float]:
        """What a checkpoint in the middle of a window keeps of it, so that the window's mean will be the same."""
        return {"loss": self._loss.item(), "finite": self._finite.item()}

    def restore(self, sums: dict[str, float]) -> None:
        """Take over what a checkpoint kept; times are those since then."""
        self._loss += sums.get("loss", 0.0)
        self._finite += sums.get("finite", 0.0)

    def reduce(self, extra: Sequence[float], most: Sequence[float] = ()) -> Sums:
        """Read the window and open the next one; a collective call.

        Args:
            extra: summed over ranks along with the window.
            most: of these the largest rank's. Each rank has a place of its own for them in what is summed.
        """
        losses = [self._loss.item(), self._finite.item()]  # waits for the device: what it still does is in this window
        elapsed_s = time.perf_counter() - self._opened
        per_clip = [seconds / self._clips if self._clips else 0.0 for seconds in self._seconds]
        means = [elapsed_s / self._steps, self._waited_s / elapsed_s, *per_clip]
        world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        places = [0.0] * (world * len(most))
        places[rank * len(most) : (rank + 1) * len(most)] = most
        numbers = [*means, *losses, *extra, *places]
        totals = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        if dist.is_initialized():
            dist.all_reduce(totals)
            totals[: len(means)] /= world
        step_s, waited, decode_s, transform_s, loss, finite, *rest = totals.tolist()
        extras, by_rank = rest[: len(extra)], rest[len(extra) :]
        self._open()
        return Sums(
            loss=loss / finite if finite else math.nan,
            step_s=step_s,
            data_wait_share=waited,
            decode_s=decode_s,
            transform_s=transform_s,
            extra=extras,
            most=[max(by_rank[place :: len(most)]) for place in range(len(most))],
        )
