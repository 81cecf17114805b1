"""Many items, a few processes, and a time limit for each item.

The files that are worth looking for hang a decoder or crash it. The executors of concurrent.futures neither end a
process that is stuck nor go on after one has died; this does both, and says which item it was.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import multiprocessing
import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, TypeVar

from everest_ds.config.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


_NOTHING = object()
# One that has closed its end of the pipe is about to have an exit code of its own.
_DYING_S = 2.0
_LONGEST_WAIT_S = 86400.0
_PR_SET_PDEATHSIG = 1  # prctl(2)


class Lost(NamedTuple):
    """In the place of a result: what became of the process that had the item."""

    reason: str


def run(
    task: Callable[[Item], Result], items: Sequence[Item], *, workers: int, limit_s: float
) -> Iterator[tuple[Item, Result | Lost]]:
    """Yield every item with its result, or with :class:`Lost`, as they come; in no particular order.

    Args:
        task: runs in another process, so it, the items and the results can be pickled.
        items: what it is called with.
        workers: processes.
        limit_s: seconds that an item may take; then its process is ended. Starting a process doesn't count.

    Raises:
        UserError: the task raised it.
        RuntimeError: the task raised anything else (its trace is the message), or a process ended before it could work.
    """
    waiting = deque(items)
    team = [_Worker(task) for _ in range(min(workers, len(waiting)))]
    try:
        while team:
            spoke = wait([worker.pipe for worker in team], _seconds_to(min(worker.deadline for worker in team)))
            for worker in [worker for worker in team if worker.pipe in spoke or _seconds_to(worker.deadline) == 0]:
                item = worker.item
                result = worker.result() if worker.pipe in spoke else worker.late(limit_s)
                _go_on(team, worker, waiting, limit_s)
                if item is not _NOTHING:
                    yield item, result
    finally:
        for worker in team:
            worker.end()


def _go_on(team: list[_Worker], worker: _Worker, waiting: deque[Any], limit_s: float) -> None:
    """Give a process its next item, or another process its place; take it off the team where nothing is left."""
    if waiting and not worker.ended:
        worker.give(waiting.popleft(), limit_s)
        return
    worker.end()
    team.remove(worker)
    if waiting:
        team.append(_Worker(worker.task))


def _seconds_to(deadline: float) -> float | None:
    # No longer than the system can wait; nothing happens when it has.
    return None if deadline == math.inf else min(_LONGEST_WAIT_S, max(0.0, deadline - time.monotonic()))


class _Worker:
    """A process and the item that it has; none while it is starting."""

    def __init__(self, task: Callable[[Any], Any]) -> None:
        # Not forked: the caller may have threads running, and decoders don't survive it.
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, task, os.getpid()), daemon=True)
        # Ctrl-C reaches the whole process group; the parent decides what happens, also while this one starts.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        self.task = task
        self.item: Any = _NOTHING
        self.deadline = math.inf
        self.ended = False

    def give(self, item: Any, limit_s: float) -> None:
        self.item, self.deadline = item, time.monotonic() + limit_s
        # One that has just died says so when it is listened to.
        with contextlib.suppress(OSError):
            self.pipe.send(item)

    def result(self) -> Any:
        try:
            result, error = self.pipe.recv()
        except (EOFError, OSError):
            code = self.end(_DYING_S)
            if self.item is _NOTHING:
                raise RuntimeError(f"a process ended with exit code {code} before it could work") from None
            return Lost(f"the process that read it died ({_ending(code)})")
        if error is not None:
            raise error
        return result

    def late(self, limit_s: float) -> Lost:
        self.end()
        return Lost(f"took longer than {limit_s:g} s")

    def end(self, grace_s: float = 0.0) -> int | None:
        """Kill the process, if it still runs after ``grace_s``, and return its exit code."""
        self.ended = True
        self.pipe.close()
        self._process.join(grace_s)
        self._process.kill()
        self._process.join()
        return self._process.exitcode


def _ending(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _die_with(parent: int) -> None:
    """End this process when its parent ends, however that ends: another call may be at the same files then."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _serve(pipe: Connection, task: Callable[[Any], Any], parent: int) -> None:
    _die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe.send((None, None))
    # Decoders write about broken files; what matters comes by the pipe.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    with contextlib.suppress(EOFError, OSError):
        while True:
            item = pipe.recv()
            reply: tuple[Any, Exception | None]
            try:
                reply = (task(item), None)
            except UserError as error:
                reply = (None, error)
            except Exception:
                reply = (None, RuntimeError(traceback.format_exc()))
            pipe.send(reply)
