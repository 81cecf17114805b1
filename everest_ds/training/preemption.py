"""Being asked to stop, by SIGTERM, SIGINT or a launcher that is gone: the step ends, and the run is saved."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from types import TracebackType
from typing import Any

import psutil

from everest_ds.config import launcher
from everest_ds.training import ranks

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LAUNCHER_GONE = 255  # among the numbers of signals
_SIGNALS_AND_LAUNCHER = (*_SIGNALS, _LAUNCHER_GONE)
# One Ctrl-C comes twice: from the terminal, and as the launcher's SIGTERM a moment later.
_SAME_REQUEST_S = 2.0
_LOOK_EVERY_S = 1.0
_WITHOUT_A_RANK_S = 10.0


class StopRequest:
    """While entered, notes the first request in :attr:`asked` and ends the process at the second.

    A launcher that is gone has asked, too, but never for the second time: it may go because it was asked itself.

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
            self._siblings = _ranks_here()
            launcher.when_gone(self._tell_gone)
            threading.Thread(target=self._watch, name="stop-request", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before:
            launcher.when_gone(lambda _: None)  # the run is over, and ends by itself
            for number, handler in self._before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not of Python's making
            signal.set_wakeup_fd(self._wakeup_before)
            self._written.close()  # which ends the thread

    def _tell_gone(self, name: str) -> None:
        self._gone = name
        with contextlib.suppress(OSError):  # the run is over
            self._written.send(bytes([_LAUNCHER_GONE]))

    def _watch(self) -> None:
        with self._read:
            first = self._wait(_SIGNALS_AND_LAUNCHER)
            if not first:
                return
            self.asked, complete = True, time.monotonic()
            since = time.monotonic()
            if ranks.is_main():
                with contextlib.suppress(OSError):  # nobody reads it
                    os.write(2, f"{self._said(first)}\n".encode())
            self._read.settimeout(_LOOK_EVERY_S)
            while True:
                try:
                    number = self._wait(_SIGNALS)
                except TimeoutError:
                    # A step that a rank has left is never ended: on a GPU it would be waited for, and the launcher
                    # gives each rank in turn half a minute.
                    complete = time.monotonic() if self._all_here() else complete
                    if time.monotonic() - complete > _WITHOUT_A_RANK_S:
                        os._exit(128 + (signal.SIGTERM if first == _LAUNCHER_GONE else first))
                    continue
                if not number:
                    return
                if first == _LAUNCHER_GONE:
                    first, since = number, time.monotonic()
                if time.monotonic() - since > _SAME_REQUEST_S:
                    os._exit(128 + number)

    def _said(self, request: int) -> str:
        if request == _LAUNCHER_GONE:
            return f"the launcher, {self._gone}, is gone: ending this step, then saving"
        return f"{signal.Signals(request).name}: ending this step, then saving; once more to end at once"

    def _wait(self, wanted: tuple[int, ...]) -> int:
        """Return the next wanted request's number, 0 at the end; raises TimeoutError once there was one."""
        while numbers := self._read.recv(1):
            if numbers[0] in wanted:
                return numbers[0]
        return 0

    def _all_here(self) -> bool:
        """Say whether all the ranks of this node are running, as far as can be told."""
        return not self._siblings or sum(map(_runs, self._siblings)) >= ranks.local_world_size()


def _ranks_here() -> list[psutil.Process]:
    """Return what this process's parent has started: once that is gone, nothing else tells.

    Nothing where that isn't all the ranks of this node: it can't be seen from a container's first process, say.
    """
    try:
        found = psutil.Process(os.getppid()).children()
    except psutil.Error:
        return []
    return found if len(found) >= ranks.local_world_size() else []


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
