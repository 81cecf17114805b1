"""Real videos of several codecs and containers, and copies of them damaged in every way that a copy gets damaged.

Everything follows from (seed, number), so a file that once crashed a decoder can be made again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from video_files import CLOSED_GROUPS, encode, moving_frames

FRAMES = 20
# x264's code for AVX-512 makes other bits at every call.
_H264 = ("libx264", CLOSED_GROUPS | {"x264-params": "asm=0"})
# Suffix -> codec and options; libx265 writes to stderr unless told not to.
_SOURCES: dict[str, tuple[str, dict[str, str]]] = {
    "mp4": _H264,
    "mkv": _H264,
    "avi": ("mpeg4", {}),
    "mpg": ("mpeg2video", {}),
    "webm": ("libvpx-vp9", {"cpu-used": "8", "deadline": "realtime"}),
    "mov": ("libx265", {"x265-params": "log-level=none"}),
}
# Where containers keep what a reader trusts before it has decoded anything.
_HEAD_BYTES = 256


class Fuzzed(NamedTuple):
    """A file, and what was done to it (``untouched``: nothing)."""

    path: Path
    kind: str


def write_sources(folder: Path) -> list[Path]:
    """Write one small good video per container."""
    frames = moving_frames(FRAMES)
    return [encode(folder / f"source.{suffix}", frames, *codec) for suffix, codec in _SOURCES.items()]


def write_fuzzed(folder: Path, count: int, *, seed: int) -> list[Fuzzed]:
    """Write ``count`` files into an empty folder, every kind of damage to every source, a few files untouched."""
    (folder / "sources").mkdir()
    sources = write_sources(folder / "sources")
    data = {path.suffix: path.read_bytes() for path in sources}
    return [_write_one(folder, number, data, seed) for number in range(count)]


def _write_one(folder: Path, number: int, data: dict[str, bytes], seed: int) -> Fuzzed:
    suffix = list(data)[number % len(data)]
    kind = list(KINDS)[number // len(data) % len(KINDS)]
    path = folder / f"{number:05d}-{kind}{suffix}"
    path.write_bytes(damaged(data[suffix], kind, list(data.values()), np.random.default_rng((seed, number))))
    return Fuzzed(path, kind)


def damaged(whole: bytes, kind: str, others: Sequence[bytes], rng: np.random.Generator) -> bytes:
    """Return a copy with damage of a kind; ``others`` is what it may be spliced with."""
    return KINDS[kind](np.frombuffer(whole, dtype=np.uint8).copy(), others, rng).tobytes()


_Bytes = np.ndarray
_Damage = Callable[[_Bytes, Sequence[bytes], np.random.Generator], _Bytes]


def _flips(low: int, high: int, *, head: bool = False) -> _Damage:
    """Change so many bytes, anywhere or where a container describes itself: at both ends."""

    def flip(data: _Bytes, others: Sequence[bytes], rng: np.random.Generator) -> _Bytes:
        places = rng.integers(len(data), size=rng.integers(low, high + 1))
        if head:
            ends = np.concatenate([np.arange(_HEAD_BYTES), np.arange(len(data) - 4 * _HEAD_BYTES, len(data))])
            places = ends[places % len(ends)]
        data[places] ^= rng.integers(1, 256, size=len(places), dtype=np.uint8)
        return data

    return flip


def _cut_end(data: _Bytes, others: Sequence[bytes], rng: np.random.Generator) -> _Bytes:
    return data[: rng.integers(len(data))]


def _cut_start(data: _Bytes, others: Sequence[bytes], rng: np.random.Generator) -> _Bytes:
    return data[rng.integers(1, len(data)) :]


def _cut_middle(data: _Bytes, others: Sequence[bytes], rng: np.random.Generator) -> _Bytes:
    start, stop = _range(data, rng)
    return np.concatenate([data[:start], data[stop:]])


def _splice(data: _Bytes, others: Sequence[bytes], rng: np.random.Generator) -> _Bytes:
    other = np.frombuffer(others[rng.integers(len(others))], dtype=np.uint8)
    return np.concatenate([data[: rng.integers(len(data))], other[rng.integers(len(other)) :]])


def _zeros(data: _Bytes, others: Sequence[bytes], rng: np.random.Generator) -> _Bytes:
    start, stop = _range(data, rng)
    data[start:stop] = 0
    return data


def _swap(data: _Bytes, others: Sequence[bytes], rng: np.random.Generator) -> _Bytes:
    block = int(rng.integers(16, 513))
    one, two = sorted(int(place) * block for place in rng.integers(len(data) // block, size=2))
    data[one : one + block], data[two : two + block] = data[two : two + block].copy(), data[one : one + block].copy()
    return data


def _largest_numbers(data: _Bytes, others: Sequence[bytes], rng: np.random.Generator) -> _Bytes:
    """Claim sizes and counts beyond all memory, in the tables at both ends."""
    ends = np.concatenate([np.arange(_HEAD_BYTES), np.arange(len(data) - 4 * _HEAD_BYTES, len(data) - 4)])
    for place in rng.choice(ends, size=rng.integers(1, 4)):
        data[place : place + 4] = [(0x7F, 0xFF, 0xFF, 0xFF), (0xFF,) * 4, (0x80, 0, 0, 0)][rng.integers(3)]
    return data


def _untouched(data: _Bytes, others: Sequence[bytes], rng: np.random.Generator) -> _Bytes:
    return data


def _range(data: _Bytes, rng: np.random.Generator) -> tuple[int, int]:
    start, stop = sorted(rng.integers(len(data), size=2).tolist())
    return start, stop + 1


KINDS: dict[str, _Damage] = {
    "untouched": _untouched,
    "one_flip": _flips(1, 1),
    "few_flips": _flips(2, 20),
    "many_flips": _flips(50, 500),
    "head_flips": _flips(1, 10, head=True),
    "largest_numbers": _largest_numbers,
    "cut_end": _cut_end,
    "cut_start": _cut_start,
    "cut_middle": _cut_middle,
    "spliced": _splice,
    "zeros": _zeros,
    "swapped": _swap,
}
