"""Benchmark results as Markdown and JSON, with the machine that they were measured on."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from everest_ds.training import ranks
from everest_ds.training.doctor.host import processor


def machine() -> str:
    """Describe in one line what a benchmark runs on."""
    device = "" if ranks.on_cpu() else f"{ranks.device_name()}; "
    # Settings of glibc's allocator, which decide how many pages of a CPU step are zeroed anew (mallopt(3)).
    allocator = "".join(f", {name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_"))
    return (
        f"{device}{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}, Python {platform.python_version()}, torch {torch.__version__}"
        f"{allocator}"
    )


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median, least and most of several measurements."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise at least one value."""
        return cls(median=statistics.median(values), least=min(values), most=max(values))

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} ({self.least:{spec}} to {self.most:{spec}})"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table; the first column is text, the others are numbers."""
    lines = [f"| {' | '.join(header)} |", "|---" + "|---:" * (len(header) - 1) + "|"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def write(path: Path, lines: Sequence[str], numbers: dict[str, Any]) -> str:
    """Write Markdown to ``path`` and the numbers beside it as JSON. Returns the Markdown."""
    text = "\n".join(lines) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.with_suffix(".json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    return text
