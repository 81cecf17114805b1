"""All rows as one Markdown page."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from everest_ds.gpu_check.cases import Row, Values
from everest_ds.gpu_check.machine import DESCRIPTION
from everest_ds.gpu_check.parts import MACHINE, PARTS, Part
from everest_ds.memory.gpus import GIB

_Show = Callable[[Any], str]
_Column = tuple[str, str, _Show]


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.3f}"


def _share(value: float) -> str:
    return f"{value:.1%}"


def _tera(value: float) -> str:
    return f"{value / 1e12:.4g}"


_MEMORY: tuple[_Column, ...] = (
    ("predicted", "predicted_bytes", _gib),
    ("requested", "requested_bytes", _gib),
    ("allocated", "allocated_bytes", _gib),
    ("active", "active_bytes", _gib),
    ("reserved", "reserved_bytes", _gib),
    ("driver", "driver_bytes", _gib),
    ("error", "error", lambda value: f"{value:+.2%}"),
    ("held, predicted", "predicted_held_bytes", _gib),
    ("held", "held_bytes", _gib),
    ("retries", "retries", str),
    ("optimizer", "optimizer", lambda line: re.sub(r"^optimizer: | \(.*", "", line)),
)
# Parts whose cases have the same numbers; of the others each is a line of its own.
_COLUMNS: dict[str, tuple[_Column, ...]] = {
    "memory": _MEMORY,
    "memory-8": _MEMORY,
    "speed": (
        ("clips", "clips", str),
        ("step, ms", "step_s", lambda value: f"{1000 * value:.1f}"),
        ("clips/s", "clips_per_s", lambda value: f"{value:.1f}"),
        ("TFLOP/s", "flops_per_s", _tera),
        ("MFU", "mfu", _share),
        ("product", "product_share", _share),
        ("GiB", "allocated_bytes", _gib),
        ("seconds, ratio", "seconds_ratio", lambda value: f"{value:.3f}"),
        ("arithmetic, ratio", "flops_ratio", lambda value: f"{value:.3f}"),
        ("memory, ratio", "memory_ratio", lambda value: f"{value:.3f}"),
    ),
}


def markdown(rows: Sequence[Row], *, command: str, tiny: bool = False) -> str:
    """Return the page."""
    machine = _description(rows)
    counted = Counter(row.status for row in rows)
    lines = [
        f"# GPU check: {machine.get('device', 'unknown')}",
        "",
        f"Written by `{command}` on {machine.get('date', 'an unknown day')}: {counted['ok']} cases ok, "
        f"{counted['failed']} failed, {counted['not run']} not run. The numbers are in the JSON file beside this page.",
        *(["", "Tiny: vit_micro with a few clips stands for every model that is named."] if tiny else []),
    ]
    for part in PARTS:
        of_part = [row for row in rows if row.part == part.name]
        if of_part:
            lines += ["", f"## {part.title}", "", *([part.says, ""] if part.says else []), *_part(part, of_part)]
    return "\n".join([*lines, ""])


def _description(rows: Iterable[Row]) -> Values:
    return next((row.values for row in rows if (row.part, row.case) == (MACHINE, DESCRIPTION)), {})


def _part(part: Part, rows: Sequence[Row]) -> list[str]:
    columns = [one for one in _COLUMNS.get(part.name, ()) if any(one[1] in row.values for row in rows)]
    in_table = [row for row in rows if any(key in row.values for _, key, _ in columns)]
    lines = []
    if in_table:
        header = ["", *(name for name, _, _ in columns), ""]
        lines += [f"| {' | '.join(header)} |", "|---" + "|---:" * len(columns) + "|---|"]
        for row in in_table:
            cells = [show(row.values[key]) if key in row.values else "" for _, key, show in columns]
            lines.append(f"| {' | '.join([row.case, *cells, _verdict(row)])} |")
        lines.append("")
    for row in rows:
        if row not in in_table:
            told = [_verdict(row), "; ".join(f"{key} {_value(key, value)}" for key, value in row.values.items())]
            lines.append(f"- {row.case}: {'; '.join(filter(None, told))}")
    return lines


def _verdict(row: Row) -> str:
    return "" if row.status == "ok" else f"**{row.status}**: {row.reason}".replace("|", "/")


def _value(key: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_value(key, inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return "".join(f"\n  - {_value('', item)}" for item in value)
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, int) and (key.endswith("_bytes") or key == "after") and value >= 2**20:
        return f"{value / 2**20:.1f} MiB"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)
