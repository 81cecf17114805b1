"""Standard output and standard error that nobody reads any more, as after Ctrl-C in ``deepspeed ... | tee log``."""

from __future__ import annotations

import io
import os
import sys
from typing import Any


class _Descriptor(io.FileIO):
    """A pipe that, once its reader is gone, leads nowhere."""

    def write(self, data: Any, /) -> int:
        """Write, as a file does."""
        try:
            return super().write(data)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return super().write(data)


def outlive_readers() -> None:
    """Let what this process prints go nowhere once its reader is gone: a run is to be saved, not to end in a trace."""
    sys.stdout, sys.stderr = (_outliving(stream) for stream in (sys.stdout, sys.stderr))


def _outliving(stream: Any) -> Any:
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)  # python -u has no buffer in between
    if not isinstance(raw, io.FileIO) or isinstance(raw, _Descriptor):
        return stream  # closed, a stand-in, or done
    stream.flush()
    own: Any = _Descriptor(raw.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        own if raw is buffer else io.BufferedWriter(own),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
