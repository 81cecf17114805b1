"""``memprof fit``: the largest micro-batch per ZeRO stage and checkpointing mode, and which is fastest.

With ``--global-batch`` and ``--world-sizes``: how each number of ranks makes that batch (tools/memprof/elastic.py).
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

from rich.table import Table

from everest_ds.config.errors import UserError
from everest_ds.memory.compare import CHECKPOINTING
from everest_ds.memory.fit import FitRow, fastest, fit, suggested_ds_config
from everest_ds.memory.gpus import Capacity, parse_capacity
from everest_ds.memory.plan import name_of
from tools.memprof import asking, common, elastic

_GIGA = 10**9
SHIPPED = "0,1,2,3,zero2_offload,zero3_offload"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this subcommand's flags."""
    common.add_model_arguments(parser)
    parser.add_argument("--world-size", type=int, default=8, help="ranks (default 8)")
    parser.add_argument("--accumulation", type=int, help="passes per optimizer step (default 1)")
    parser.add_argument(
        "--global-batch",
        type=int,
        help="clips per optimizer step: show how ranks make it, as train.micro_batch=auto does",
    )
    parser.add_argument("--world-sizes", help="with --global-batch: numbers of ranks, such as 1,8,64")
    parser.add_argument("--capacity", default="80GB", help="a device's memory: 80GiB, 80GB or a GPU such as A100-80")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="what ranks compute on")
    parser.add_argument("--ds_config", nargs="+", metavar="JSON", help="DeepSpeed files (default: the shipped ones)")
    parser.add_argument(
        "--checkpointing", help=f"modes to try, of {','.join(CHECKPOINTING)} (default: all that differ)"
    )
    parser.add_argument(
        "--least-micro-batch", type=int, default=1, help="the fastest must fit so many clips per rank (default 1)"
    )
    parser.add_argument("--write", metavar="PATH", help="write the fastest's DeepSpeed JSON there")
    parser.add_argument("--force", action="store_true", help="let --write replace a file")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, nothing else")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys, such as model.attention=eager")


def run(arguments: argparse.Namespace) -> int:
    """Search, print, and write the suggestion."""
    if arguments.write and Path(arguments.write).exists() and not arguments.force:
        raise UserError(f"--write {arguments.write}: exists already; give another path, or --force to replace it")
    if arguments.global_batch is not None or arguments.world_sizes is not None:
        return elastic.run(arguments, asking.ds_configs(arguments.ds_config or asking.words(SHIPPED)))
    recipe = common.recipe_of_model(arguments, *arguments.overrides)
    capacity = parse_capacity(arguments.capacity)
    files = asking.ds_configs(arguments.ds_config or asking.words(SHIPPED))
    with asking.progress("planning") as progress:
        rows = fit(
            recipe,
            files,
            ranks=arguments.world_size,
            capacity=capacity,
            checkpointing=None if arguments.checkpointing is None else asking.words(arguments.checkpointing),
            accumulation=1 if arguments.accumulation is None else arguments.accumulation,
            device_type=arguments.device,
            progress=progress,
        )
    best = fastest(rows, least_micro_batch=arguments.least_micro_batch)
    written = []
    if arguments.write:
        if best is None:
            raise UserError(f"--write {arguments.write}: nothing fits into {capacity}, so there is nothing to suggest")
        write_suggestion(Path(arguments.write), suggested_ds_config(files[best.ds_config], best))
        written = [f"suggested DeepSpeed file: {arguments.write}", command(best, arguments)]
    if arguments.json:
        common.print_json(
            {
                "capacity_bytes": capacity.size_bytes,
                "rows": [row.as_json() for row in rows],
                "fastest": None if best is None else best.as_json(),
            }
        )
    else:
        asking.show(table(rows, best, capacity, arguments.world_size), _verdict(best, capacity), *written)
    return 0


def write_suggestion(path: Path, ds_config: dict[str, object]) -> None:
    """Write a DeepSpeed JSON.

    Raises:
        UserError: the path can't be written.
    """
    try:
        path.write_text(json.dumps(ds_config, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--write {path}: {error.strerror}") from error


def command(row: FitRow, arguments: argparse.Namespace) -> str:
    """The training command that goes with a suggestion."""
    # A classifier's encoder comes from a pre-training run, its classes from the labels.
    own = {"pretrain": [f"model.method={row.method}"], "finetune": ["train.pretrained=RUN"]}[row.phase]
    keys = [f"model.size={row.model}", *own, f"model.checkpointing={row.checkpointing}", *arguments.overrides]
    words = ["deepspeed", f"run/{row.phase}.py", "--ds_config", arguments.write, *keys]
    return f"train with: {shlex.join(words)} data.train=..."


def table(rows: list[FitRow], best: FitRow | None, capacity: Capacity, ranks: int) -> Table:
    """One line per DeepSpeed configuration and checkpointing mode."""
    unit, unit_bytes = capacity.unit
    first = rows[0]
    what = f"{name_of(first.plan.recipe.model)}, {ranks} ranks, {first.precision}, {first.attention} attention"
    result = Table(title=f"{what}: largest micro-batch within {capacity}")
    result.add_column("ds_config")
    result.add_column("checkpointing")
    for column in (
        "max micro-batch",
        "global batch",
        f"peak {unit}/GPU",
        f"host {unit}/rank",
        "GMACs/clip",
        "arithmetic",
    ):
        result.add_column(column, justify="right")
    bounded = any(row.upper_bound_clips_per_s is not None for row in rows)
    if bounded:
        result.add_column("upper bound clips/s/GPU*", justify="right")
    for row in rows:
        bound = [f"{row.upper_bound_clips_per_s:,.0f}" if row.upper_bound_clips_per_s else "-"] if bounded else []
        result.add_row(
            row.ds_config,
            row.checkpointing,
            str(row.max_micro_batch) if row.max_micro_batch else "[bold red]OOM at 1[/]",
            str(row.max_global_batch) if row.max_micro_batch else "-",
            f"{row.predicted_peak_bytes / unit_bytes:.1f}",
            f"{row.host_bytes / unit_bytes:.1f}" if row.host_bytes else "-",
            f"{row.step_macs / _GIGA:.1f}",
            f"{row.arithmetic:.2f} x",
            *bound,
            style="bold green" if row is best else None,
        )
    if bounded:
        result.caption = (
            "* from the data sheet's dense peak rate and the step's matrix products alone; no run reaches it"
        )
    return result


def _verdict(best: FitRow | None, capacity: Capacity) -> str:
    if best is None:
        return f"nothing fits into {capacity}"
    lacks = capacity.gpu is not None and best.precision not in capacity.gpu.rates
    note = f"; {capacity.text} has no {best.precision}: enable fp16 in the DeepSpeed JSON, it takes the same memory"
    return (
        f"fastest by arithmetic: {best.ds_config}, checkpointing {best.checkpointing}, micro-batch "
        f"{best.max_micro_batch} (ties: no offload, then without ZeRO-3's gathering, then the larger batch)"
        f"{note if lacks else ''}"
    )
