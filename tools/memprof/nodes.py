"""``memprof nodes``: the configuration that ``fit`` chooses for nodes of several sizes, both methods side by side."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.table import Table

from everest_ds.config.errors import UserError
from everest_ds.memory.compare import METHODS
from everest_ds.memory.gpus import GB, parse_capacity
from everest_ds.memory.nodes import NodeRow, nodes
from tools.memprof import asking, common
from tools.memprof.fit import SHIPPED

_TITLE = "# Large models on one node"
_COLUMNS = (
    "model",
    "method",
    "GPU memory",
    "ds_config",
    "checkpointing",
    "micro x passes x GPUs",
    "predicted peak, GB",
    "largest micro-batch",
    "sent per step, GB",
)
_NUMBERS_FROM = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this subcommand's flags."""
    parser.add_argument("--models", default="vit_huge,vit_giant", help="sizes (default vit_huge,vit_giant)")
    parser.add_argument("--methods", default=",".join(METHODS), help="default: both")
    parser.add_argument("--capacities", default="80GB,40GB,24GB", help="a GPU's memory (default 80GB,40GB,24GB)")
    parser.add_argument("--world-size", type=int, default=8, help="GPUs (default 8)")
    parser.add_argument("--global-batch", type=int, default=512, help="clips per optimizer step (default 512)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, nothing else")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the table as Markdown")


def run(arguments: argparse.Namespace) -> int:
    """Choose, and print or write."""
    if arguments.world_size < 1 or arguments.global_batch < 1:
        raise UserError("--world-size and --global-batch: must be positive")
    if arguments.report is not None:
        asking.check_page(arguments.report, _TITLE)
    with asking.progress("planning") as progress:
        rows = list(
            nodes(
                asking.words(arguments.models),
                asking.words(arguments.methods),
                asking.ds_configs(asking.words(SHIPPED)),
                capacities=[parse_capacity(text) for text in asking.words(arguments.capacities)],
                ranks=arguments.world_size,
                global_batch=arguments.global_batch,
                progress=progress,
            )
        )
    if arguments.json:
        common.print_json({"rows": [row.as_json() for row in rows]})
    elif arguments.report is None:
        asking.show(table(rows))
    if arguments.report is not None:
        asking.write_page(arguments.report, markdown(rows, " ".join(sys.argv[2:])))
    return 0


def cells(row: NodeRow) -> list[str]:
    """A row's columns."""
    found = row.as_json()
    first = [row.model, row.method, row.capacity.text]
    if not found["fits"]:
        return [*first, "nothing fits", *("-" for _ in _COLUMNS[4:])]
    return [
        *(*first, found["ds_config"], found["checkpointing"]),
        f"{found['micro_batch']} x {found['accumulation']} x {row.ranks}",
        f"{found['predicted_peak_bytes'] / GB:.1f}",
        str(found["max_micro_batch"]),
        f"{found['sent_bytes'] / GB:.2f}",
    ]


def table(rows: list[NodeRow]) -> Table:
    """A line per model, method and memory."""
    shown = Table(title="the fastest by arithmetic that fits, and how it makes the global batch")
    for number, column in enumerate(_COLUMNS):
        shown.add_column(column, justify="right" if number >= _NUMBERS_FROM else "left")
    for row in rows:
        shown.add_row(*cells(row))
    return shown


def markdown(rows: list[NodeRow], flags: str) -> str:
    """The same as a page."""
    rule = ["---:" if number >= _NUMBERS_FROM else "---" for number in range(len(_COLUMNS))]
    return "\n".join(
        [
            _TITLE,
            "",
            f"Written by `python tools/memprof nodes {flags}`. Predicted, not run on a GPU: bf16, fused attention, the"
            " recipes' decoder. GB is 1e9 bytes; context, NCCL and cuBLAS are counted as docs/memory.md says,"
            " fragmentation is not. Each line is what `memprof fit` calls fastest (least arithmetic, then no offload,"
            " then no gathering in every pass), with the largest micro-batch that divides a GPU's share of the global"
            " batch; `train.micro_batch=auto` comes to the same.",
            "",
            *(f"| {' | '.join(line)} |" for line in (_COLUMNS, rule, *map(cells, rows))),
            "",
        ]
    )
