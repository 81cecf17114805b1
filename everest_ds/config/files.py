"""Text files that may be anything: read as far as they can be what they should be."""

from __future__ import annotations

import errno
from pathlib import Path

# Of a recipe or a DeepSpeed JSON. The largest that are shipped have 2 kB; YAML of this size takes a second to parse.
LARGEST_SETTINGS_BYTES = 128 * 1024
_BLOCK_BYTES = 64 * 1024


def read_bounded(path: str | Path, largest_bytes: int) -> bytes:
    """Return what a text file holds, its first block alone if that has a null byte in it, as no text has.

    Raises:
        OSError: there is no such file, or it is larger; ``strerror`` says so.
    """
    try:
        # Not by its size: a pipe and /dev/zero have none.
        with Path(path).open("rb") as file:
            data = file.read(_BLOCK_BYTES)
            if b"\0" not in data:
                data += file.read(largest_bytes + 1 - len(data))
    except ValueError as error:
        raise OSError(errno.EINVAL, "a path can't hold this") from error
    if len(data) > largest_bytes:
        raise OSError(errno.EFBIG, f"larger than {largest_bytes:,} bytes; is it the file that was meant?")
    return data
