"""What a run reports: metrics.jsonl, one line of progress, and the numbers that ranks add up."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class MetricsFile:
    """Appends one JSON object per logged step, flushed at once.

    Lines beyond the step that a run continues from are moved beside it (``metrics.discarded.jsonl``), not deleted.
    """

    def __init__(self, path: Path, *, from_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._set_aside(path, from_step)
        self._file = path.open("a", encoding="utf-8")
        self._path = path

    def write(self, record: dict[str, Any]) -> None:
        """Append a record; numbers that aren't finite are written as null, as JSON has no name for them."""
        self._file.write(json.dumps({k: _finite(v) for k, v in record.items()}) + "\n")
        self._file.flush()

    def holds(self, step: int) -> bool:
        """Whether there is a record of a step."""
        return any(_step(line) == step for line in self._path.read_text(encoding="utf-8").splitlines())

    @staticmethod
    def _set_aside(path: Path, from_step: int) -> None:
        kept: list[str] = []
        later: list[str] = []
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            (kept if _step(line) <= from_step else later).append(line)
        if later:
            with path.with_name(f"{path.stem}.discarded{path.suffix}").open("a", encoding="utf-8") as discarded:
                discarded.writelines(later)
            path.write_text("".join(kept), encoding="utf-8")


def _step(line: str) -> float:
    """Return the step of a line; one that was cut off while being written is beyond any."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


class ProgressLine:
    """A live rich line on a terminal; plain lines otherwise. Everything goes to stderr."""

    def __init__(self, total_steps: int, *, start_step: int, speaks: bool) -> None:
        self._total = total_steps
        self._speaks = speaks
        self._live: Progress | None = None
        if speaks and sys.stderr.isatty():
            self._live = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._live.add_task("step", total=total_steps, completed=start_step, numbers="")

    def __enter__(self) -> ProgressLine:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def advance(self, step: int) -> None:
        """Move the bar; costs nothing where there is none."""
        if self._live is not None:
            self._live.update(self._task, completed=step)

    def report(self, record: dict[str, Any]) -> None:
        """Show a logged step's numbers."""
        if not self._speaks:
            return
        numbers = f"loss {record['loss']:.4f}  lr {record['lr']:.2e}  {record['clips_per_s']:.1f} clips/s"
        if "loss_scale" in record:
            numbers += f"  scale {record['loss_scale']:g}  skipped {record['skipped_steps']}"
        if self._live is not None:
            self._live.update(self._task, completed=record["step"], numbers=numbers)
            return
        left_s = (self._total - record["step"]) * record["step_s"]
        print(f"step {record['step']}/{self._total}  {numbers}  left {_clock(left_s)}", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
