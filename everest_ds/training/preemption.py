"""Being asked to stop: SIGTERM (a scheduler) and SIGINT (Ctrl-C) let the step end and the run be saved."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from types import TracebackType
from typing import Any

from everest_ds.training import ranks

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# One Ctrl-C comes twice: from the terminal, and as the launcher's SIGTERM a moment later.
_SAME_REQUEST_S = 2.0


class StopRequest:
    """While entered, notes the first request in :attr:`asked` and ends the process at the second.

    A thread does it: Python runs a signal's handler between two of its own steps, and the main thread may be waiting
    for a rank that is gone. Outside the main thread, where no handler can be set, nothing is noted.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._read, self._written = socket.socketpair()
            self._written.setblocking(False)
            self._wakeup_before = signal.set_wakeup_fd(self._written.fileno(), warn_on_full_buffer=False)
            self._before = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
            threading.Thread(target=self._watch, name="stop-request", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._wakeup_before)
            self._written.close()  # which ends the thread

    def _watch(self) -> None:
        first = 0.0
        with self._read:
            while numbers := self._read.recv(1):
                number = numbers[0]
                if number not in _SIGNALS:
                    continue
                if not self.asked:
                    self.asked, first = True, time.monotonic()
                    if ranks.is_main():
                        name = signal.Signals(number).name
                        os.write(2, f"{name}: ending this step, then saving; once more to end at once\n".encode())
                elif time.monotonic() - first > _SAME_REQUEST_S:
                    os._exit(128 + number)
