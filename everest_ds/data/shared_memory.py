"""/dev/shm, through which data workers hand over batches: a container has 64 MB of it unless it is asked for more."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from everest_ds.config import place
from everest_ds.config.errors import RankError, UserError

FOLDER = Path("/dev/shm")
_GIB, _MIB = 2**30, 2**20
_IN_USE = 2  # the batch of this step, and the next one
# In torch's errors: "unable to allocate shared memory(shm) for file ...", "unable to write to file </torch_...>".
_SHARING = ("shared memory(shm)", "</torch_")
_FULL = "No space left"
_MAKE_ROOM = "remove what others left there"
_NEED_LESS = "lower data.prefetch or train.micro_batch, or set data.workers=0"


def needed_bytes(workers: int, batch_bytes: int, ahead: int) -> int:
    """Return the most that the batches of a rank take, of which each worker has ``ahead`` there."""
    return (workers * ahead + _IN_USE) * batch_bytes


def check(needed: int, folder: Path = FOLDER) -> None:
    """Look whether there is room for what a rank needs.

    Raises:
        UserError: what all ranks of this node need is more than the whole of it.
        RankError: what this rank needs is more than what is free.
    """
    if not needed or not folder.is_dir():
        return
    usage, ranks = shutil.disk_usage(folder), place.local_world_size()
    start = f"data.workers: batches are handed over through {folder},"
    if ranks * needed > usage.total:
        takes = f"'s {ranks} ranks take" if ranks > 1 else " takes"
        raise UserError(
            f"{start} which has {_size(usage.total)}, and this run{takes} up to {_size(ranks * needed)} by "
            f"data.workers, data.prefetch and the batch; {_with_enough(ranks * needed)}"
        )
    if needed > usage.free:
        raise RankError(
            f"{start} where {_size(usage.free)} of {_size(usage.total)} is free, and this rank takes up to "
            f"{_size(needed)}; {_MAKE_ROOM}, {_with_enough(ranks * needed)}"
        )


def why_full(error: Exception, folder: Path = FOLDER) -> str:
    """Say what a worker's error means that found no room there, and what to do; "" if it is another."""
    text = str(error)
    if _FULL not in text or not any(sign in text for sign in _SHARING) or not folder.is_dir():
        return ""
    usage = shutil.disk_usage(folder)
    return (
        f"data.workers: no room is left for a batch in {folder}, where {_size(usage.free)} of {_size(usage.total)} is "
        f"free; {_MAKE_ROOM}, start the container with a larger --shm-size, {_NEED_LESS}"
    )


def _with_enough(needed: int) -> str:
    return f"start the container with --shm-size={max(1, math.ceil(needed / _GIB))}g, {_NEED_LESS}"


def _size(size_bytes: int) -> str:
    return f"{size_bytes / _GIB:.2f} GiB" if size_bytes >= _GIB else f"{size_bytes / _MIB:.1f} MiB"
