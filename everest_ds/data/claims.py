"""How long a video claims to be, read from its header before a library believes it.

decord reserves memory for as many frames as a header claims, and where that can't be had it takes its whole process
along (``terminate called after throwing an instance of 'std::bad_alloc'``): one wrong byte in a count would end a
worker. Here are the fields that it goes by in MP4, Matroska and AVI; other containers' can't be as large, or aren't
known.
"""

from __future__ import annotations

import itertools
import re
import struct
from collections.abc import Iterator
from typing import BinaryIO

# No file holds more: ten days at 120 frames a second. decord reserves 32 bytes for each.
MOST_FRAMES = 100_000_000
LONGEST_S = 10 * 24 * 3600

# Matroska and AVI describe their streams first.
_HEAD_BYTES = 4096
# Of a list of durations; one that is longer is read as far as this.
_LARGEST_TABLE_BYTES = 1 << 24
_AVI_LENGTH = re.compile(rb"strh.{4}vids.{28}(.{4})", re.DOTALL)
_MATROSKA = b"\x1aE\xdf\xa3"
_MATROSKA_SCALE = re.compile(rb"\x2a\xd7\xb1([\x81-\x88])(.{8})", re.DOTALL)
_MATROSKA_DURATION = re.compile(rb"\x44\x89([\x84\x88])(.{8})", re.DOTALL)
_MATROSKA_SCALE_NS = 1_000_000
# Real files have hundreds; a walk over more would only waste time.
_MOST_BOXES = 10_000
_MP4_STARTS = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide")
# Boxes one in another on the way to the table of a track's frames.
_MP4_PARENTS = (b"moov", b"trak", b"mdia", b"minf", b"stbl")


def exaggeration(file: BinaryIO) -> str | None:
    """Return what an open file claims that no video has, in a few words; None: nothing.

    The file may be anything, and is left at any place.
    """
    head = file.read(_HEAD_BYTES)
    if head.startswith(b"RIFF"):
        frames = max((struct.unpack("<I", length)[0] for length in _AVI_LENGTH.findall(head)), default=0)
    elif head.startswith(_MATROSKA):
        return _long_matroska(head)
    elif head[4:8] in _MP4_STARTS:
        frames = max(_mp4_tracks(file), default=0)
    else:
        return None
    return f"claims to have {frames} frames" if frames > MOST_FRAMES else None


def _long_matroska(head: bytes) -> str | None:
    duration, scale = _MATROSKA_DURATION.search(head), _MATROSKA_SCALE.search(head)
    if duration is None:
        return None
    kind, data = duration.groups()
    (ticks,) = struct.unpack(">d", data) if kind == b"\x88" else struct.unpack(">f", data[:4])
    tick_ns = int.from_bytes(scale[2][: scale[1][0] & 0x7F], "big") if scale else _MATROSKA_SCALE_NS
    seconds = ticks * tick_ns / 1e9
    return f"claims to last {seconds:.3g} seconds" if seconds > LONGEST_S else None


def _mp4_tracks(file: BinaryIO) -> Iterator[int]:
    """Yield how many frames each video track claims."""
    video = False
    for kind, size in itertools.islice(_mp4_boxes(file, 0, file.seek(0, 2), _MP4_PARENTS), _MOST_BOXES):
        if kind == b"trak":
            video = False
        elif kind == b"hdlr":
            # QuickTime has a second one in a track, of where its data is.
            video |= file.read(12)[8:] == b"vide"
        elif kind == b"stts" and video:
            entries = file.read(min(size, _LARGEST_TABLE_BYTES))[8:]
            yield sum(frames for frames, _ in struct.iter_unpack(">II", entries[: len(entries) // 8 * 8]))


def _mp4_boxes(file: BinaryIO, start: int, stop: int, parents: tuple[bytes, ...]) -> Iterator[tuple[bytes, int]]:
    """Yield kind and size of the boxes, those inside of ``parents[0]`` after it; the file is where the box starts."""
    while start + 8 <= stop:
        file.seek(start)
        size, kind = struct.unpack(">I4s", file.read(8))
        inside = start + 8
        if size == 1:
            # A size of 64 bits follows.
            size, inside = int.from_bytes(file.read(8), "big"), start + 16
        end = stop if size == 0 else min(stop, start + size)
        if end < inside:
            return
        file.seek(inside)
        yield kind, end - inside
        if parents and kind == parents[0]:
            yield from _mp4_boxes(file, inside, end, parents[1:])
            if kind == _MP4_PARENTS[0]:
                # What follows are pictures, in thousands of boxes where a file was written for streaming.
                return
        start = end
