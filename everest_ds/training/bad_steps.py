"""Steps whose loss or gradient isn't finite: skipped, counted, and written down with the clips that were in them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from everest_ds.data.dataset import LOST
from everest_ds.training import ranks
from everest_ds.training.metrics import MetricsFile


class BadSteps:
    """Looks at every step after it was taken or skipped.

    DeepSpeed skips a step whose gradient isn't finite, on all ranks alike. In fp16 that is how the loss scale is
    found: there a step is bad only if a loss isn't finite either, or the scale can't become smaller.

    Args:
        records: ``bad_steps.jsonl``, on rank 0.
        video: names a video.
        searching: says whether a loss scale is being looked for.
    """

    def __init__(
        self, records: MetricsFile | None, video: Callable[[int], str], *, searching: Callable[[], bool]
    ) -> None:
        self._records, self._video, self._searching = records, video, searching
        self.total = 0
        self.in_a_row = 0
        self.scaler_skips = 0

    @property
    def counters(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        return {"bad_steps": self.total, "in_a_row": self.in_a_row, "scaler_skips": self.scaler_skips}

    def restore(self, counters: dict[str, int]) -> None:
        """Take over what a checkpoint kept."""
        self.total, self.in_a_row = counters.get("bad_steps", 0), counters.get("in_a_row", 0)
        self.scaler_skips = counters.get("scaler_skips", 0)

    def judge(self, step: int, applied: bool, losses: Sequence[Tensor], videos: Sequence[Tensor]) -> None:
        """Count a step; collective, and the host waits for the device, where it was skipped.

        Args:
            step: that was taken, counted from 1.
            applied: whether the weights have changed, the same on every rank.
            losses: of the step's passes on this rank.
            videos: ``Batch.index`` of these passes.
        """
        if applied:
            self.in_a_row = 0
            return
        by_rank = ranks.gather(([float(loss) for loss in losses], [self._paths(index) for index in videos]))
        finite = [all(map(math.isfinite, values)) for values, _ in by_rank]
        if all(finite) and self._searching():
            self.scaler_skips += 1
            return
        self.total += 1
        self.in_a_row += 1
        if self._records is not None:
            self._records.write({"step": step, "what": _what(finite), "clips": _culprits(by_rank, finite)})

    def _paths(self, index: Tensor) -> list[str]:
        return [self._video(video) for video in dict.fromkeys(index.tolist()) if video != LOST]


def _what(finite: list[bool]) -> str:
    return "gradient is not finite, every loss is" if all(finite) else "loss is not finite"


def _culprits(by_rank: list[tuple[list[float], list[list[str]]]], finite: list[bool]) -> list[dict[str, Any]]:
    """Return the passes whose loss isn't finite; all of them where each is, and the gradient alone isn't."""
    return [
        {"rank": rank, "pass": turn, "loss": loss if math.isfinite(loss) else str(loss), "videos": videos}
        for rank, (losses, paths) in enumerate(by_rank)
        for turn, (loss, videos) in enumerate(zip(losses, paths, strict=True))
        if all(finite) or not math.isfinite(loss)
    ]
