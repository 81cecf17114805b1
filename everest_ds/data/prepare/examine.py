"""One file: what it holds, whether it can be read, and whether random access gives the frames that it asks for.

Training jumps into a file; some encodings then give other frames than those asked for, without any error (open groups
of pictures with decord, say). So some clips are read the way training reads them and compared with a decode from the
file's start. Decoders differ a little in colour, so the question isn't whether two frames are equal but whether another
frame nearby fits better. Mirrored videos are given turned or unmirrored, all frames alike, so the same is asked of the
eight ways to lay a picture down.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import av
import numpy as np
from numpy.typing import NDArray

from everest_ds.config.schema import DataConfig, ModelConfig
from everest_ds.data.decode import LARGEST_PICTURE, NOT_A_VIDEO, REWRITE_IT, DecodeError, decode, one_line
from everest_ds.data.prepare.sequential import ONE_THREAD, UPRIGHT, Orientation, laid, opened, upright
from everest_ds.data.randomness import Stream, generator
from everest_ds.data.sampling import Segments, frame_ids

WRONG_FRAMES = "random access gives wrong frames"
WRONG_WAY = "turned or mirrored other than a player shows it"
SAME_TIME = "have the same time, by which readers look for them"
CLIPS = 8
# Frames around one that was asked for, among which the one that was given is looked for.
NEIGHBOURS = 16
# Grey levels, root mean square, of a thumbnail: frames that differ by less show the same. (What decoders make of one
# frame differs by up to 3, with 10 bits and BT.709.)
_SAME = 1.0
# No frame nearby fits either: not a picture of this video.
_FOREIGN = 12.0
_THUMBNAIL = 64  # pixels

Thumbnail = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Examined:
    """What is known of a file; ``reason`` says what is wrong with it, None: nothing. None elsewhere: not known.

    ``rewrite_helps``: the file is whole, and it is the reader that gets it wrong. ``passing``: another look may well
    find something else.
    """

    frames: int | None = None
    width: int | None = None
    height: int | None = None
    duration_s: float | None = None
    fps: float | None = None
    codec: str | None = None
    compared: int = 0
    reason: str | None = None
    rewrite_helps: bool = False
    passing: bool = False


class _Given(NamedTuple):
    """The frames that were ``asked`` for, the ``pictures`` given for them; or why none were: ``refused``."""

    asked: list[int]
    pictures: list[Thumbnail]
    refused: str | None = None


class _Truth(NamedTuple):
    """All ``frames`` counted, their size, the ``pictures`` to compare with; ``twins``: two frames of one time."""

    frames: int
    width: int
    height: int
    pictures: dict[int, Thumbnail]
    twins: tuple[int, int] | None


def examine(path: str, decoder: str = "decord") -> Examined:
    """Return what is known of a file; whatever goes wrong with it is its ``reason``.

    Args:
        path: the file.
        decoder: data.decoder, the reader that training will use.
    """
    found = Examined()
    try:
        with opened(path) as video:
            found = Examined(**dataclasses.asdict(video.facts))
            given = _given(path, decoder)
            if given.refused and video.facts.width * video.facts.height > LARGEST_PICTURE:
                raise DecodeError(path, given.refused)
            # From start to end: what comes through is whole, and can be rewritten.
            truth = _truth(video.frames(), given.asked)
        if truth is None:
            raise DecodeError(path, "holds no frame")
        found = dataclasses.replace(
            found, frames=truth.frames, width=truth.width, height=truth.height, compared=len(given.asked)
        )
        reason = _misread(given, truth, decoder)
        return dataclasses.replace(found, reason=reason, rewrite_helps=reason is not None)
    except DecodeError as error:
        return dataclasses.replace(found, reason=error.reason, passing=error.passing)
    except Exception as error:
        # Whatever a library makes of a strange file: the other files are still to be looked at.
        return dataclasses.replace(found, reason=f"{type(error).__name__}: {one_line(error)}")


def _given(path: str, decoder: str) -> _Given:
    """Read as training does, read by read.

    Raises:
        DecodeError: the storage failed.
    """
    asked: list[int] = []
    pictures: list[Thumbnail] = []
    for read in range(CLIPS + 1):
        ids: list[int] = []

        def choose(length: int, read: int = read, ids: list[int] = ids) -> list[int]:
            ids += _ids(length, read)
            return ids

        try:
            pictures += [thumbnail(frame) for frame in decode(path, choose, decoder)]
        except DecodeError as error:
            if error.passing:
                raise
            return _Given([], [], refused=error.reason)
        asked += ids
    return _Given(asked, pictures)


def _ids(length: int, read: int) -> list[int]:
    """Return the frames of a read: clips from anywhere, so that they fit any setting of the training; then the end."""
    if read == CLIPS:
        return [length - 1]
    # Drawn, each from its part of the video: even steps could fall on key frames alone.
    start = Segments(CLIPS).draw(length, generator(Stream.EXAMINE, length))[read]
    return list(dict.fromkeys(frame_ids(length, int(start), ModelConfig().frames, DataConfig().stride).tolist()))


def _truth(frames: Iterable[av.VideoFrame], asked: list[int]) -> _Truth | None:
    """Return what the file really holds, with the pictures that were asked for or are near to those; None: no frame."""
    wanted = {i for each in asked for i in range(each - NEIGHBOURS, each + NEIGHBOURS + 1)}
    pictures: dict[int, Thumbnail] = {}
    at: dict[int, int] = {}
    twins = None
    count, last = 0, None
    for frame in frames:
        if count in wanted:
            pictures[count] = thumbnail(upright(frame))
        # A bare stream says no times.
        if frame.pts is not None:
            first = at.setdefault(frame.pts, count)
            if first != count and twins is None:
                twins = (first, count)
        count, last = count + 1, frame
    if last is None:
        return None
    picture = upright(last)
    pictures[count - 1] = thumbnail(picture)
    height, width = picture.shape[:2]
    return _Truth(count, width, height, pictures, twins)


def _misread(given: _Given, truth: _Truth, decoder: str) -> str | None:
    """Return what a reader does wrong with a whole file; None: nothing."""
    # The words for what no library can open.
    refused = f"{decoder} can't open it" if given.refused == NOT_A_VIDEO else given.refused
    reason = (
        refused
        or _wrong_way(given, truth.pictures, decoder)
        or _same_time(truth)
        or _wrong_frames(given, truth.pictures)
    )
    return reason if reason is None or reason.endswith(REWRITE_IT) else f"{reason}; {REWRITE_IT}"


def _wrong_way(given: _Given, truth: dict[int, Thumbnail], decoder: str) -> str | None:
    """Return that the pictures were laid down another way than a player does; None: they were not."""
    pairs = [(truth[_stored(i, truth)], picture) for i, picture in zip(given.asked, given.pictures, strict=True)]
    ways = itertools.starmap(Orientation, itertools.product((False, True), repeat=3))
    away = {way: sum(distance(laid(right, way), picture) for right, picture in pairs) for way in ways}
    best = min(away, key=away.__getitem__)
    if best == UPRIGHT or away[UPRIGHT] <= _SAME * len(pairs) or away[best] >= away[UPRIGHT] / 2:
        return None
    return f"{decoder} gives it {WRONG_WAY}"


def _same_time(truth: _Truth) -> str | None:
    """Return which two frames readers can't tell apart, as they look for frames by time; None: none."""
    if truth.twins is None:
        return None
    first, second = truth.twins
    return f"frames {first} and {second} {SAME_TIME}"


def _wrong_frames(given: _Given, truth: dict[int, Thumbnail]) -> str | None:
    """Return which frames were given in the place of others; None: none."""
    wrong = []
    for asked, picture in zip(given.asked, given.pictures, strict=True):
        stored = _stored(asked, truth)
        shown = _shown(stored, picture, truth)
        if shown != stored:
            wrong.append((asked, shown))
    if not wrong:
        return None
    first, other = wrong[0]
    what = "a picture that is not of this video" if other is None else f"frame {other}"
    return f"{WRONG_FRAMES}, {len(wrong)} of {len(given.asked)} compared: asked for frame {first}, it gives {what}"


def _stored(asked: int, truth: dict[int, Thumbnail]) -> int:
    # Readers count a frame more than there are in some containers, and then repeat the last.
    return min(asked, max(truth))


def _shown(asked: int, picture: Thumbnail, truth: dict[int, Thumbnail]) -> int | None:
    """Return the frame that a picture shows: the one asked for unless another fits clearly better; None: no frame."""
    away = distance(picture, truth[asked])
    if away <= _SAME:
        return asked
    near = {i: distance(picture, truth[i]) for i in range(asked - NEIGHBOURS, asked + NEIGHBOURS + 1) if i in truth}
    best = min(near, key=near.__getitem__)
    if near[best] < away / 2:
        return best
    return asked if away < _FOREIGN else None


def thumbnail(pixels: NDArray[np.uint8]) -> Thumbnail:
    """Return a small grey picture of RGB pixels (H, W, 3); all of them count."""
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
    small = frame.reformat(width=_THUMBNAIL, height=_THUMBNAIL, format="gray", interpolation="AREA", **ONE_THREAD)
    return small.to_ndarray().astype(np.float32)


def distance(a: Thumbnail, b: Thumbnail) -> float:
    """Return by how many grey levels (root mean square) two pictures differ beyond brightness and contrast."""
    a, b = a - a.mean(), b - b.mean()
    squares = float((a * a).mean()), float((b * b).mean())
    likeness = float((a * b).mean()) ** 2 / (squares[0] * squares[1]) if min(squares) > 0 else 0.0
    return float(np.sqrt(max(squares) * max(0.0, 1 - likeness)))
