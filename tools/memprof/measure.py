"""``memprof measure``: really run steps; predicted beside measured beside residual, always."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from everest_ds.config.errors import UserError
from everest_ds.config.finetuning import phase_of
from everest_ds.config.load import to_tree
from everest_ds.config.schema import Recipe
from everest_ds.memory.gpus import size
from tools.memprof import common
from tools.memprof.launch import launch

if TYPE_CHECKING:
    from everest_ds.memory.feed import Feed
    from everest_ds.memory.plan import Plan

_GIGA = 1e9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this subcommand's flags."""
    common.add_run_arguments(parser)
    parser.add_argument("--ranks", type=int, default=1, help="processes on this machine")
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument(
        "--trim", action="store_true", help="let the C library give back freed memory at once: less memory, slower"
    )
    parser.add_argument(
        "--feed", action="store_true", help="time reading the videos of data.train: how many cores feed --gpus"
    )
    parser.add_argument("--gpus", default="8xA100-80", help="with --feed: how many of which (default 8xA100-80)")
    parser.add_argument(
        "--utilisation", type=float, default=0.4, help="with --feed: share of their peak that training reaches (0.4)"
    )
    parser.add_argument("--matrix", type=Path, metavar="FILE", help="run the accuracy matrix; write it as Markdown")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print."""
    for name in ("ranks", "steps"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name}: must be positive, got {getattr(arguments, name)}")
    if arguments.matrix is not None:
        from tools.memprof import matrix  # noqa: PLC0415 - torch, as below

        return matrix.run(arguments.matrix, ranks=arguments.ranks)
    recipe, ds_config = common.recipe_from(arguments), common.ds_config_from(arguments)
    # torch takes seconds to import: after the checks that don't need it.
    from everest_ds.memory.plan import device_type_here, plan  # noqa: PLC0415

    planned = plan(recipe, ds_config, ranks=arguments.ranks, device_type=device_type_here())
    if planned.device_type == "cpu":
        check_room(planned)
    fed = _feed(arguments, recipe) if arguments.feed else None
    jobs = [job(recipe, ds_config, steps=arguments.steps, name=planned.name)]
    per_rank = launch(jobs, ranks=arguments.ranks, trim=arguments.trim)[0]
    result = compare(planned, per_rank)
    if arguments.json:
        common.print_json(result | ({} if fed is None else {"feed": fed.as_json()}))
    else:
        common.show(comparison_table(result))
        if fed is not None:
            print(fed)
    return 0


def check_room(planned: Plan) -> None:
    """Hear beforehand that ranks on the CPU won't fit, before the system begins to end processes.

    Raises:
        UserError: they take more together than is free.
    """
    import torch  # noqa: PLC0415 - as above

    from everest_ds.memory.meters import available_bytes  # noqa: PLC0415 - as above
    from everest_ds.memory.overheads import RESERVE  # noqa: PLC0415 - as above
    from everest_ds.memory.processes import together_bytes  # noqa: PLC0415 - as above

    needed, free = together_bytes(planned), available_bytes(torch.device("cpu"))
    if needed > (1 - RESERVE) * free:
        ranks = planned.setting.ranks
        raise UserError(
            f"measure: {planned.name}: the processes of {ranks} ranks need {size(needed)}, and "
            f"{size(free)} is free, of which {RESERVE:.0%} are left alone; try fewer --ranks, a smaller "
            "--micro-batch, --precision bf16, or ds_configs/zero3_nvme.json"
        )


def _feed(arguments: argparse.Namespace, recipe: Recipe) -> Feed:
    """Read some of the training videos, in an order that a run could have.

    Raises:
        UserError: no manifest, nothing readable in it, or no such GPU.
    """
    from everest_ds.data.rate import training_rate  # noqa: PLC0415 - torch, as above
    from everest_ds.memory.feed import feed, parse_gpus  # noqa: PLC0415

    gpus, gpu = parse_gpus(arguments.gpus)
    return feed(recipe, training_rate(recipe), gpus=gpus, gpu=gpu, utilisation=arguments.utilisation)


def job(recipe: Recipe, ds_config: dict[str, Any], *, steps: int, name: str) -> dict[str, Any]:
    """What the ranks are sent."""
    return {"name": name, "phase": phase_of(recipe), "recipe": to_tree(recipe), "ds_config": ds_config, "steps": steps}


def compare(planned: Plan, per_rank: list[dict[str, Any]]) -> dict[str, Any]:
    """Put the prediction beside the rank that needed most. On a CPU device and host are one memory."""
    from everest_ds.memory.record import seen_held_bytes, seen_peak_bytes  # noqa: PLC0415 - torch, as above
    from everest_ds.memory.traffic import message_bytes  # noqa: PLC0415

    measured = max(per_rank, key=lambda m: m["measured_peak_bytes"])
    on_cpu = planned.device_type == "cpu"
    comparable = seen_peak_bytes(planned)
    return {
        "predicted_peak_bytes": planned.predicted_peak_bytes,
        "device": planned.device,
        "host": planned.host,
        "nvme": planned.nvme,
        "config": planned.describe(),
        "measured_peak_bytes": measured["measured_peak_bytes"],
        "measured_by": measured["measured_by"],
        "compared_bytes": comparable,
        "residual_bytes": measured["measured_peak_bytes"] - comparable,
        "predicted_resident_bytes": planned.process_peak_bytes if on_cpu else sum(planned.host.values()),
        "rss_growth_bytes": measured["rss_growth_bytes"],
        "predicted_states_bytes": seen_held_bytes(planned),
        "states_bytes": measured["states_bytes"],
        "predicted_message_bytes": message_bytes(planned),
        "message_bytes": sum(measured["messages"].values()),
        "step_s": measured["step_s"],
        "step_spread_s": measured["step_spread_s"],
        "clips_per_s": sum(m["clips_per_s"] for m in per_rank),
        "flops_per_s": measured["flops_per_s"],
        "matmul_flops_per_s": measured["matmul_flops_per_s"],
        "flops_convention": "2 per multiply-accumulate of matrix products; backward = 2 x forward; per rank",
        "per_rank": per_rank,
    }


def comparison_table(result: dict[str, Any]) -> Table:
    """Predicted, measured, residual; then speed."""
    table = Table(title=f"one rank, measured by {result['measured_by']}")
    for column in ("", "predicted", "measured", "residual"):
        table.add_column(column, justify="right" if column else "left")
    rows = [
        ("peak of a step", result["compared_bytes"], result["measured_peak_bytes"]),
        ("held between steps", result["predicted_states_bytes"], result["states_bytes"]),
        ("messages of a step", result["predicted_message_bytes"], result["message_bytes"]),
    ]
    # With a GPU the resident set is mostly the driver's and the libraries', of which no plan speaks.
    if result["config"]["device_type"] == "cpu":
        rows.append(("resident set growth", result["predicted_resident_bytes"], result["rss_growth_bytes"]))
    for name, predicted, measured in rows:
        residual = measured - predicted
        share = f"{size(residual)} ({100 * residual / max(measured, 1):+.2f} %)"
        table.add_row(name, size(predicted), size(measured), share)
    table.add_section()
    peak_share = 100 * result["flops_per_s"] / result["matmul_flops_per_s"]
    table.add_row("step", "", f"{result['step_s']:.3f} s", f"spread {result['step_spread_s']:.3f} s")
    table.add_row("clips, all ranks", "", f"{result['clips_per_s']:.2f} /s", "")
    table.add_row(
        "arithmetic", "", f"{result['flops_per_s'] / _GIGA:.1f} GFLOP/s", f"{peak_share:.0f} % of a matrix product's"
    )
    return table
