"""The data benchmark as Markdown."""

from __future__ import annotations

from everest_ds.benchmarks import tables
from everest_ds.benchmarks.data import Result


def report(result: Result, *, command: str) -> list[str]:
    """Return the lines of the tables."""
    rows = []
    for row in result.rows:
        parts = [f"{ms:.1f}" if ms else "" for ms in (row.decode_ms, row.transform_ms)]
        rows.append([row.form, f"{row.clips_per_s:.1f}", *parts])
    return [
        "# Clips per second and core",
        "",
        f"Written by `{command}` ({tables.machine()}).",
        "",
        "Clips of 16 frames, stride 4, cropped to 224 px: read in one process, per second of processor time. Median "
        "(least to most) of rounds; milliseconds per clip of decoding and of cropping, by the clock.",
        "",
        *tables.markdown(["form", "clips/s/core", "decode ms", "transform ms"], rows),
        "",
        *tables.markdown(
            ["ratio of clips/s/core, round by round", "median (least to most)"],
            [[f"{r.numerator} / {r.denominator}", f"{r.spread:.2f}"] for r in result.ratios],
        ),
    ]
