"""Validation while fine-tuning: one view per video, every few epochs, with the averaged weights if there are any."""

from __future__ import annotations

import contextlib
import sys
from functools import partial
from pathlib import Path
from typing import Any

from everest_ds.data.dataset import ClipDataset
from everest_ds.data.loader import BadSamples
from everest_ds.training import ranks
from everest_ds.training.average import Average
from everest_ds.training.evaluate import predict, score
from everest_ds.training.metrics import MetricsFile
from everest_ds.training.monitors import Monitors


class Validation:
    """Evaluates the engine's model on ``data.val`` and writes what came out to validation.jsonl.

    Args:
        engine: DeepSpeed's.
        average: evaluated in place of the last weights, if there is one.
        dataset: one view per video.
        max_bad_share: of its videos, ``data.max_bad_share``.
        videos_per_batch: per rank and pass.
        every_steps: between validations; 0: at the end only.
        path: validation.jsonl.
        from_step: the step that the run continues from.
        monitors: are given the scores, too.
    """

    def __init__(
        self,
        engine: Any,
        average: Average | None,
        *,
        dataset: ClipDataset,
        max_bad_share: float,
        videos_per_batch: int,
        every_steps: int,
        path: Path,
        from_step: int,
        monitors: Monitors,
    ) -> None:
        self._engine, self._average = engine, average
        self._dataset = dataset
        self._videos_per_batch, self._every_steps = videos_per_batch, every_steps
        self._bad_samples = BadSamples(max_bad_share, clips_per_video=dataset.views, lost_ends=False, key="data.val")
        self._records = (
            MetricsFile(path, from_step=from_step, also=partial(monitors.write, "val")) if ranks.is_main() else None
        )

    def due(self, step: int) -> bool:
        """Whether to validate after this step, besides the last one."""
        return bool(self._every_steps) and step % self._every_steps == 0

    def __call__(self, step: int) -> None:
        """Validate, unless the file has this step already; a collective call.

        Raises:
            UserError: too many videos can't be read.
        """
        if self._recorded(step):
            return
        self._engine.eval()
        with self._average.in_place() if self._average is not None else contextlib.nullcontext():
            predictions = predict(
                self._engine,
                self._dataset,
                videos_per_batch=self._videos_per_batch,
                device=self._engine.device,
                bad_samples=self._bad_samples,
            )
        self._engine.train()
        scores = score(predictions, predictions.probabilities.shape[1])
        if self._records is not None:
            record = {"step": step, "top1": scores.top1, "top5": scores.top5, "videos": len(predictions.labels)}
            self._records.write(record)
            print(
                f"validation after step {step}: top-1 {100 * scores.top1:.2f} %, top-5 {100 * scores.top5:.2f} % of "
                f"{len(predictions.labels)} videos",
                file=sys.stderr,
                flush=True,
            )

    def _recorded(self, step: int) -> bool:
        """Whether rank 0, which has the file, finds this step in it."""
        return ranks.gather(self._records is not None and self._records.holds(step))[0]
