"""Writing files so that a kill or a full disk at any moment leaves the old content or the new, never half of it."""

from __future__ import annotations

import atexit
import errno
import json
import logging
import math
import os
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

# SMB and some file systems in user space.
_NOT_FOR_FOLDERS = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names where the file system can do that, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_FOR_FOLDERS or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def replace(unfinished: Path, path: Path) -> None:
    """Give a finished file or folder its name, in one move that survives a power cut."""
    sync(unfinished)
    unfinished.replace(path)
    sync(path.parent)


def write(path: Path, text: str) -> None:
    """Write a whole text file; raises OSError, and the old file is there still."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    replace(unfinished, path)


class Lines:
    """Appends JSON objects to a file, a line each, at once; what a full disk refuses is kept and tried again.

    Args:
        path: the file, made with its folder when the first line is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pending = b""

    def append(self, record: dict[str, Any]) -> None:
        """Append a record; numbers that aren't finite become null, as JSON has no name for them."""
        first = not self._pending
        self._pending += json.dumps({k: _finite(v) for k, v in record.items()}).encode() + b"\n"
        try:
            self._flush()
        except OSError as error:
            if first:
                atexit.register(self._last_try)
                log.warning("%s: cannot be written (%s); its lines are kept and tried again", self.path, error.strerror)

    def _last_try(self) -> None:
        try:
            self._flush()
        except OSError as error:
            log.error("%s: its last lines are lost (%s)", self.path, error.strerror)

    def _flush(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            while self._pending:
                self._pending = self._pending[os.write(descriptor, self._pending) :]
        finally:
            os.close(descriptor)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
