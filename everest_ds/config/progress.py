"""How far something has got: a live rich display on a terminal, plain lines otherwise. Everything goes to stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

if TYPE_CHECKING:
    from typing_extensions import Self

_PLAIN_LINES = 10
_GIB = 2**30


class _Live(Progress):
    """A task's row, and a second one for the numbers that don't fit into a row of 100 columns."""

    def get_renderables(self) -> Iterator[RenderableType]:
        """Yield the rows."""
        yield self.make_tasks_table(self.tasks)
        yield from (Text(task.fields["below"]) for task in self.tasks if task.fields["below"])


class _Line:
    """What is done of how many, elapsed and left; ``numbers`` stand between, those ``below`` in a row of their own.

    Args:
        title: what is counted.
        total: how many there are; None: not known yet.
        done: so many are done already.
        speaks: whether anything is shown: one rank speaks for all.
    """

    def __init__(self, title: str, *, total: int | None, done: int = 0, speaks: bool) -> None:
        self._title, self._speaks = title, speaks
        self._live: Progress | None = None
        if speaks and sys.stderr.isatty():
            self._live = _Live(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._live.add_task(title, total=total, completed=done, numbers="", below="")

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()


class ProgressLine(_Line):
    """A training run's: its loss, rate and memory, and the time left of its steps."""

    def __init__(self, total_steps: int, *, start_step: int, speaks: bool) -> None:
        super().__init__("step", total=total_steps, done=start_step, speaks=speaks)
        self._total = total_steps

    def advance(self, step: int) -> None:
        """Move the bar; costs nothing where there is none."""
        if self._live is not None:
            self._live.update(self._task, completed=step)

    def report(self, record: dict[str, Any]) -> None:
        """Show a logged step's numbers."""
        if not self._speaks:
            return
        numbers = f"loss {record['loss']:.4f}  lr {record['lr']:.2e}  {record['clips_per_s']:.1f} clips/s"
        if "mfu" in record:
            numbers += f"  MFU {100 * record['mfu']:.1f} %"
        numbers += f"  {_memory(record)}"
        if "loss_scale" in record:
            numbers += f"  scale {record['loss_scale']:g}  skipped {record['skipped_steps']}"
        if self._live is not None:
            self._live.update(self._task, completed=record["step"], below=numbers)
            return
        left_s = (self._total - record["step"]) * record["step_s"]
        print(f"step {record['step']}/{self._total}  {numbers}  left {_clock(left_s)}", file=sys.stderr, flush=True)


class CountLine(_Line):
    """That of something counted, such as "videos of data.test", with its rate and the time left.

    Call it with the number done and that in all.
    """

    def __init__(self, title: str, *, speaks: bool) -> None:
        super().__init__(title, total=None, speaks=speaks)
        self._started = time.monotonic()
        self._said = 0

    def __call__(self, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` are done; as plain lines, one for each tenth."""
        rate = done / max(time.monotonic() - self._started, 1e-9)
        if self._live is not None:
            self._live.update(self._task, completed=done, total=total, numbers=f"{rate:.1f}/s")
        elif self._speaks and done * _PLAIN_LINES // total > self._said:
            self._said = done * _PLAIN_LINES // total
            left = _clock((total - done) / rate)
            print(f"{self._title}: {done} of {total}, {rate:.1f}/s, left {left}", file=sys.stderr, flush=True)


def _memory(record: dict[str, Any]) -> str:
    """Peak memory of the rank that took most: of a device's allocator in two ways, or of a process."""
    peak, reserved = f"{record['peak_memory_bytes'] / _GIB:.1f}", record.get("reserved_memory_bytes")
    return f"peak {peak} GiB" if reserved is None else f"allocated {peak}, reserved {reserved / _GIB:.1f} GiB"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
