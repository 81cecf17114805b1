"""Progress of something that is counted: a live rich line on a terminal, plain lines otherwise."""

from __future__ import annotations

import datetime
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_PLAIN_LINES = 10


class CountLine:
    """Call it with the number done and the number in all; everything goes to stderr.

    Args:
        title: what is counted, such as ``videos of data.test``.
        speaks: whether anything is shown: one rank speaks for all.
    """

    def __init__(self, title: str, *, speaks: bool) -> None:
        self._title, self._speaks = title, speaks
        self._started = time.monotonic()
        self._said = 0
        self._live: Progress | None = None
        if speaks and sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            left = (TextColumn("left"), TimeRemainingColumn())
            self._live = Progress(*columns, *left, console=Console(stderr=True))
            self._task = self._live.add_task(title, total=None)

    def __enter__(self) -> CountLine:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` are done; as plain lines, one for each tenth."""
        if self._live is not None:
            self._live.update(self._task, completed=done, total=total)
        elif self._speaks and done * _PLAIN_LINES // total > self._said:
            self._said = done * _PLAIN_LINES // total
            left_s = (time.monotonic() - self._started) * (total - done) / done
            left = datetime.timedelta(seconds=round(left_s))
            print(f"{self._title}: {done} of {total}, left {left}", file=sys.stderr, flush=True)
