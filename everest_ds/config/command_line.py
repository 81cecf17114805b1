"""Flags that the commands share."""

from __future__ import annotations

import argparse

from everest_ds.config.load import describe_keys
from everest_ds.config.schema import Recipe


def training_parser(description: str, kind: type[Recipe], example: str) -> argparse.ArgumentParser:
    """Return the parser of a training command.

    Args:
        description: what it does.
        kind: of recipe, whose keys the help lists.
        example: a shipped recipe.
    """
    parser = parser_with_keys(
        f"{description} Without the deepspeed launcher: one rank.", "keys, their defaults and [sources]", kind
    )
    parser.add_argument("--ds_config", required=True, help="DeepSpeed JSON, such as ds_configs/zero2.json")
    parser.add_argument("--recipe", help=f"YAML recipe, such as {example}; defaults without one")
    parser.add_argument("--resume", help="auto: continue the run in train.output_dir; or a run directory")
    parser.add_argument(
        "--no-preflight",
        action="store_true",
        help="train even where the planner says that memory doesn't suffice; train.micro_batch=auto still asks it",
    )
    return parser


def parser_with_keys(
    description: str, heading: str, kind: type[Recipe], groups: tuple[str, ...] = ()
) -> argparse.ArgumentParser:
    """Return a parser that takes ``key=value`` overrides and what the launcher passes, and whose help lists the keys.

    Args:
        description: what the command does.
        heading: of the list.
        kind: of recipe.
        groups: of keys to list; none: all.
    """
    keys = [line for line in describe_keys(kind) if not groups or line.partition(".")[0] in groups]
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"{heading}:\n  " + "\n  ".join(keys),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the recipe's")
    return parser
