"""A card's constants on their way to where the planner reads them (:data:`everest_ds.memory.overheads.CARDS`)."""

from __future__ import annotations

import json
from collections.abc import Mapping

from everest_ds.gpu_check.cases import Values
from everest_ds.gpu_check.constants import ATTENTION, PROCESS, PRODUCTS
from everest_ds.gpu_check.machine import DESCRIPTION
from everest_ds.memory.overheads import CARDS
from everest_ds.training import files

_FACTS = ("driver", "cuda", "cudnn", "nccl", "torch", "date")


def entry(values: Mapping[str, Values]) -> Values:
    """Make a card's entry from the values of the cases of ``machine`` and ``constants``."""
    description = values[DESCRIPTION]
    return {
        "context_bytes": values[PROCESS]["context_bytes"],
        "libraries_bytes": values[PRODUCTS]["libraries_bytes"],
        "attention": {case: found for case, found in values.items() if case.startswith(ATTENTION)},
        **{fact: description[fact] for fact in _FACTS},
    }


def keep(values: Mapping[str, Values]) -> str:
    """Put a card's constants into the planner's file; return a line that says so, or why not."""
    if not {PROCESS, PRODUCTS, DESCRIPTION} <= set(values):
        return f"{CARDS}: unchanged, the constants are incomplete"
    card = values[DESCRIPTION]["card"]
    cards = json.loads(CARDS.read_text(encoding="utf-8")) | {card: entry(values)}
    try:
        files.write(CARDS, json.dumps(cards, indent=1, sort_keys=True) + "\n")
    except OSError as error:
        return f"{CARDS}: unchanged, it can't be written ({error.strerror})"
    return f"{CARDS}: has what was measured on {card}; plans for it go by that now"
