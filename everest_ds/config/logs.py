"""How a command's log lines look, and which ranks they come from."""

from __future__ import annotations

import logging
import os
import warnings


def set_up_logging() -> None:
    """Warnings as one line each on stderr, with the rank that says it; what all ranks would say, rank 0 alone says."""
    rank = os.environ.get("RANK", "0")
    prefix = f"[rank {rank}] " if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    logging.basicConfig(level=logging.WARNING, format=f"{prefix}%(levelname)s: %(message)s")
    if rank != "0":
        logging.getLogger("everest_ds.training").setLevel(logging.ERROR)
    # DeepSpeed calls names that torch is about to retire; nobody who trains can act on that.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
