"""``memprof scaling``: a model of 8 to 1024 GPUs; ``--check`` runs CPU ranks and counts what they send."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.table import Table

from everest_ds.config.errors import UserError
from everest_ds.config.load import load_recipe
from everest_ds.memory.compare import METHODS
from everest_ds.memory.gpus import GPUS, gpu_hint, named_gpu, size
from everest_ds.memory.plan import plan
from everest_ds.memory.scaling import Cluster, Scaling, ScalingRow
from everest_ds.memory.scaling_report import TITLE, Checked, Page
from tools.memprof import asking, common
from tools.memprof.launch import launch
from tools.memprof.measure import compare, job

_SIZES = "vit_small,vit_base,vit_large,vit_huge,vit_giant"
_GPUS = "8,16,32,64,128,256,512,1024"
_GIGA = 1e9
# Of prepared videos, four clips a file, on a core with AVX2; one with AVX-512 read 27 (docs/performance-data.md).
_CLIPS_PER_S_PER_CORE = 22.0
_CHECK_RANKS = (1, 2, 4, 8)
_CHECK_MODEL = ("model.size=vit_micro", "model.image_size=48", "train.micro_batch=1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this subcommand's flags."""
    parser.add_argument("--models", default=_SIZES, help=f"sizes (default {_SIZES})")
    parser.add_argument("--methods", default=",".join(METHODS), help="default: both")
    parser.add_argument("--zero", default="0,1,2,3", help="shipped ds_configs by stage or name")
    parser.add_argument("--gpus", default=_GPUS, help=f"numbers of GPUs (default {_GPUS})")
    parser.add_argument("--micro-batch", type=int, default=32, help="clips per GPU and pass (default 32)")
    parser.add_argument("--global-batch", type=int, default=1024, help="for the table that keeps it (default 1024)")
    parser.add_argument("--gpu", default="A100-80", help=f"one of {', '.join(GPUS)} (default A100-80)")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="default 8")
    parser.add_argument("--link", type=float, default=300.0, help="GB/s between GPUs of a node (default 300: NVLink 3)")
    parser.add_argument("--networks", default="200,400", help="Gb/s out of a node (default 200,400)")
    parser.add_argument("--utilisation", type=float, default=0.4, help="share of their peak that GPUs reach (0.4)")
    parser.add_argument(
        "--clips-per-core",
        type=float,
        default=_CLIPS_PER_S_PER_CORE,
        help=f"clips/s that a core reads, as tools/benchmark.py data measures (default {_CLIPS_PER_S_PER_CORE:g})",
    )
    parser.add_argument("--check", action="store_true", help="run 1, 2, 4 and 8 CPU ranks and compare what they send")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, nothing else")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the page as Markdown")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys, such as model.decoder_depth=12")


def run(arguments: argparse.Namespace) -> int:
    """Reckon, and print or write."""
    asked = _question(arguments)
    if arguments.clips_per_core <= 0 or arguments.global_batch < 1:
        raise UserError("--clips-per-core and --global-batch: must be positive")
    if arguments.report is not None:
        asking.check_page(arguments.report, TITLE)
    with asking.progress("planning") as progress:
        rows = list(asked.rows(progress))
    checked = check(asked) if arguments.check else []
    if arguments.json:
        errors = [vars(row) | {"error": row.error} for row in checked]
        common.print_json({"rows": [row.as_json() for row in rows], "checked": errors})
    elif arguments.report is None:
        asking.show(table(rows))
    if arguments.report is not None:
        page = Page(
            command=" ".join(["python tools/memprof scaling", *sys.argv[2:]]),
            asked=asked,
            rows=rows,
            checked=checked,
            checked_model=", ".join(_CHECK_MODEL),
            global_batch=arguments.global_batch,
            clips_per_s_per_core=arguments.clips_per_core,
        )
        asking.write_page(arguments.report, page.markdown())
    return 0


def _question(arguments: argparse.Namespace) -> Scaling:
    gpu = named_gpu(arguments.gpu)
    if gpu is None:
        raise UserError(f"--gpu: unknown GPU '{arguments.gpu}'{gpu_hint(arguments.gpu)}")
    return Scaling(
        models=asking.words(arguments.models),
        methods=asking.words(arguments.methods),
        ds_configs=asking.ds_configs(asking.words(arguments.zero)),
        gpus=asking.numbers("--gpus", arguments.gpus),
        micro_batch=arguments.micro_batch,
        cluster=Cluster(
            gpu=gpu,
            gpus_per_node=arguments.gpus_per_node,
            link_bytes_per_s=arguments.link * _GIGA,
            gigabits=asking.numbers("--networks", arguments.networks),
            utilisation=arguments.utilisation,
        ),
        overrides=tuple(arguments.overrides),
    )


def check(asked: Scaling, numbers: tuple[int, ...] = _CHECK_RANKS) -> list[Checked]:
    """Run every DeepSpeed configuration on CPU ranks, a small model, and count what leaves a rank."""
    recipe = load_recipe(None, _CHECK_MODEL)
    found = []
    for ranks in numbers:
        jobs = [job(recipe, dict(ds), steps=1, name=f"{name}, {ranks} ranks") for name, ds in asked.ds_configs.items()]
        measured = launch(jobs, ranks=ranks, load_libraries=False)
        for (name, ds), per_rank in zip(asked.ds_configs.items(), measured, strict=True):
            result = compare(plan(recipe, dict(ds), ranks=ranks, device_type="cpu"), per_rank)
            sizes = result["predicted_message_bytes"], result["message_bytes"]
            found.append(Checked(ranks=ranks, ds_config=name, predicted_bytes=sizes[0], measured_bytes=sizes[1]))
    return found


def table(rows: list[ScalingRow]) -> Table:
    """A line per configuration."""
    networks = list(rows[0].efficiency)
    shown = Table(title="per GPU and step; efficiency: arithmetic's share of the step, at best. A model: see --report")
    for column in (
        "model",
        "method",
        "ds_config",
        "GPUs",
        "clips",
        "memory",
        "largest micro-batch",
        "sent",
        "arithmetic",
    ):
        shown.add_column(column, justify="left" if column in ("model", "method", "ds_config") else "right")
    for rate in networks:
        shown.add_column(f"{rate} Gb/s", justify="right")
    for row in rows:
        memory = size(row.predicted_peak_bytes) + ("" if row.fits else " OOM")
        numbers = (str(row.gpus), str(row.global_batch), memory, str(row.largest_micro_batch))
        seconds = f"{row.compute_s:.3f} s"
        shares = (f"{row.efficiency[rate]:.0%}" for rate in networks)
        shown.add_row(row.model, row.method, row.ds_config, *numbers, size(row.sent_bytes), seconds, *shares)
    return shown
