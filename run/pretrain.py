"""Pre-train EVEREST or VideoMAE: ``deepspeed run/pretrain.py --ds_config ds_configs/zero2.json --recipe ...``."""

import argparse
import sys
from pathlib import Path

# This checkout's package, whatever else is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from everest_ds.config.command_line import training_parser
from everest_ds.config.ds_config import load_ds_config
from everest_ds.config.errors import one_line_errors
from everest_ds.config.launcher import follow_launcher
from everest_ds.config.load import build, read_tree
from everest_ds.config.logs import set_up_logging
from everest_ds.config.place import take_slurm_task
from everest_ds.config.schema import Recipe


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    what = "Pre-train EVEREST or VideoMAE under DeepSpeed."
    return training_parser(what, Recipe, "run/recipes/k400_vit_b.yaml").parse_intermixed_args()


def main() -> int:
    """Run; the exit code is 0 done, 2 user's mistake, 3 bad numbers, 75 stopped after saving."""
    arguments = parse_arguments()
    take_slurm_task()
    follow_launcher()
    set_up_logging()
    with one_line_errors("pretrain"):
        recipe = build(Recipe, read_tree(arguments.recipe, arguments.overrides, {"train.resume": arguments.resume}))
        ds_config = load_ds_config(arguments.ds_config)
        # DeepSpeed takes seconds to import: after the checks that don't need it.
        from everest_ds.training.pretrain import pretrain  # noqa: PLC0415

        return pretrain(recipe, ds_config, preflight=not arguments.no_preflight)
    return 0


if __name__ == "__main__":
    sys.exit(main())
