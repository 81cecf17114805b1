"""Loading that outlives its workers: a video that hangs or kills its reader is set aside, and everything else goes on.

A sample is a function of its key alone, so workers can be killed at any time and others given the same batches again.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from everest_ds.config.errors import RankError
from everest_ds.data.dataset import ClipDataset, Key, Sample
from everest_ds.data.pinning import listen, why_not_pinned
from everest_ds.data.shared_memory import why_full

if TYPE_CHECKING:
    from everest_ds.data.loader import Batch

POLL_S = 1.0
_AT_ONCE_S = 1e-6  # not 0: that is torch's word for no limit
# Something else may have killed a worker, memory running out first of all: a video is blamed for the second one.
_DEATHS_BLAMED = 2
_RESTARTS = 5  # in a row, without a batch in between
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)

_log = logging.getLogger(__name__)

Report = Callable[[str, str], None]
"""Told the path of a video that is set aside, and the reason."""


class _WorkersLostError(Exception):
    """The workers have to be replaced."""


class ClipLoader:
    """Iterates over batches; replaces workers that hang or die.

    A video that is being read for longer than ``data.timeout_s``, or over which two workers in a row have died, is set
    aside: it counts as unreadable from then on, and others stand in for it.

    Args:
        dataset: where samples come from.
        batches: keys of each batch; iterated once per iteration of the loader.
        start: builds the DataLoader of given batches; its timeout is ``POLL_S`` where there are workers.
        report: told what is set aside.
    """

    def __init__(
        self,
        dataset: ClipDataset,
        batches: Iterable[list[Key]],
        start: Callable[[Iterable[list[Key]]], DataLoader[Sample]],
        report: Report | None = None,
    ) -> None:
        self._dataset, self._batches, self._start = dataset, batches, start
        self._report = report
        self._deaths: Counter[int] = Counter()

    def __iter__(self) -> Batches:
        return Batches(self)

    def look(self, batches: Batches) -> Generator[Batch | None, None, None]:
        """Yield the batches; None where the one that is due isn't there and ``batches`` is in no mood to wait."""
        source, undelivered = iter(self._batches), deque[list[Key]]()
        restarts = 0
        while True:
            workers = self._begin(_feed(source, undelivered))
            try:
                for batch in self._watched(workers, batches):
                    if batch is not None:
                        undelivered.popleft()
                        restarts = 0
                        self._deaths.clear()
                    yield batch
                return
            except _WorkersLostError as reason:
                restarts += 1
                if restarts > _RESTARTS:
                    raise RankError(
                        f"data.workers: {reason}, {restarts} times in a row; too little memory or /dev/shm (docker: "
                        "--shm-size), or videos that crash the decoder"
                    ) from reason
                _log.warning("%s; new decoding processes continue", reason)
            finally:
                _kill(workers)

    def _begin(self, batches: Iterable[list[Key]]) -> Iterator[Batch]:
        self._dataset.forget_reading()
        loader = self._start(batches)
        if loader.pin_memory:
            listen()
        # torch would raise in the middle of a training step when a worker dies; polling finds out in good time.
        with _signal_kept(signal.SIGCHLD):
            return iter(loader)

    def _watched(self, workers: Iterator[Batch], batches: Batches) -> Iterator[Batch | None]:
        idle_since = time.monotonic()
        while True:
            try:
                batch = _next(workers, POLL_S if batches.patient else _AT_ONCE_S)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                self._judge(workers, error)
                if batches.patient:
                    idle_since = self._check_idle(idle_since)
                    continue
                batch = None
            yield batch
            idle_since = time.monotonic()

    def _judge(self, workers: Iterator[Batch], error: Exception) -> None:
        """Return where waiting on is all there is to do.

        Raises:
            _WorkersLostError: some have hung or died.
            RankError: batches can't be put into pinned memory, or /dev/shm is full.
            RuntimeError: a bug.
        """
        if full := why_full(error):
            raise RankError(full) from error
        unpinned = why_not_pinned(workers, error)
        if unpinned or isinstance(error, OSError | EOFError):
            time.sleep(POLL_S)  # a killed process closes its connections before it counts as dead
        dead = [(i, process) for i, process in enumerate(_processes(workers)) if not process.is_alive()]
        if dead:
            raise _WorkersLostError("; ".join(self._died(i, process.exitcode) for i, process in dead)) from error
        if unpinned:
            raise RankError(
                f"data.prefetch: batches can't be put into pinned memory any more ({unpinned}); lower it, data.workers "
                "or train.micro_batch, or raise the limit (ulimit -n, ulimit -l)"
            ) from error
        if not str(error).startswith("DataLoader timed out"):
            raise error
        limit_s = self._dataset.data.timeout_s
        hanging = self._dataset.reading_for(limit_s) if limit_s else []
        if hanging:
            limit = f"no frames within data.timeout_s = {limit_s:g} s"
            raise _WorkersLostError("; ".join(self._set_aside(video, limit) for video in hanging)) from error

    def _died(self, worker: int, code: int | None) -> str:
        how = f"a decoding process died (exit code {code})"
        video = self._dataset.reading_by(worker)
        if video is None:
            return how
        self._deaths[video] += 1
        if self._deaths[video] >= _DEATHS_BLAMED:
            return self._set_aside(video, f"{self._deaths[video]} decoding processes died over it")
        return f"{how} while it read {self._dataset.path(video)}"

    def _set_aside(self, video: int, reason: str) -> str:
        path = self._dataset.path(video)
        self._dataset.set_aside({path: reason})
        if self._report is not None:
            self._report(path, reason)
        return f"{path} is set aside: {reason}"

    def _check_idle(self, since: float) -> float:
        """Return since when no worker has been reading anything.

        Raises:
            RankError: for too long, and still there is no batch.
        """
        now, limit = time.monotonic(), self._dataset.data.timeout_s
        if self._dataset.reading_for(0):
            return now
        if 0 < limit < now - since:
            raise RankError(
                f"data.timeout_s: no batch came within {limit:g} s, and no decoding process reads anything; raise it "
                "if the machine is overloaded"
            )
        return since


class Batches(Iterator["Batch"]):
    """One pass over a :class:`ClipLoader`. Its processes end when it ends, is closed, or is no more."""

    def __init__(self, loader: ClipLoader) -> None:
        self.patient = True
        self._found = loader.look(self)

    def __next__(self) -> Batch:
        batch = next(self._found)
        assert batch is not None
        return batch

    def poll(self) -> Batch | None:
        """Return the next batch, or None: it isn't there yet. Nothing is waited for.

        Without workers it is never there: reading it is what ``next`` does.
        """
        self.patient = False
        try:
            return next(self._found)
        finally:
            self.patient = True

    def close(self) -> None:
        """End the processes; there are no more batches."""
        self._found.close()


def _feed(source: Iterator[list[Key]], undelivered: deque[list[Key]]) -> Iterator[list[Key]]:
    """Yield the batches that were asked for and never came, then new ones, which are noted."""
    yield from tuple(undelivered)
    for keys in source:
        undelivered.append(keys)
        yield keys


def start_worker(worker: int) -> None:  # noqa: ARG001
    """Set up a decoding process; torch has set its threads to one."""
    # Ctrl-C and a launcher's SIGTERM reach the whole process group, and the training process needs data until it stops.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError, AttributeError):  # not Linux: torch's own watch over its parent remains
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)


def _next(workers: Iterator[Batch], timeout_s: float) -> Batch | None:
    """Return the next batch, for which its workers have some time; None where there are none and it shall be now.

    Raises:
        RuntimeError: "DataLoader timed out ...".
    """
    if _processes(workers):
        workers._timeout = timeout_s  # type: ignore[attr-defined]  # torch has no public name for it
    elif timeout_s == _AT_ONCE_S:
        return None
    return next(workers)


def _processes(workers: Iterator[Batch]) -> list[Any]:
    """Return the processes behind torch's iterator; it has no public name for them."""
    return list(getattr(workers, "_workers", ()))


def _kill(workers: Iterator[Batch]) -> None:
    """End the processes at once: they hold nothing that could be lost, and one that hangs heeds no request."""
    for process in _processes(workers):
        process.kill()
    for process in _processes(workers):
        process.join()


@contextlib.contextmanager
def _signal_kept(number: signal.Signals) -> Iterator[None]:
    """Restore a signal's handler afterwards; only the main thread can change one."""
    before = signal.getsignal(number)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(number, before)
