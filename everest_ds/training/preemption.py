"""Being asked to stop: SIGTERM (a scheduler) and SIGINT (Ctrl-C) let the step end and the run be saved."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from types import TracebackType
from typing import Any

import psutil

from everest_ds.training import ranks

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# One Ctrl-C comes twice: from the terminal, and as the launcher's SIGTERM a moment later.
_SAME_REQUEST_S = 2.0
_LOOK_EVERY_S = 1.0
_WITHOUT_A_RANK_S = 10.0


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
                signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not of Python's making
            signal.set_wakeup_fd(self._wakeup_before)
            self._written.close()  # which ends the thread

    def _watch(self) -> None:
        with self._read:
            first = self._wait()
            if not first:
                return
            self.asked, since, complete = True, time.monotonic(), time.monotonic()
            if ranks.is_main():
                name = signal.Signals(first).name
                os.write(2, f"{name}: ending this step, then saving; once more to end at once\n".encode())
            self._read.settimeout(_LOOK_EVERY_S)
            while True:
                try:
                    number = self._wait()
                except TimeoutError:
                    # A step that a rank has left is never ended: on a GPU it would be waited for, and the launcher
                    # gives each rank in turn half a minute.
                    complete = time.monotonic() if _all_here() else complete
                    if time.monotonic() - complete > _WITHOUT_A_RANK_S:
                        os._exit(128 + first)
                    continue
                if not number:
                    return
                if time.monotonic() - since > _SAME_REQUEST_S:
                    os._exit(128 + number)

    def _wait(self) -> int:
        """Return the next request's signal, 0 at the end; raises TimeoutError once there was one."""
        while numbers := self._read.recv(1):
            if numbers[0] in _SIGNALS:
                return numbers[0]
        return 0


def _all_here() -> bool:
    """Say whether all the ranks of this node are running: children of one launcher."""
    try:
        running = [p for p in psutil.Process(os.getppid()).children() if p.status() != psutil.STATUS_ZOMBIE]
    except psutil.Error:
        return True
    return len(running) >= ranks.local_world_size()
