"""Limits that a container or a batch system sets by control groups, version 1 or 2."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

# Version 1 has no word for "none" but the largest number of pages.
_UNLIMITED_BYTES = 2**60


def memory_limit_bytes(root: Path = Path("/")) -> int | None:
    """Return the least limit on memory of this process's groups."""
    names = {"": "memory.max", "memory": "memory.limit_in_bytes"}
    texts = (_read(folder / names[kind]) for kind, folder in _groups(root, set(names)))
    limits = [int(text) for text in texts if text.isdigit()]
    return min((limit for limit in limits if limit < _UNLIMITED_BYTES), default=None)


def core_limit(root: Path = Path("/")) -> float | None:
    """Return the least share of the cores' time that this process's groups may use, in cores."""
    limits = []
    for kind, folder in _groups(root, {"", "cpu"}):
        if kind:
            words = [_read(folder / name) for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")]
        else:
            words = _read(folder / "cpu.max").split()
        # No limit: "max" or -1.
        if len(words) == 2 and all(word.isdigit() for word in words):
            limits.append(int(words[0]) / int(words[1]))
    return min(limits, default=None)


def _groups(root: Path, kinds: set[str]) -> Iterator[tuple[str, Path]]:
    """Yield controller ("" in version 2) and folder of this process's groups and of those around them.

    A container sees the host's path in /proc and its own group at the top, so paths that aren't there are normal.
    """
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        for kind in kinds & set(controllers.split(",")):
            top = root / "sys/fs/cgroup" / (controllers if kind else "")
            own = top / path.lstrip("/")
            for folder in (own, *own.parents):
                if folder.is_relative_to(top):
                    yield kind, folder


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
