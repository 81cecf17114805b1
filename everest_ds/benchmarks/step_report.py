"""The step benchmark as Markdown."""

from __future__ import annotations

from everest_ds.benchmarks import tables
from everest_ds.benchmarks.step import Result, Row

_MIB = 2**20
_GIGA = 1e9


def report(result: Result, *, command: str) -> list[str]:
    """Return the lines of the tables."""
    asked = result.settings
    lines = [
        "# Seconds of a step",
        "",
        f"Written by `{command}` ({tables.machine()}).",
        "",
        f"Forward pass, loss and backward pass of {asked.batch} random clips in {asked.precision}; every variant in "
        f"turn, {asked.pairs} rounds. Median (least to most). *Share* is of the fastest plain matrix product of the "
        "step's own four largest shapes, timed in the same round. Arithmetic by the published count: two operations "
        "per multiply-accumulate, the backward pass twice the forward; *done* is the share when only the products that "
        "our way takes count (no gradient of pixels and scores, no embedding of hidden tokens). *Peak*: tensors "
        "beyond the parameters, gradients included.",
        "",
        *tables.markdown(["step", "s", "GFLOP/s", "share", "done", "peak MiB"], [_cells(row) for row in result.rows]),
        "",
        *tables.markdown(
            ["ratio of seconds, round by round", "median (least to most)"],
            [[f"{r.size}: {r.numerator} / {r.denominator}", f"{r.spread:.3f}"] for r in result.ratios],
        ),
    ]
    for size, rates in result.product_flops_per_s.items():
        for task, rate in rates.items():
            giga = tables.Spread.of([value / _GIGA for value in (rate.median, rate.least, rate.most)])
            lines += ["", f"Fastest matrix product of {size}'s shapes, {task}: {giga:.0f} GFLOP/s."]
    for size, profile in result.profiles.items():
        lines += ["", f"Where the time of {size} goes, one profiled step:", "", *_profile(profile)]
    return lines


def _cells(row: Row) -> list[str]:
    speed = row.flops_per_s.median / _GIGA
    peak = "" if row.peak_bytes is None else f"{row.peak_bytes / _MIB:.0f}"
    return [
        f"{row.size}: {row.variant.name}",
        f"{row.seconds:.3f}",
        f"{speed:.0f}",
        f"{row.share:.2f}",
        f"{row.done_share:.2f}",
        peak,
    ]


def _profile(columns: dict[str, dict[str, float]]) -> list[str]:
    parts = dict.fromkeys(part for column in columns.values() for part in column)
    rows = [[part, *(f"{column.get(part, 0):.0f}" for column in columns.values())] for part in parts]
    rows.append(["all", *(f"{sum(column.values()):.0f}" for column in columns.values())])
    return tables.markdown(["milliseconds of a step", *columns], rows)
