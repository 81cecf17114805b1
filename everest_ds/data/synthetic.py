"""Synthetic motion videos: real H.264 files whose class is a direction of motion, and which no single frame shows.

A world that wraps around has a dark textured background and a few bright textured sprites that look alike; one of them
moves in one of 8 directions, the label. The camera shakes a little and the sensor is noisy. A clip is a pure function
of (seed, index), up to what the encoder makes of it.

As a command::

    python -m everest_ds.data.synthetic OUT --train 2000 --val 400

writes OUT/train.csv and OUT/val.csv with the videos beside them; a second call with the same arguments does nothing.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import json
import math
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from everest_ds.config.errors import UserError, one_line_errors
from everest_ds.data.randomness import Stream, generator

DIRECTIONS = 8  # label k moves at k * 45 degrees from right, towards down
SPRITE = 8  # pixels
SIZE = 48  # height and width, pixels
FRAMES = 20  # per video: a clip of 16 at stride 1, and room for its start
# Far beyond any training index, so that a longer training set never runs into the validation set.
FIRST_VAL_INDEX = 1_000_000

_SPRITE_GREY = (170, 236)
_SPEED = (2.5, 3.5)  # pixels per frame
_STATIC = (2, 5)
_SHAKE_PROBABILITY = 0.25
_SHAKES = np.array([(0, 1), (0, -1), (1, 0), (-1, 0)])
_NOISE_SIGMA = 2.5
_FPS = 25
# No B-frames and closed groups: a decoder needs to reorder nothing and every reader agrees on the frames.
_X264 = {"crf": "14", "preset": "veryfast", "g": "12", "bf": "0", "flags": "+cgop"}
# Raise it whenever a clip of the same (seed, index) would look different.
_VERSION = 1
_RECORD = "synthetic.json"


def render_motion(
    seed: int, index: int, *, size: int = SIZE, frames: int = FRAMES, margin: int = 0
) -> tuple[NDArray[np.uint8], int]:
    """Return a video, grey uint8 (frames, size + 2 * margin, size + 2 * margin), and its label, the direction 0 ... 7.

    Labels follow the index, so that any 8 videos in a row have one of each. With a margin the frame goes on beyond the
    world's edges, where it wraps around: any crop of ``size`` pixels is a whole world, shifted.
    """
    rng = generator(Stream.SYNTHETIC, seed, index)
    label = index % DIRECTIONS
    world = _background(size, rng)
    for _ in range(rng.integers(*_STATIC)):
        rows, columns = _sprite_pixels(rng.integers(size, size=2)[None], size)
        world[rows[0, :, None], columns[0]] = _texture(rng)
    video = np.repeat(world[None], frames, axis=0)

    angle = label * math.tau / DIRECTIONS
    velocity = rng.uniform(*_SPEED) * np.array([math.sin(angle), math.cos(angle)])
    path = rng.uniform(0, size, size=2) + np.arange(frames)[:, None] * velocity
    rows, columns = _sprite_pixels(np.rint(path).astype(np.int64), size)
    time = np.arange(frames)[:, None, None]
    video[time, rows[:, :, None], columns[:, None]] = _texture(rng)

    video = _shake(video, rng)
    video = np.pad(video, ((0, 0), (margin, margin), (margin, margin)), mode="wrap")
    video = video + _NOISE_SIGMA * rng.standard_normal(video.shape, dtype=np.float32)
    return np.clip(np.rint(video), 0, 255).astype(np.uint8), label


def write_motion_videos(
    folder: str | Path,
    count: int,
    *,
    seed: int,
    size: int = SIZE,
    frames: int = FRAMES,
    margin: int = 0,
    first_index: int = 0,
    workers: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Write ``count`` videos into ``folder`` and return the manifest (path,label) that lists them, beside the folder.

    Args:
        folder: made if need be; videos in it are named by their index and replaced.
        count: videos.
        seed: with the index, all there is to a video.
        size: height and width, pixels, even.
        frames: per video; 16 are a clip, the rest is room for its start.
        margin: pixels of the world beyond each edge, room for crops.
        first_index: index of the first video.
        workers: processes.
        progress: told the number of videos written so far.

    Raises:
        UserError: a number makes no video, or the folder can't be written.
    """
    zero_or_more = {"seed": seed, "margin": margin, "first_index": first_index}
    _check_numbers(size, zero_or_more, count=count, frames=frames, workers=workers)
    folder = Path(folder)
    shape = {"size": size, "frames": frames, "margin": margin}
    write = functools.partial(_write_video, folder, seed, shape)
    indices = range(first_index, first_index + count)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        rows = _map(write, indices, workers, progress or (lambda _: None))
        manifest = folder.parent / f"{folder.name}.csv"
        manifest.write_text("path,label\n" + "".join(f"{folder.name}/{name},{label}\n" for name, label in rows))
    except OSError as error:
        raise UserError(f"cannot write videos to {folder}: {error.strerror}") from error
    return manifest


def _check_numbers(size: int, zero_or_more: dict[str, int], **positive: int) -> None:
    if size % 2 or size < 2 * SPRITE:
        raise UserError(f"size: must be even and at least {2 * SPRITE} pixels, got {size}")
    for name, value in zero_or_more.items():
        if value < 0:
            raise UserError(f"{name}: must not be negative, got {value}")
    for name, value in positive.items():
        if value < 1:
            raise UserError(f"{name}: must be positive, got {value}")


def _background(size: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Return a faint dark texture (size, size), mean 70, of 4-pixel patches and finer grain.

    Faint, so that when the camera shakes it is still the sprites that change most.
    """
    coarse = rng.uniform(-4, 4, size=(-(-size // 4),) * 2)
    fine = rng.uniform(-2, 2, size=(size, size))
    return (70 + np.kron(coarse, np.ones((4, 4)))[:size, :size] + fine).astype(np.float32)


def _texture(rng: np.random.Generator) -> NDArray[np.int64]:
    """Return a sprite (8, 8) of 2-pixel squares: fine grain would be lost in the reconstruction's bottleneck."""
    return np.kron(rng.integers(*_SPRITE_GREY, size=(SPRITE // 2, SPRITE // 2)), np.ones((2, 2), dtype=np.int64))


def _sprite_pixels(corners: NDArray[np.int64], size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows (n, 8) and columns (n, 8) of sprites with these corners (n, 2), wrapped around."""
    span = np.arange(SPRITE)
    return (corners[:, :1] + span) % size, (corners[:, 1:] + span) % size


def _shake(video: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Return the frames, each displaced by one pixel or not, independently of the frame before."""
    frames, size, _ = video.shape
    shakes = _SHAKES[rng.integers(len(_SHAKES), size=frames)] * (rng.random((frames, 1)) < _SHAKE_PROBABILITY)
    pixels = np.arange(size)
    rows, columns = (pixels + shakes[:, :1]) % size, (pixels + shakes[:, 1:]) % size
    return video[np.arange(frames)[:, None, None], rows[:, :, None], columns[:, None]]


def _write_video(folder: Path, seed: int, shape: dict[str, int], index: int) -> tuple[str, int]:
    """Write one video and return its name and label. It appears under its name only when it is whole."""
    video, label = render_motion(seed, index, **shape)
    path = folder / f"{index:07d}.mp4"
    unfinished = path.with_suffix(".unfinished")
    encode_grey(unfinished, video)
    unfinished.replace(path)
    return path.name, label


def encode_grey(path: Path, video: NDArray[np.uint8]) -> None:
    """Write grey frames (T, S, S) as an H.264 mp4, 4:2:0, limited range, colour planes neutral."""
    _, height, width = video.shape
    planes = np.full((height * 3 // 2, width), 128, dtype=np.uint8)
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=_FPS, options=_X264)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # Processes are the parallelism.
        stream.thread_count = 1
        for luma in np.rint(16 + video * np.float32(219 / 255)).astype(np.uint8):
            planes[:height] = luma
            container.mux(stream.encode(av.VideoFrame.from_ndarray(planes, format="yuv420p")))
        container.mux(stream.encode(None))


def _map(
    write: Callable[[int], tuple[str, int]], indices: Sequence[int], workers: int, progress: Callable[[int], None]
) -> list[tuple[str, int]]:
    rows: list[tuple[str, int]] = []
    if workers == 1:
        for row in map(write, indices):
            rows.append(row)
            progress(len(rows))
        return rows
    # Not forked: the caller may have threads running (torch has).
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for row in pool.map(write, indices, chunksize=16):
            rows.append(row)
            progress(len(rows))
    return rows


def write_set(
    out: Path,
    *,
    train: int,
    val: int,
    seed: int,
    size: int = SIZE,
    frames: int = FRAMES,
    margin: int = 0,
    workers: int = 1,
) -> None:
    """Write OUT/train.csv and OUT/val.csv with their videos, unless the very same set is there already.

    The margin is for random crops: training videos have it.

    Raises:
        UserError: OUT holds another set, or anything else.
    """
    for count in (train, val):
        _check_numbers(size, {"seed": seed, "margin": margin}, count=count, frames=frames, workers=workers)
    shape = {"size": size, "frames": frames, "margin": margin}
    wanted = {"version": _VERSION, "train": train, "val": val, "seed": seed, **shape}
    if _holds(out, wanted):
        print(f"{out} already holds this set", file=sys.stderr)
        return
    # First, so that whatever an interrupted call leaves behind is known for what it is.
    _write_record(out, wanted)
    for name, count, first, room in (("train", train, 0, margin), ("val", val, FIRST_VAL_INDEX, 0)):
        write_motion_videos(
            out / name,
            count,
            seed=seed,
            size=size,
            frames=frames,
            margin=room,
            first_index=first,
            workers=workers,
            progress=_ProgressLine(name, count),
        )


def _holds(out: Path, wanted: dict[str, int]) -> bool:
    """Say whether OUT holds the wanted set; an unfinished one of the same arguments, or nothing, is to be written."""
    try:
        found = dict(json.loads((out / _RECORD).read_text()))
    except FileNotFoundError:
        if out.is_dir() and any(out.iterdir()):
            raise UserError(f"{out} is not empty and holds no synthetic set; name another folder") from None
        return False
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{out / _RECORD} can't be read as the record of a synthetic set; name another folder"
        ) from error
    if found != wanted:
        changed = ", ".join(
            f"{key} {found.get(key)} not {wanted[key]}" for key in wanted if found.get(key) != wanted[key]
        )
        raise UserError(f"{out} holds a different set ({changed}); name another folder or delete it")
    videos = {name: sum(1 for _ in (out / name).glob("*.mp4")) for name in ("train", "val")}
    return all(videos[name] == wanted[name] and (out / f"{name}.csv").is_file() for name in videos)


def _write_record(out: Path, wanted: dict[str, int]) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / _RECORD).write_text(json.dumps(wanted) + "\n")
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}") from error


class _ProgressLine:
    """Progress on one line, which a log keeps as a few."""

    def __init__(self, name: str, count: int) -> None:
        self._name, self._count = name, count

    def __call__(self, done: int) -> None:
        live = sys.stderr.isatty()
        if done == self._count or (live and done % 50 == 0):
            start, end = ("\r", "" if done < self._count else "\n") if live else ("", "\n")
            print(f"{start}{self._name}: {done} of {self._count} videos", end=end, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m everest_ds.data.synthetic", description="Write motion videos.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write train.csv, val.csv and the videos into")
    parser.add_argument("--train", type=int, required=True, help="training videos")
    parser.add_argument("--val", type=int, required=True, help="validation videos")
    parser.add_argument("--size", type=int, default=SIZE, help=f"height and width, pixels (default {SIZE})")
    parser.add_argument("--frames", type=int, default=FRAMES, help=f"frames per video (default {FRAMES})")
    parser.add_argument(
        "--margin", type=int, default=0, help="pixels around training videos, room for random crops (default 0)"
    )
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--workers", type=int, default=1, help="processes (default 1)")
    options = parser.parse_args(arguments)
    with one_line_errors("synthetic"):
        write_set(**vars(options))


if __name__ == "__main__":
    main()
