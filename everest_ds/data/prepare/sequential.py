"""Frames of a file from its start on, with PyAV: slow, and right for every encoding."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import av
import numpy as np
from av.stream import Disposition
from numpy.typing import NDArray

from everest_ds.data.decode import NOT_A_VIDEO, DecodeError, one_line, open_video

# Processes are the parallelism. Conversions take as many threads as there are cores since PyAV 17, unless told.
ONE_THREAD = {"threads": 1} if int(av.__version__.partition(".")[0]) >= 18 else {}
# Streams of pictures that go with a video or a song: covers, what a player shows above its time bar, stills.
_PICTURES = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image


class Orientation(NamedTuple):
    """How a stored frame is laid down to be shown: transposed, then mirrored (left to right) and put upside down.

    Rotations are combinations of these: by half a turn is ``mirrored`` and ``upside_down``.
    """

    transposed: bool
    mirrored: bool
    upside_down: bool


UPRIGHT = Orientation(transposed=False, mirrored=False, upside_down=False)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a file says of its video: size in pixels as shown, seconds, frames per second; None: it doesn't say."""

    codec: str
    width: int
    height: int
    duration_s: float | None
    fps: float | None


class Video:
    """An open file's video: of several streams the one that FFmpeg calls the best, but never a cover."""

    def __init__(self, path: str, container: Any) -> None:
        self._path, self._container = path, container
        self.stream = _video_stream(path, container)
        self.stream.thread_count = 1

    @property
    def facts(self) -> Facts:
        """Call it before the frames are read."""
        stream, container = self.stream, self._container
        ends = [(stream.duration, stream.time_base), (container.duration, Fraction(1, av.time_base))]
        duration_s = next((float(ticks * unit) for ticks, unit in ends if ticks and unit), None)
        fps = stream.average_rate
        return Facts(
            codec=stream.codec_context.codec.canonical_name,
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
        # Titles and the like may be in any encoding.
        container = av.open(source, metadata_errors="replace")
    except av.InvalidDataError as error:
        raise DecodeError(path, NOT_A_VIDEO) from error
    except av.FFmpegError as error:
        raise DecodeError(path, _message(error)) from error
    with container:
        yield Video(path, container)


def _video_stream(path: str, container: Any) -> Any:
    """Return the stream that is the file's video.

    Raises:
        DecodeError: there is none.
    """
    # By the rule of the training's readers (av_find_best_stream). Where something speaks against the video, that rule
    # takes a cover.
    best = container.streams.best("video")
    streams = [stream for stream in container.streams.video if not stream.disposition & _PICTURES]
    if best is None:
        raise DecodeError(path, "holds no video")
    if not streams:
        raise DecodeError(path, "holds a cover picture and no video")
    known = [stream for stream in streams if stream.codec_context is not None]
    if not known:
        raise DecodeError(path, "holds a video whose codec FFmpeg does not know")
    return best if best in known else max(known, key=lambda stream: stream.width * stream.height)


def upright(frame: Any) -> NDArray[np.uint8]:
    """Return a frame as RGB (H, W, 3), laid down the way the file says that it is to be shown."""
    pixels: NDArray[np.uint8] = frame.to_ndarray(format="rgb24", **ONE_THREAD)
    return np.ascontiguousarray(laid(pixels, orientation(frame)))


def laid(pixels: NDArray[Any], way: Orientation) -> NDArray[Any]:
    """Return a picture (H, W, ...) laid down another way; a view."""
    if way.transposed:
        pixels = pixels.swapaxes(0, 1)
    return pixels[:: -1 if way.upside_down else 1, :: -1 if way.mirrored else 1]


def orientation(frame: Any) -> Orientation:
    """Return how a frame is to be shown, by its display matrix: the nearest of the eight ways."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return UPRIGHT
    # libavutil/display.h: nine numbers a, b, u, c, d, v, x, y, w; a point (p, q) is shown at (a p + c q, b p + d q).
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))
    transposed = abs(b) + abs(c) > abs(a) + abs(d)
    across, down = (c, b) if transposed else (a, d)
    return Orientation(transposed=transposed, mirrored=across < 0, upside_down=down < 0)


def _message(error: Exception) -> str:
    # "[Errno 1094995529] Invalid data found when processing input: '/x/a.mp4'; ..."
    return one_line(Exception(getattr(error, "strerror", None) or str(error))).lower()
