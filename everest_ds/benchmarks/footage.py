"""Videos as cameras and web sites make them, for the data benchmark: large frames, few key frames, B-frames."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from everest_ds.config.errors import UserError
from everest_ds.data.manifest import Entry, format_manifest, read_manifest
from everest_ds.data.randomness import Stream, generator

HEIGHT, WIDTH = 480, 640
FRAMES = 300
_FPS = 30
# libx264's own defaults are what most of the web was encoded with: 250 frames between key frames, three B-frames.
_X264 = {"preset": "fast"}
_MARGIN = 160  # pixels that the camera can wander
_OCTAVES = (2, 8, 32, 128)  # sides of the world's patches, pixels
_NOISE_SIGMA = 2.0
_OBJECTS = 6


def write_footage(folder: Path, count: int, *, seed: int = 0) -> list[Entry]:
    """Write ``count`` videos into ``folder``, with a manifest, unless it is there already; return its entries.

    Raises:
        UserError: the folder holds another number of them, or can't be written to.
    """
    manifest = folder / "videos.csv"
    if not manifest.is_file():
        names = [f"{index:04d}.mp4" for index in range(count)]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for index, name in enumerate(names):
                _encode(folder / name, _frames(generator(Stream.SYNTHETIC, seed, index)))
            manifest.write_text(format_manifest([Entry(name, None) for name in names]), encoding="utf-8")
        except OSError as error:
            raise UserError(f"--folder: cannot write to {folder}: {error.strerror}") from error
    entries = read_manifest(manifest)
    if len(entries) != count:
        raise UserError(f"--videos: {folder} holds {len(entries)} videos, not {count}; name another --folder")
    return entries


def _world(rng: np.random.Generator, height: int, width: int) -> NDArray[np.float32]:
    """A coloured texture (height, width, 3) of patches of many sizes, as nature has them."""
    world = np.full((height, width, 3), 110, dtype=np.float32)
    for side in _OCTAVES:
        patches = rng.normal(0, 6 * side**0.35, size=(-(-height // side), -(-width // side), 3))
        world += np.kron(patches, np.ones((side, side, 1)))[:height, :width]
    return world


def _frames(rng: np.random.Generator) -> NDArray[np.uint8]:
    """A camera that wanders over a world with a few moving objects: (FRAMES, HEIGHT, WIDTH, 3)."""
    world = _world(rng, HEIGHT + _MARGIN, WIDTH + _MARGIN)
    time = np.arange(FRAMES)[:, None]
    camera = _MARGIN / 2 * (1 + np.sin(time / FRAMES * rng.uniform(2, 8, size=2) + rng.uniform(0, 6, size=2)))
    objects = [(_world(rng, *rng.integers(40, 140, size=2)), *rng.uniform(-3, 3, size=2)) for _ in range(_OBJECTS)]
    places = rng.uniform(0, 1, size=(_OBJECTS, 2))
    noise = rng.normal(0, _NOISE_SIGMA, size=(2 * HEIGHT, 2 * WIDTH, 1)).astype(np.float32)
    frames = np.empty((FRAMES, HEIGHT, WIDTH, 3), dtype=np.uint8)
    for number, (top, left) in enumerate(camera.astype(int)):
        picture = world[top : top + HEIGHT, left : left + WIDTH].copy()
        for (thing, down, right), (y, x) in zip(objects, places, strict=True):
            height, width = thing.shape[:2]
            row = int(y * HEIGHT + down * number) % (HEIGHT - height)
            column = int(x * WIDTH + right * number) % (WIDTH - width)
            picture[row : row + height, column : column + width] = thing
        row, column = rng.integers(HEIGHT), rng.integers(WIDTH)
        picture += noise[row : row + HEIGHT, column : column + WIDTH]
        frames[number] = np.clip(picture, 0, 255)
    return frames


def _encode(path: Path, frames: NDArray[np.uint8]) -> None:
    unfinished = path.with_suffix(".unfinished")
    with av.open(str(unfinished), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=_FPS, options=_X264)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    unfinished.replace(path)
