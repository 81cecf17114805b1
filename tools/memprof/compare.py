"""``memprof compare``: many models, methods, batch sizes and ZeRO stages side by side."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.table import Table

from everest_ds.config.errors import UserError
from everest_ds.memory.compare import METHODS, Question, Row, compare
from everest_ds.memory.gpus import Capacity, parse_capacity
from everest_ds.memory.report import write_report
from tools.memprof import asking, common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this subcommand's flags."""
    parser.add_argument("--models", required=True, help="sizes, such as vit_small,vit_base")
    parser.add_argument("--methods", default=",".join(METHODS), help="default: both")
    parser.add_argument("--global-batches", required=True, help="clips per optimizer step, such as 128,256")
    parser.add_argument("--world-size", type=int, default=8, help="ranks (default 8)")
    parser.add_argument("--accumulation", type=int, default=1, help="passes per optimizer step (default 1)")
    parser.add_argument("--capacity", default="80GB", help="a device's memory: 80GiB, 80GB or a GPU such as A100-80")
    parser.add_argument("--zero", default="0,1,2,3", help="shipped ds_configs by stage or name (zero2_offload)")
    parser.add_argument("--ds_config", nargs="+", metavar="JSON", help="your own DeepSpeed files, instead of --zero")
    parser.add_argument("--checkpointing", default="none", help="none, encoder, decoder, full; several: none,full")
    parser.add_argument("--attention", default="fused", help="fused, eager, or both: fused,eager")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, nothing else")
    parser.add_argument("--report", metavar="DIR", help="write an HTML page and CSV files into this folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys, such as model.decoder_depth=12")


def run(arguments: argparse.Namespace) -> int:
    """Compare and print."""
    capacity = parse_capacity(arguments.capacity)
    question = _question(arguments, capacity)
    with asking.progress("planning") as progress:
        rows = compare(question, progress)
    page = None
    if arguments.report:
        page = write_report(Path(arguments.report), rows, capacity=capacity, ranks=question.ranks)
    if arguments.json:
        common.print_json({"capacity_bytes": capacity.size_bytes, "rows": [row.as_json() for row in rows]})
    else:
        asking.show(*tables(rows, capacity), *([] if page is None else [f"report: {page}"]))
    return 0


def _question(arguments: argparse.Namespace, capacity: Capacity) -> Question:
    if arguments.ds_config and any(not name.endswith(".json") for name in arguments.ds_config):
        raise UserError("--ds_config: expected .json files; shipped ones are chosen by --zero")
    return Question(
        models=asking.words(arguments.models),
        methods=asking.words(arguments.methods),
        global_batches=asking.numbers("--global-batches", arguments.global_batches),
        ds_configs=asking.ds_configs(arguments.ds_config or asking.words(arguments.zero)),
        checkpointing=asking.words(arguments.checkpointing),
        attention=asking.words(arguments.attention),
        ranks=arguments.world_size,
        accumulation=arguments.accumulation,
        capacity_bytes=capacity.size_bytes,
        overrides=tuple(arguments.overrides),
    )


def tables(rows: list[Row], capacity: Capacity) -> list[Table]:
    """One table per checkpointing mode and attention: a line per configuration, a column per global batch."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.checkpointing, row.attention), []).append(row)
    return [_table(group, capacity, *key) for key, group in groups.items()]


def _table(rows: list[Row], capacity: Capacity, checkpointing: str, attention: str) -> Table:
    unit, unit_bytes = capacity.unit
    table = Table(
        title=f"{unit} per GPU / per node, by global batch. Checkpointing {checkpointing}, {attention} attention, "
        f"{rows[0].precision}. OOM: above {capacity}"
    )
    for column in ("model", "method", "ds_config"):
        table.add_column(column)
    batches = list(dict.fromkeys(row.global_batch for row in rows))
    for batch in batches:
        table.add_column(str(batch), justify="right")
    lines: dict[tuple[str, ...], dict[int, Row]] = {}
    for row in rows:
        lines.setdefault(row.configuration, {})[row.global_batch] = row
    previous = None
    for line in lines.values():
        first = line[batches[0]]
        if previous not in (None, (first.model, first.method)):
            table.add_section()
        previous = first.model, first.method
        table.add_row(
            first.model, first.method, first.ds_config, *(_cell(line[batch], unit_bytes) for batch in batches)
        )
    return table


def _cell(row: Row, unit_bytes: int) -> str:
    text = f"{row.predicted_peak_bytes / unit_bytes:.1f} / {row.node_total_bytes / unit_bytes:.0f}"
    return text if row.fits else f"[bold red]OOM {text}[/]"
