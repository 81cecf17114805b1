"""What a run writes down as it goes: metrics.jsonl and validation.jsonl."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from everest_ds.training import files


class MetricsFile:
    """Appends one JSON object per logged step, at once.

    Lines beyond the step that a run continues from are moved beside it (``metrics.discarded.jsonl``), not deleted.

    Args:
        path: the file.
        from_step: the step that the run continues from.
        also: is given each record, too.
    """

    def __init__(self, path: Path, *, from_step: int, also: Callable[[dict[str, Any]], None] | None = None) -> None:
        if path.exists():
            self._set_aside(path, from_step)
        self._lines, self._also = files.Lines(path), also

    def write(self, record: dict[str, Any]) -> None:
        """Append a record."""
        self._lines.append(record)
        if self._also is not None:
            self._also(record)

    def holds(self, step: int) -> bool:
        """Whether there is a record of a step."""
        path = self._lines.path
        return path.exists() and any(_step(line) == step for line in path.read_text(encoding="utf-8").splitlines())

    @staticmethod
    def _set_aside(path: Path, from_step: int) -> None:
        kept: list[str] = []
        later: list[str] = []
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            (kept if _step(line) <= from_step else later).append(line)
        if later:
            with path.with_name(f"{path.stem}.discarded{path.suffix}").open("a", encoding="utf-8") as discarded:
                discarded.writelines(later)
            files.write(path, "".join(kept))


def _step(line: str) -> float:
    """Return the step of a line; one that was cut off while being written is beyond any."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
