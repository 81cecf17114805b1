"""The folder that a command fills, in one run or in several: what it found out about each file, and lists of them.

``settings.json`` says what the folder is for, ``files.jsonl`` holds one object per file, written as they come, so
that an interrupted run goes on where it stopped. What is there is never lost: another set's folder is refused, and a
list that changes is kept under a number beside the new one.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from everest_ds.config.errors import UserError
from everest_ds.data.members import Member

if TYPE_CHECKING:
    from typing_extensions import Self

SETTINGS = "settings.json"
FILES = "files.jsonl"

Record = dict[str, Any]
"""What is known of one file: ``path``, ``size_bytes``, ``mtime_ns``, ``settled``, and whatever the command adds.

``settled`` is False where another run may well find something else: the file took too long, or its reader died.
"""


class WorkFolder:
    """A context: the folder is this process's own while it lasts.

    Args:
        path: made if need be.
        settings: what its contents depend on; JSON.

    Raises:
        UserError: the folder holds something else, or another process is at it, or it can't be written.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self._settings = path, settings

    def __enter__(self) -> Self:
        try:
            self._lock = self._claim()
            self._log = (self.path / FILES).open("a+", encoding="utf-8")
            self._known = self._read()
        except OSError as error:
            raise UserError(f"--out: cannot write to {self.path}: {error.strerror}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What it could not write it has said.
        with contextlib.suppress(OSError):
            self._log.close()
        self._lock.close()

    def unchanged(self, path: str, status: tuple[int, int] | None) -> Record | None:
        """Return what an earlier run settled about a file, if its size and time are still the same."""
        record = self._known.get(path)
        if record is None or not record["settled"] or _stamp(status).items() - record.items():
            return None
        return record

    def add(self, path: str, status: tuple[int, int] | None, *, settled: bool, **facts: Any) -> Record:
        """Write down what was found out about a file, and return it."""
        record = {"path": path, **_stamp(status), "settled": settled, **facts}
        with self._said():
            self._log.write(json.dumps(record) + "\n")
            self._log.flush()
        return record

    def finish(self, records: Iterable[Record]) -> None:
        """Leave exactly these records, in this order."""
        with self._said():
            with self._unfinished(FILES).open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)
            self._unfinished(FILES).replace(self.path / FILES)

    def write(self, name: str, text: str) -> Path:
        """Write a list; another one of that name stays, as ``name.1.csv`` and so on. Return where it is."""
        path = self.path / name
        with self._said():
            if path.exists() and path.read_bytes() == text.encode("utf-8", "backslashreplace"):
                return path
            self._unfinished(name).write_text(text, encoding="utf-8", errors="backslashreplace")
            if path.exists():
                path.rename(self._free(path))
            self._unfinished(name).replace(path)
        return path

    @contextlib.contextmanager
    def _said(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"--out: cannot write to {self.path}: {error.strerror}; the same command goes on from here"
            ) from error

    def _free(self, path: Path) -> Path:
        names = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in itertools.count(1))
        return next(name for name in names if not name.exists())

    def _unfinished(self, name: str) -> Path:
        return self.path / f"{name}.unfinished"

    def _claim(self) -> TextIO:
        """Return the settings' file, locked: that of a new folder is written, that of an old one compared."""
        record, unfinished = self.path / SETTINGS, self._unfinished(SETTINGS)
        if record.exists():
            self._compare(record)
        elif self.path.exists() and (not self.path.is_dir() or set(self.path.iterdir()) - {unfinished}):
            raise UserError(f"--out: {self.path} is there already and holds something else; name another folder")
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            unfinished.write_text(json.dumps(self._settings, indent=1) + "\n", encoding="utf-8")
            unfinished.replace(record)
        lock = record.open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out: another process is writing to {self.path}; wait for it") from None
        except OSError:
            # A file system without locks: there nobody is warned.
            pass
        return lock

    def _compare(self, record: Path) -> None:
        try:
            found = dict(json.loads(record.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            raise UserError(f"--out: {record} can't be read as settings; name another folder") from None
        wanted = self._settings
        changed = [f"{key} {found.get(key)} not {wanted[key]}" for key in wanted if found.get(key) != wanted[key]]
        if changed:
            raise UserError(f"--out: {self.path} is of other settings ({', '.join(changed)}); name another folder")

    def _read(self) -> dict[str, Record]:
        """Return the records by path, the last one of each."""
        self._log.seek(0)
        text = self._log.read()
        if not text.endswith("\n"):
            # Cut off while it was written: what follows starts a line of its own.
            self._log.write("\n")
        records = (_record(line) for line in text.split("\n"))
        return {record["path"]: record for record in records if record}


def _record(line: str) -> Record | None:
    """Return a line's record; None for one that was cut off."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and {"path", "settled"} <= record.keys() else None


def _stamp(status: tuple[int, int] | None) -> Record:
    size, time = status or (None, None)
    return {"size_bytes": size, "mtime_ns": time}


def status_of(path: str) -> tuple[int, int] | None:
    """Return size in bytes and time of last change in nanoseconds; None: there is no such file, or it is far away."""
    member = Member.named(path)
    try:
        status = os.stat(path if member is None else member.shard)  # noqa: PTH116 - of text; there may be millions
    except (OSError, ValueError):
        return None
    return status.st_size if member is None else member.size, status.st_mtime_ns
