"""Frames of a file from its start on, with PyAV: slow, and right for every encoding."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from everest_ds.data.decode import NOT_A_VIDEO, DecodeError, one_line, open_video

# Processes are the parallelism. Conversions take as many threads as there are cores since PyAV 17, unless told.
ONE_THREAD = {"threads": 1} if int(av.__version__.partition(".")[0]) >= 18 else {}
_QUARTER = 90


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a file says of its video: size in pixels as shown, seconds, frames per second; None: it doesn't say."""

    codec: str
    width: int
    height: int
    duration_s: float | None
    fps: float | None


class Video:
    """An open file's first video."""

    def __init__(self, path: str, container: Any) -> None:
        self._path, self._container = path, container
        if not container.streams.video:
            raise DecodeError(path, "holds no video")
        self.stream = container.streams.video[0]
        self.stream.thread_count = 1

    @property
    def facts(self) -> Facts:
        """Call it before the frames are read."""
        stream, container = self.stream, self._container
        ends = [(stream.duration, stream.time_base), (container.duration, Fraction(1, av.time_base))]
        duration_s = next((float(ticks * unit) for ticks, unit in ends if ticks and unit), None)
        fps = stream.average_rate
        return Facts(
            codec=stream.codec_context.name,
            width=stream.width,
            height=stream.height,
            duration_s=duration_s,
            fps=float(fps) if fps else None,
        )

    def frames(self) -> Iterator[Any]:
        """Yield the frames (av.VideoFrame).

        Raises:
            DecodeError: the file is damaged; says where.
        """
        count = 0
        frames = self._container.decode(self.stream)
        while True:
            try:
                frame = next(frames, None)
            except av.FFmpegError as error:
                raise DecodeError(self._path, f"damaged after frame {count}: {_message(error)}") from error
            if frame is None:
                return
            yield frame
            count += 1


@contextlib.contextmanager
def opened(path: str) -> Iterator[Video]:
    """Give the video of a file.

    Raises:
        DecodeError: it is none.
    """
    source = open_video(path)
    try:
        container = av.open(source)
    except av.InvalidDataError as error:
        raise DecodeError(path, NOT_A_VIDEO) from error
    except av.FFmpegError as error:
        raise DecodeError(path, _message(error)) from error
    with container:
        yield Video(path, container)


def upright(frame: Any) -> NDArray[np.uint8]:
    """Return a frame as RGB (H, W, 3), turned the way the file says that it is to be shown."""
    pixels: NDArray[np.uint8] = frame.to_ndarray(format="rgb24", **ONE_THREAD)
    return np.ascontiguousarray(np.rot90(pixels, quarters(frame)))


def quarters(frame: Any) -> int:
    """Return how many quarters of a turn, counter-clockwise, bring a frame upright: 0 ... 3."""
    return round(frame.rotation / _QUARTER) % 4


def _message(error: Exception) -> str:
    # "[Errno 1094995529] Invalid data found when processing input: '/x/a.mp4'; ..."
    return one_line(Exception(getattr(error, "strerror", None) or str(error))).lower()
