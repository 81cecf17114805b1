"""Fine-tune: ``deepspeed run/finetune.py --ds_config ds_configs/zero2.json --from outputs/pretrain ...``."""

import argparse
import sys
from pathlib import Path

# This checkout's package, whatever else is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from everest_ds.config.command_line import training_parser
from everest_ds.config.ds_config import load_ds_config
from everest_ds.config.errors import one_line_errors
from everest_ds.config.finetuning import FinetuneRecipe
from everest_ds.config.launcher import follow_launcher
from everest_ds.config.load import read_tree
from everest_ds.config.logs import set_up_logging
from everest_ds.config.place import take_slurm_task


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    what = "Fine-tune a video classifier under DeepSpeed."
    parser = training_parser(what, FinetuneRecipe, "run/recipes/k400_vit_b_finetune.yaml")
    parser.add_argument("--from", dest="pretrained", help="pre-trained weights: train.pretrained")
    return parser.parse_intermixed_args()


def main() -> int:
    """Run; the exit code is 0 done, 2 user's mistake, 3 bad numbers, 75 stopped after saving."""
    arguments = parse_arguments()
    take_slurm_task()
    follow_launcher()
    set_up_logging()
    flags = {"train.pretrained": arguments.pretrained, "train.resume": arguments.resume}
    with one_line_errors("finetune"):
        tree = read_tree(arguments.recipe, arguments.overrides, flags)
        ds_config = load_ds_config(arguments.ds_config)
        # The recipe is checked there: the weights, which take torch to read, bring a part of it.
        from everest_ds.training.finetune import finetune  # noqa: PLC0415

        return finetune(tree, ds_config, preflight=not arguments.no_preflight)
    return 0


if __name__ == "__main__":
    sys.exit(main())
