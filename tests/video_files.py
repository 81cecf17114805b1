"""Small real video files, good and bad, made with PyAV."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np

CLOSED_GROUPS = {"crf": "10", "g": "12", "bf": "2", "flags": "+cgop"}


def moving_frames(count: int, height: int = 48, width: int = 64, seed: int = 0) -> np.ndarray:
    """Return RGB frames (count, height, width, 3), each clearly different from all others."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, size=(height // 8, width // 8, 3))
    picture = np.kron(coarse, np.ones((8, 8, 1))).astype(np.uint8)
    # 3 and 1 pixels a frame: no frame comes back before 64 of them.
    return np.stack([np.roll(picture, (t, 3 * t), axis=(0, 1)) for t in range(count)])


def write_video(path: Path, frames: np.ndarray, **options: str) -> Path:
    """Write frames as H.264 with B-frames in closed groups of 12."""
    return encode(path, frames, "libx264", CLOSED_GROUPS | options)


def encode(path: Path, frames: np.ndarray, codec: str, options: dict[str, str]) -> Path:
    """Write frames, in the container that the suffix names."""
    # Without it, Matroska has random numbers in it.
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def read_all(path: Path) -> np.ndarray:
    """Return all frames of a file by decoding it from start to end: the truth."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def write_audio(path: Path) -> Path:
    """Write an mp4 that holds sound alone."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        stream.layout = "mono"
        for block in range(8):
            wave = np.sin(np.arange(1024, dtype=np.float32) / 10)[None]
            frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, block * 1024
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_bad_files(folder: Path, good: Path) -> dict[str, Path]:
    """Write one file of every kind that can't be read, and return them by kind. ``missing`` is not written."""
    kinds = ("missing", "empty", "text", "cut", "audio", "damaged", "folder")
    bad = {kind: folder / f"{kind}.mp4" for kind in kinds}
    whole = good.read_bytes()
    bad["empty"].touch()
    bad["text"].write_text("this is no video\n" * 50)
    # The index (moov) comes last in an mp4: half a file has none.
    bad["cut"].write_bytes(whole[: len(whole) // 2])
    write_audio(bad["audio"])
    start = whole.index(b"mdat") + 4
    size = int.from_bytes(whole[start - 8 : start - 4], "big") - 8
    middle = slice(start + size // 10, start + size * 9 // 10)
    bad["damaged"].write_bytes(whole[: middle.start] + bytes(middle.stop - middle.start) + whole[middle.stop :])
    bad["folder"].mkdir()
    return bad


# Reading from the middle, decord gives frames of the next group: a group's first frames lean on the one before.
OPEN_GOP = {"bf": "3", "flags": "-cgop", "x264-params": "open-gop=1:keyint=12:min-keyint=12:scenecut=0:b-adapt=0"}


# How phones say that a video is to be shown: a, b, c and d of a matrix; a pixel (x, y) goes to (ax + cy, bx + dy).
ORIENTATIONS = {
    "upright": (1, 0, 0, 1),
    "a quarter clockwise": (0, 1, -1, 0),
    "half a turn": (-1, 0, 0, -1),
    "a quarter counter-clockwise": (0, -1, 1, 0),
    "mirrored": (-1, 0, 0, 1),
    "upside down": (1, 0, 0, -1),
    "transposed": (0, 1, 1, 0),
    "transposed over the other diagonal": (0, -1, -1, 0),
}


def oriented(path: Path, whole: Path, orientation: str) -> Path:
    """Write a copy of an mp4 or mov that says it is to be shown another way."""
    a, b, c, d = ORIENTATIONS[orientation]
    matrix = struct.pack(">9i", *(65536 * x for x in (a, b, 0, c, d, 0, 0, 0)), 1 << 30)
    data = bytearray(whole.read_bytes())
    # Of a track header of version 0: times, number and length, then layers and volume come first.
    start = data.index(b"tkhd") + 4 + 4 + 20 + 16
    data[start : start + len(matrix)] = matrix
    path.write_bytes(data)
    return path


def shown(frames: np.ndarray, orientation: str) -> np.ndarray:
    """Return frames (count, H, W, 3) as a player shows them, pixel by pixel as the matrix says."""
    a, b, c, d = ORIENTATIONS[orientation]
    y, x = np.mgrid[: frames.shape[1], : frames.shape[2]]
    across, down = a * x + c * y, b * x + d * y
    across, down = across - across.min(), down - down.min()
    laid = np.empty((len(frames), down.max() + 1, across.max() + 1, 3), frames.dtype)
    laid[:, down, across] = frames
    return laid


@contextlib.contextmanager
def silent_server() -> Iterator[str]:
    """A server on loopback that takes connections and never answers: the address of a video that hangs its reader."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/hangs.tar#512+1000#hangs.mp4"
