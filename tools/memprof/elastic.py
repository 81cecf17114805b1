"""``memprof fit --global-batch``: how 1 to 64 GPUs make the same global batch, as ``train.micro_batch=auto`` would."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from rich.table import Table

from everest_ds.config.errors import UserError
from everest_ds.memory.compare import CHECKPOINTING, check_known
from everest_ds.memory.elastic import ElasticRow, elastic
from everest_ds.memory.gpus import Capacity, parse_capacity
from everest_ds.memory.plan import name_of
from tools.memprof import asking, common


def run(arguments: argparse.Namespace, ds_configs: dict[str, dict[str, Any]]) -> int:
    """Plan every number of ranks and print."""
    world_sizes = _world_sizes(arguments)
    recipe = common.recipe_of_model(arguments, f"train.global_batch={arguments.global_batch}", *arguments.overrides)
    modes = asking.words(arguments.checkpointing or recipe.model.checkpointing)
    check_known("checkpointing", modes, CHECKPOINTING)
    capacity = parse_capacity(arguments.capacity)
    rows: list[ElasticRow] = []
    with asking.progress("planning") as progress:
        for mode in modes:
            model = dataclasses.replace(recipe.model, checkpointing=mode)  # type: ignore[arg-type]
            rows += elastic(
                dataclasses.replace(recipe, model=model),
                ds_configs,
                world_sizes=world_sizes,
                capacity_bytes=capacity.size_bytes,
                device_type=arguments.device,
                progress=progress,
            )
    if arguments.json:
        common.print_json({"capacity_bytes": capacity.size_bytes, "rows": [row.as_json() for row in rows]})
    else:
        name = name_of(recipe.model)
        asking.show(*(_table([row for row in rows if row.checkpointing == mode], name, capacity) for mode in modes))
    return 0


def _world_sizes(arguments: argparse.Namespace) -> tuple[int, ...]:
    """The numbers of ranks that are asked for.

    Raises:
        UserError: one can't be, or a flag is there that says something about another question.
    """
    if arguments.global_batch is None:
        raise UserError("--world-sizes: give --global-batch, the clips that they are to make together")
    if arguments.global_batch < 1:
        raise UserError(f"--global-batch: must be positive, got {arguments.global_batch}")
    for flag in ("accumulation", "write"):
        if getattr(arguments, flag) is not None:
            raise UserError(f"--{flag}: not with --global-batch, which leaves the accumulation open")
    sizes = asking.numbers("--world-sizes", arguments.world_sizes or str(arguments.world_size))
    for size in sizes:
        if size < 1:
            raise UserError(f"--world-sizes: must be positive, got {size}")
    return sizes


def _table(rows: list[ElasticRow], name: str, capacity: Capacity) -> Table:
    """A line per number of ranks, a column per DeepSpeed configuration."""
    unit, unit_bytes = capacity.unit
    first = rows[0]
    table = Table(
        title=f"{name}, {first.precision}, checkpointing {first.checkpointing}: global batch {first.global_batch} as "
        f"micro-batch x accumulation, with the peak in {unit}/rank, within {capacity}"
    )
    table.add_column("ranks", justify="right")
    lines: dict[int, dict[str, str]] = {}
    for row in rows:
        text = f"{row.micro_batch} x {row.accumulation}  {row.predicted_peak_bytes / unit_bytes:.1f}"
        lines.setdefault(row.ranks, {})[row.ds_config] = text if row.fits else f"[bold red]OOM {text}[/]"
    for column in next(iter(lines.values())):
        table.add_column(column, justify="right")
    for ranks, cells in lines.items():
        table.add_row(str(ranks), *cells.values())
    return table
