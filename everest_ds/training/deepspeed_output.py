"""What DeepSpeed says by itself where its JSON asks for it: lines while it trains, a table of messages at the end."""

from __future__ import annotations

from typing import Any

import deepspeed.comm
from deepspeed.utils.logging import set_log_level_from_string


def show_what_is_asked(ds: dict[str, Any], *, building: bool) -> None:
    """Show DeepSpeed's lines of level INFO where the JSON asks for some: DeepSpeed 0.19 shows warnings alone.

    Args:
        ds: the resolved configuration; its ``log_level`` comes first.
        building: the engine is about to be built, which has many such lines: those of ``dump_state`` among them.
    """
    training = bool(ds.get("steps_per_print")) or bool(ds.get("comms_logger", {}).get("verbose"))
    asked = ds.get("dump_state", False) if building else training
    set_log_level_from_string(ds.get("log_level", "info" if asked else "warning"))


def summarise_messages(ds: dict[str, Any]) -> None:
    """Print what the comms logger has counted, if it is on; a collective call."""
    if "comms_logger" in ds:
        deepspeed.comm.log_summary()
