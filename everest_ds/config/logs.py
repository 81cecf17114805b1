"""How a command's log lines look, and which ranks they come from."""

from __future__ import annotations

import logging
import warnings

from everest_ds.config import place
from everest_ds.config.outputs import outlive_readers


def set_up_logging() -> None:
    """Warnings as one line each on stderr, with who says it; what all ranks would say, rank 0 alone says.

    What is printed is no reason to end once nobody reads it.
    """
    outlive_readers()
    logging.basicConfig(level=logging.WARNING, format=f"{place.speaker()}%(levelname)s: %(message)s")
    if place.rank():
        for name in ("everest_ds.config", "everest_ds.training", "everest_ds.data.ahead"):
            logging.getLogger(name).setLevel(logging.ERROR)
        # Each rank may be the only one that writes to its file.
        logging.getLogger("everest_ds.training.files").setLevel(logging.WARNING)
    # DeepSpeed calls names that torch is about to retire; nobody who trains can act on that.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
