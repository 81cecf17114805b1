"""How many batches data workers prepare ahead: bounded in bytes, as a batch may be of a megabyte or of a gigabyte."""

from __future__ import annotations

import functools
import logging

from everest_ds.config.schema import AHEAD_BYTES, DataConfig

GIB = 2**30

_log = logging.getLogger(__name__)


def batches_ahead(data: DataConfig, batch_bytes: int) -> int:
    """Return the batches that each worker prepares ahead.

    ``data.prefetch``, or as many as keep all of a rank's within :data:`AHEAD_BYTES`, but one at least: fewer workers
    would starve the device. It is said once when they take more.

    Args:
        data: workers (of which there are some) and prefetch.
        batch_bytes: what one takes, see :func:`pinned_bytes`.
    """
    ahead = min(data.prefetch, AHEAD_BYTES // (data.workers * batch_bytes)) if batch_bytes else data.prefetch
    if not ahead:
        _warn(data.workers, batch_bytes)
    return max(1, ahead)


def pinned_bytes(size_bytes: int) -> int:
    """Page-locked blocks are powers of two (pytorch/aten/src/ATen/core/CachingHostAllocator.h)."""
    return 1 << (size_bytes - 1).bit_length() if size_bytes > 0 else 0


@functools.cache
def _warn(workers: int, batch_bytes: int) -> None:
    _log.warning(
        "data.workers: %d that prepare a batch of %.2f GiB each take up to %.1f GiB of a rank's host memory; lower it, "
        "or train.micro_batch",
        *(workers, batch_bytes / GIB, workers * batch_bytes / GIB),
    )
