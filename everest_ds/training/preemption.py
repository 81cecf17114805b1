"""Being asked to stop: SIGTERM (a scheduler) and SIGINT (Ctrl-C) let the step end and the run be saved."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from everest_ds.training import ranks

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# One Ctrl-C comes twice: from the terminal, and as the launcher's SIGTERM a moment later.
_SAME_REQUEST_S = 2.0


class StopRequest:
    """While entered, notes the first request in :attr:`asked` and ends the process at the second.

    Outside the main thread, where no handler can be set, it notes nothing.
    """

    def __init__(self) -> None:
        self.asked = False
        self._since = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        now = time.monotonic()
        if not self.asked:
            self.asked, self._since = True, now
            if ranks.is_main():
                # Not print: the signal may have come in the middle of one.
                name = signal.Signals(number).name
                os.write(2, f"{name}: ending this step, then saving; once more to end at once\n".encode())
        elif now - self._since > _SAME_REQUEST_S:
            os._exit(128 + number)
