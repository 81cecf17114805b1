"""Test a fine-tuned classifier, or probe an encoder: ``deepspeed run/evaluate.py --from outputs/finetune``."""

import argparse
import contextlib
import sys
from pathlib import Path

# This checkout's package, whatever else is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from everest_ds.config.command_line import parser_with_keys
from everest_ds.config.errors import one_line_errors
from everest_ds.config.finetuning import FinetuneRecipe
from everest_ds.config.launcher import follow_launcher
from everest_ds.config.logs import set_up_logging
from everest_ds.config.place import take_slurm_task


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = parser_with_keys(
        "Test a fine-tuned classifier on several views of each video, or probe an encoder's frozen\n"
        "features (on one centre view, unless test.clips and test.crops are given). Without the deepspeed launcher:\n"
        "one rank.",
        "keys, their defaults where the run says nothing, and [sources]",
        FinetuneRecipe,
        ("model", "data", "test"),
    )
    parser.add_argument(
        "--from", dest="source", type=Path, required=True, help="run directory, model.safetensors, or official .pth"
    )
    parser.add_argument(
        "--split", choices=("test", "val", "train"), help="which manifest (default: data.test if set, else data.val)"
    )
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="auto: the run's")
    parser.add_argument(
        "--out", type=Path, help="folder for scores.json, predictions.csv, confusion.png (default: RUN/evaluation)"
    )
    parser.add_argument("--probe", choices=("knn", "linear"), help="fit on the features of data.train instead")
    parser.add_argument("--k", type=int, help="neighbours of --probe knn (default 20)")
    parser.add_argument("--features", type=Path, help="only write features of the split to this .safetensors file")
    parser.add_argument("--json", action="store_true", help="print what scores.json holds on stdout, nothing else")
    return parser.parse_intermixed_args()


def main() -> int:
    """Run; the exit code is 0 done, 2 user's mistake."""
    arguments = parse_arguments()
    take_slurm_task()
    follow_launcher()
    set_up_logging()
    with one_line_errors("evaluate"):
        # Libraries log to stdout, which is for the result.
        with contextlib.redirect_stdout(sys.stderr):
            # DeepSpeed takes seconds to import.
            from everest_ds.training.evaluation_files import dumps  # noqa: PLC0415
            from everest_ds.training.evaluation_run import evaluate  # noqa: PLC0415
            from everest_ds.training.subject import Request  # noqa: PLC0415

            outcome = evaluate(
                Request(
                    source=arguments.source,
                    overrides=arguments.overrides,
                    split=arguments.split,
                    precision=arguments.precision,
                    out=arguments.out,
                    probe=arguments.probe,
                    neighbours=arguments.k,
                    features=arguments.features,
                )
            )
        if outcome is not None:
            print(dumps(outcome.record) if arguments.json else outcome.summary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
