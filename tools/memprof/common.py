"""What the subcommands share: flags that make a recipe, and tables."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from everest_ds.config.ds_config import load_ds_config, with_precision
from everest_ds.config.errors import UserError
from everest_ds.config.finetuning import PHASES
from everest_ds.config.load import load_as
from everest_ds.config.schema import Recipe

_CLASSES = 400  # of Kinetics-400, the paper's data set


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which model is trained, and for what."""
    parser.add_argument("--phase", choices=list(PHASES), default="pretrain", help="what for (default pretrain)")
    parser.add_argument("--model", default="vit_small", help="size, such as vit_base")
    parser.add_argument("--method", default="everest", help="everest or videomae, in pre-training")
    parser.add_argument("--classes", type=int, help=f"of a classifier, in fine-tuning (default {_CLASSES})")


def recipe_of_model(arguments: argparse.Namespace, *overrides: str) -> Recipe:
    """Build the recipe that the flags of :func:`add_model_arguments` and ``key=value`` overrides describe.

    Raises:
        UserError: an unknown model, a value that can't be, or a flag of the other phase.
    """
    keys = [f"model.size={arguments.model}", f"model.method={arguments.method}"]
    if arguments.phase == "finetune":
        if arguments.method != "everest":
            raise UserError(
                "--method: fine-tuning takes any encoder; for all tokens, as VideoMAE: model.keep_ratio=1.0"
            )
        keys.append(f"model.classes={_CLASSES if arguments.classes is None else arguments.classes}")
    elif arguments.classes is not None:
        raise UserError("--classes: a classifier has them; add --phase finetune")
    return load_as(PHASES[arguments.phase], None, [*keys, *overrides])


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what would be trained, and how."""
    add_model_arguments(parser)
    parser.add_argument("--micro-batch", type=int, help="clips per rank per pass")
    parser.add_argument("--global-batch", type=int, help="clips per optimizer step over all ranks")
    parser.add_argument("--ds_config", default="ds_configs/zero2.json", help="DeepSpeed JSON")
    parser.add_argument("--precision", choices=["bf16", "fp16", "fp32"], help="instead of the DeepSpeed JSON's")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, nothing else")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys, such as model.attention=eager")


def recipe_from(arguments: argparse.Namespace) -> Recipe:
    """Build the recipe that the flags describe.

    Raises:
        UserError: an unknown model or a value that can't be.
    """
    overrides = []
    for key in ("micro_batch", "global_batch"):
        value = getattr(arguments, key)
        if value is not None:
            overrides.append(f"train.{key}={value}")
    recipe = recipe_of_model(arguments, *overrides, *arguments.overrides)
    if recipe.train.micro_batch is None and recipe.train.global_batch is None:
        raise UserError("give --micro-batch or --global-batch (clips)")
    return recipe


def ds_config_from(arguments: argparse.Namespace) -> dict[str, Any]:
    """Load the DeepSpeed JSON, with ``--precision`` put in."""
    ds_config = load_ds_config(arguments.ds_config)
    return with_precision(ds_config, arguments.precision) if arguments.precision else ds_config


def print_json(value: Any) -> None:
    """Write a result to stdout, alone."""
    print(json.dumps(value, indent=2))


def show(table: Table) -> None:
    """Write a table to stdout."""
    Console(file=sys.stdout).print(table)
