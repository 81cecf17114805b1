"""``memprof paper``: every published GFLOP and memory figure beside ours, and which claims hold where."""

from __future__ import annotations

import argparse
from typing import Any

from rich.table import Table

from everest_ds.memory.paper import claims_rows, gflops_rows, keep_ratio_note, memory_rows
from tools.memprof import asking, common

_MEMORY_NOTE = (
    "Ours is the peak of tensors, times 8 GPUs: no CUDA context, no fragmentation; what the paper counted isn't "
    "stated. OOM: more than a GPU of that table has (80 or 48 GB)."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this subcommand's flags."""
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, nothing else")


def run(arguments: argparse.Namespace) -> int:
    """Count, trace and print; about a minute."""
    zero2 = asking.ds_configs(["zero2"])["zero2"]
    with asking.progress("reproducing") as progress:
        gflops = gflops_rows(progress=progress)
        memory = memory_rows(zero2, progress=progress)
        note = keep_ratio_note(gflops)
    claims = claims_rows(memory)
    if arguments.json:
        common.print_json({"gflops": gflops, "memory": memory, "claims": claims, "notes": [note, _MEMORY_NOTE]})
        return 0
    asking.show(gflops_table(gflops), note, *memory_tables(memory), _MEMORY_NOTE, claims_table(claims))
    return 0


def gflops_table(rows: list[dict[str, Any]]) -> Table:
    """Published and our own compute."""
    table = Table(title="giga multiply-accumulates, forward, one clip")
    for column in ("table", "phase", "method", "model", "keep", "visible", "frames"):
        table.add_column(column)
    for column in ("published", "ours", "difference"):
        table.add_column(column, justify="right")
    for row in rows:
        names = (
            str(row[key]) for key in ("table", "phase", "method", "model", "keep_ratio", "visible_ratio", "frames")
        )
        table.add_row(*names, f"{row['published']:g}", f"{row['ours']:.2f}", f"{row['difference']:+.2%}")
    return table


def memory_tables(rows: list[dict[str, Any]]) -> list[Table]:
    """Published and predicted memory: a table per practice, the decoder depths side by side."""
    tables = []
    for practice in dict.fromkeys(row["practice"] for row in rows):
        own = [row for row in rows if row["practice"] == practice]
        depths = sorted({row["decoder_depth"] for row in own if row["decoder_depth"]})
        table = Table(title=f"GB per node of 8 GPUs. {practice}")
        for column in ("table", "method", "model", "batch"):
            table.add_column(column)
        table.add_column("published", justify="right")
        for depth in depths:
            table.add_column(f"ours, depth {depth}", justify="right")
            table.add_column("residual", justify="right")
        cells: dict[tuple[Any, ...], dict[int | None, dict[str, Any]]] = {}
        for row in own:
            key = row["table"], row["method"], row["model"], row["global_batch"]
            cells.setdefault(key, {})[row["decoder_depth"]] = row
        for key, by_depth in cells.items():
            # A classifier has no decoder: its one figure goes into the first columns.
            found = [by_depth[depth] for depth in depths if depth in by_depth] or [by_depth[None]]
            table.add_row(
                *map(str, key), _gb(found[0]["published_gb"]), *(text for row in found for text in _ours(row))
            )
        tables.append(table)
    return tables


def claims_table(rows: list[dict[str, Any]]) -> Table:
    """Which claims hold in which setting."""
    table = Table(title="claims")
    for column in ("setting", "claim", "holds", "found"):
        table.add_column(column)
    previous = None
    for row in rows:
        if previous not in (None, row["setting"]):
            table.add_section()
        holds = "[green]yes[/]" if row["holds"] else "[bold red]no[/]"
        table.add_row("" if previous == row["setting"] else row["setting"], row["claim"], holds, row["found"])
        previous = row["setting"]
    return table


def _gb(value: float | None) -> str:
    return "OOM" if value is None else f"{value:.1f}"


def _ours(row: dict[str, Any]) -> tuple[str, str]:
    ours = f"{row['predicted_gb']:.1f}" if row["ours_gb"] is not None else f"[red]OOM ({row['predicted_gb']:.1f})[/]"
    return ours, "" if row["residual_gb"] is None else f"{row['residual_gb']:+.1f}"
