"""What DeepSpeed raises while an engine is built: one line for whoever runs it, the trace in a file of the run's."""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from everest_ds.config.errors import RankError, UserError, shortened
from everest_ds.training import ranks
from everest_ds.training.exhaustion import is_out_of_memory

# DeepSpeed repeats the value that it refuses.
_LONGEST_REASON = 400
# Sections of a DeepSpeed JSON, and what has to be importable and installed for them.
_PACKAGES = {
    "tensorboard": ("tensorboard", "tensorboard"),
    "wandb": ("wandb", "wandb"),
    "comet": ("comet_ml", "'comet_ml>=3.41.0'"),
}


@contextlib.contextmanager
def in_one_line(traces: Path | None) -> Iterator[None]:
    """Turn whatever is raised into a :class:`UserError` of one line, and add its trace to a file.

    What has an explanation of its own passes: too little memory, a lost rank, a user's mistake.

    Args:
        traces: the file; None: none.

    Raises:
        UserError: something was raised; a :class:`RankError` where this rank alone has met it.
    """
    try:
        yield
    except Exception as error:  # DeepSpeed raises assertions, its own and the libraries' errors alike
        if isinstance(error, UserError) or is_out_of_memory(error) or ranks.lost_contact(error):
            raise
        where = f" (trace: {traces})" if traces is not None and _write_trace(traces) else ""
        kind = UserError if ranks.all_end() else RankError
        raise kind(f"ds_config: DeepSpeed can't build an engine with it: {reason_of(error)}{where}") from error


def reason_of(error: Exception) -> str:
    """Return what an error of DeepSpeed's says, in one line of bounded length; where it says nothing, what it is."""
    said = " ".join(str(error).split())
    if not said:
        said = f"in {traceback.extract_tb(error.__traceback__)[-1].name}"
    kind = "" if type(error) in (AssertionError, Exception, ValueError) and str(error) else f"{type(error).__name__} "
    return shortened(f"{kind}{said}", _LONGEST_REASON)


def _write_trace(file: Path) -> bool:
    """Add the trace of the error being handled to a file; False where it can't be written."""
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    try:
        with file.open("a", encoding="utf-8", errors="backslashreplace") as out:
            out.write(f"{now} rank {ranks.rank()}\n{traceback.format_exc()}\n")
    except OSError:
        return False
    return True


def check_monitor_packages(ds: dict[str, Any]) -> None:
    """Look whether rank 0, which alone has monitors, has the packages that they need; a collective call.

    Raises:
        UserError: one is missing; on every rank, so that none waits for rank 0.
    """
    missing = ranks.gather(_missing_package(ds))[0]
    if missing:
        raise UserError(missing)


def _missing_package(ds: dict[str, Any]) -> str:
    for section, (module, package) in _PACKAGES.items():
        if (ds.get(section) or {}).get("enabled"):
            spec = importlib.util.find_spec(module)
            # A folder of that name, such as wandb makes for its logs, has a spec, too, but no file.
            if spec is None or spec.origin is None:
                return f"ds_config {section}: pip install {package}, which it needs, or remove the section"
    return ""
