"""Why batches don't get into pinned memory: torch copies them there in a thread, and doesn't ask how that is.

When an exception ends the thread, torch's iterator says that it timed out, again and again: only without a time limit
does it look after the thread (torch/utils/data/dataloader.py, ``_get_data``). The exception goes to
``threading.excepthook``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

_LOOP = "_pin_memory_loop"  # what the thread runs (torch/utils/data/_utils/pin_memory.py), a part of its name
_IN_THREAD = " in pin memory thread for device "  # of an error that the thread lives on after

_ends: WeakKeyDictionary[threading.Thread, str] = WeakKeyDictionary()


def listen() -> None:
    """Keep the exceptions that end threads of torch's that pin batches; others go where they went before."""
    if not isinstance(threading.excepthook, _Hook):
        threading.excepthook = _Hook(threading.excepthook)


def why_not_pinned(workers: Iterator[Any], error: Exception) -> str:
    """Say why an iterator of torch's, which has raised an error, pins no batches any more; "" if that isn't it."""
    thread = getattr(workers, "_pin_memory_thread", None)
    if thread is not None and not thread.is_alive():
        return _ends.get(thread, "the thread for it has ended")
    text = str(error)
    # Other errors are bugs, of ours or of a kernel under way, and keep their trace.
    return _cause(text) if _IN_THREAD in text and "out of memory" in text else ""


class _Hook:
    def __init__(self, others: Any) -> None:
        self._others = others

    def __call__(self, end: Any) -> None:
        if end.thread is not None and _LOOP in end.thread.name:
            _ends[end.thread] = f"{end.exc_type.__name__}: {end.exc_value}"
        else:
            self._others(end)


def _cause(text: str) -> str:
    """Find the exception in the trace that torch puts into the message of the one that it raises in its place."""
    lines = [line for line in text.splitlines()[1:] if line and not line.startswith((" ", "Original Traceback"))]
    return lines[0] if lines else text
