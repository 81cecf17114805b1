"""Which frames of a video make a clip: every stride-th from some start (dense), or one from each of its parts (TSN)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from everest_ds.config.schema import DataConfig


class FrameSampling(Protocol):
    """A rule that picks a clip's frames from a video of ``length``: ids (T,), 0-based, none below the one before."""

    def draw(self, length: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Return the frames of a training clip, at random."""

    def spread(self, length: int, view: int, views: int) -> NDArray[np.int64]:
        """Return the frames of one of ``views`` evaluation clips that are spread evenly over the video."""


@dataclass(frozen=True)
class Dense:
    """Every ``stride``-th frame from a start on (the official rule but for fine-tuning on SSv2)."""

    frames: int
    stride: int

    def draw(self, length: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Return a clip that starts anywhere."""
        start = draw_start(length, self.frames, self.stride, rng)
        return frame_ids(length, start, self.frames, self.stride)

    def spread(self, length: int, view: int, views: int) -> NDArray[np.int64]:
        """Return a clip whose start is :func:`even_start`."""
        start = even_start(length, self.frames, self.stride, view, views)
        return frame_ids(length, start, self.frames, self.stride)


@dataclass(frozen=True)
class Segments:
    """One frame from each of ``frames`` equal parts of the whole video; short videos repeat frames (TSN, on SSv2).

    Parts are ``length / frames`` frames long, not rounded. (VideoMAE's code rounds their length down in training, which
    leaves the last frames of a video out, and takes nothing but frame 0 of a video with fewer frames than parts.)
    """

    frames: int

    def draw(self, length: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Return a frame drawn uniformly from each part."""
        places = np.arange(self.frames) + rng.random(self.frames)
        # A place just below the end of the last part may be rounded up to it.
        return np.minimum((places * length / self.frames).astype(np.int64), length - 1)

    def spread(self, length: int, view: int, views: int) -> NDArray[np.int64]:
        """Return the frame at ``(2 * view + 1) / (2 * views)`` of each part: with one view its middle."""
        places = 2 * views * np.arange(self.frames, dtype=np.int64) + 2 * view + 1
        return places * length // (2 * views * self.frames)


SAMPLINGS: dict[str, Callable[[DataConfig, int], FrameSampling]] = {
    "dense": lambda data, frames: Dense(frames, data.stride),
    "segments": lambda _, frames: Segments(frames),
}
"""data.sampling -> a function of (the data settings, frames of a clip) that returns the rule."""


def start_count(length: int, frames: int, stride: int) -> int:
    """Return how many start frames there are: starts are 0 ... count - 1.

    A clip spans ``frames * stride`` video frames; a video shorter than that starts at frame 0.
    """
    return max(1, length - frames * stride + 1)


def draw_start(length: int, frames: int, stride: int, rng: np.random.Generator) -> int:
    """Return a start frame drawn uniformly."""
    return int(rng.integers(start_count(length, frames, stride)))


def even_start(length: int, frames: int, stride: int, view: int, views: int) -> int:
    """Return the start frame of one of ``views`` clips: evenly from the first start to the last; alone, the middle one.

    VideoMAE's multi-view tests do so in whole strides, which puts a start less than a stride away from this.
    """
    count = start_count(length, frames, stride)
    return count // 2 if views == 1 else (count - 1) * view // (views - 1)


def frame_ids(length: int, start: int, frames: int, stride: int) -> NDArray[np.int64]:
    """Return the ids (frames,) of a dense clip's frames, 0-based: ``start``, ``start + stride``, ... up to the end.

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
