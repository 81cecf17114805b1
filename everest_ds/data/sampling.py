"""Dense frame sampling: which frames of a video make a clip (the official rule of VideoMAE and EVEREST)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def start_count(length: int, frames: int, stride: int) -> int:
    """Return how many start frames there are: starts are 0 ... count - 1.

    A clip spans ``frames * stride`` video frames; a video shorter than that starts at frame 0.
    """
    return max(1, length - frames * stride + 1)


def draw_start(length: int, frames: int, stride: int, rng: np.random.Generator) -> int:
    """Return a start frame drawn uniformly."""
    return int(rng.integers(start_count(length, frames, stride)))


def even_start(length: int, frames: int, stride: int, view: int, views: int) -> int:
    """Return the start frame of one of ``views`` evenly spread clips: the middle of its share of the starts."""
    return start_count(length, frames, stride) * (2 * view + 1) // (2 * views)


def frame_ids(length: int, start: int, frames: int, stride: int) -> NDArray[np.int64]:
    """Return the ids (frames,) of a clip's frames, 0-based: ``start``, ``start + stride``, ... up to the end.

    The official end rule, kept exactly: with positions counted from 1, the clip advances only while it stays
    *below* ``length``, then repeats the frame that it stands on. So the very last frame is reached only by starting
    there (it matters at stride 1, where the last of the starts repeats one frame); one frame gives equal frames.

    Raises:
        ValueError: ``start`` is no frame of the video.
    """
    if not 0 <= start < length:
        raise ValueError(f"start {start} is not a frame of a video of {length}")
    steps = max(0, (length - 2 - start) // stride)
    return start + stride * np.minimum(np.arange(frames, dtype=np.int64), steps)
