"""Out of memory in the middle of training: which micro-batch, what the planner says that it needs, what to try."""

from __future__ import annotations

from typing import Any

from everest_ds.config.batches import Batches
from everest_ds.config.errors import RankError
from everest_ds.config.schema import Recipe
from everest_ds.memory.fit import modes_of
from everest_ds.memory.gpus import gib
from everest_ds.memory.plan import plan
from everest_ds.training import ranks
from everest_ds.training.micro_batch import fit_command


def explained(recipe: Recipe, ds_config: dict[str, Any], batches: Batches, *, was_auto: bool) -> RankError:
    """Return the error that says so in one line; plans, so the failed step's tensors should be gone.

    Args:
        recipe: of the run.
        ds_config: the resolved one.
        batches: of the run.
        was_auto: the micro-batch was chosen by ``train.micro_batch=auto``.
    """
    try:
        planned = plan(recipe, ds_config, ranks=batches.ranks, device_type=ranks.device().type)
        needs = f"the planner counts {gib(planned.needed_bytes(batches.micro))} per rank"
    except (RuntimeError, MemoryError):  # not even for that
        needs = "and too little is left to plan with"
    checkpoint, mode = recipe.model.checkpointing, modes_of(recipe)[-1]
    automatic = f"train.micro_batch=auto with train.global_batch={batches.total}"
    stated = "a smaller train.capacity" if recipe.train.capacity else "train.capacity=SIZE, less than was free"
    ways = [
        stated if was_auto else automatic,
        *([] if checkpoint == mode else [f"model.checkpointing={mode}"]),
        "a ds_config with more of ZeRO, or offload",
    ]
    return RankError(
        f"out of memory at micro-batch {batches.micro}: {needs}; try {', '.join(ways)}; what fits: "
        f"{fit_command(recipe)}"
    )
