"""Benchmarks: ``python tools/benchmark.py learning --seeds 1,2,3 --write docs/learning.md``."""

import argparse
import os
import platform
import shlex
import sys
from pathlib import Path

from everest_ds.config.errors import UserError, one_line_errors
from everest_ds.config.logs import set_up_logging


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Measure what the project claims.")
    benchmarks = parser.add_subparsers(dest="benchmark", required=True)
    learning = benchmarks.add_parser("learning", help="pre-train and fine-tune on motion videos; a table of accuracy")
    learning.add_argument("--seeds", default="1,2,3", help="comma-separated; each makes its own videos (default 1,2,3)")
    learning.add_argument("--folder", type=Path, default=Path("outputs/learning"), help="videos and runs; continued")
    learning.add_argument("--side-by-side", type=int, default=os.cpu_count() or 1, help="runs at a time, a thread each")
    learning.add_argument(
        "--pretrain", nargs="*", default=[], metavar="key=value", help="settings of all pre-trainings"
    )
    learning.add_argument("--finetune", nargs="*", default=[], metavar="key=value", help="settings of all fine-tunings")
    learning.add_argument("--write", type=Path, required=True, metavar="FILE.md", help="the table; FILE.json beside it")
    return parser.parse_args()


def run_learning(arguments: argparse.Namespace) -> None:
    """Run the learning benchmark and write its table."""
    from everest_ds.benchmarks import learning, learning_report  # noqa: PLC0415 - torch takes seconds to load

    try:
        seeds = tuple(int(seed) for seed in arguments.seeds.split(","))
    except ValueError as error:
        raise UserError(f"--seeds: expected whole numbers such as 1,2,3, got {arguments.seeds}") from error
    settings = learning.Settings(
        folder=arguments.folder.resolve(),
        seeds=seeds,
        side_by_side=arguments.side_by_side,
        pretrain=tuple(arguments.pretrain),
        finetune=tuple(arguments.finetune),
    )
    cells = learning.run(settings, lambda line: print(line, file=sys.stderr, flush=True))
    command = "python " + shlex.join(sys.argv)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    learning_report.write(cells, settings, command=command, machine=machine, path=arguments.write)
    print(arguments.write.read_text(encoding="utf-8"))


def main() -> int:
    """Run the command."""
    arguments = parse_arguments()
    set_up_logging()
    with one_line_errors("benchmark"):
        {"learning": run_learning}[arguments.benchmark](arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
