"""What a run writes down as it goes: metrics.jsonl and validation.jsonl."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


class MetricsFile:
    """Appends one JSON object per logged step, flushed at once.

    Lines beyond the step that a run continues from are moved beside it (``metrics.discarded.jsonl``), not deleted.
    """

    def __init__(self, path: Path, *, from_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._set_aside(path, from_step)
        self._file = path.open("a", encoding="utf-8")
        self._path = path

    def write(self, record: dict[str, Any]) -> None:
        """Append a record; numbers that aren't finite are written as null, as JSON has no name for them."""
        self._file.write(json.dumps({k: _finite(v) for k, v in record.items()}) + "\n")
        self._file.flush()

    def holds(self, step: int) -> bool:
        """Whether there is a record of a step."""
        return any(_step(line) == step for line in self._path.read_text(encoding="utf-8").splitlines())

    @staticmethod
    def _set_aside(path: Path, from_step: int) -> None:
        kept: list[str] = []
        later: list[str] = []
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            (kept if _step(line) <= from_step else later).append(line)
        if later:
            with path.with_name(f"{path.stem}.discarded{path.suffix}").open("a", encoding="utf-8") as discarded:
                discarded.writelines(later)
            path.write_text("".join(kept), encoding="utf-8")


def _step(line: str) -> float:
    """Return the step of a line; one that was cut off while being written is beyond any."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
