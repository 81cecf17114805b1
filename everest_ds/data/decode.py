"""Frames of a video file: one function, and a table of the libraries that can do it.

A file is opened, asked for all the frames that are needed at once, and closed. Readers are never kept: one held across
a fork aborts the worker, and long-lived ones grow. Nothing falls back to another library: frames are right or the
file is reported. (decord reads some encodings wrong without noticing, open-GOP H.264 among them; torchcodec doesn't.
Both give mirrored videos turned or unmirrored. :mod:`everest_ds.data.prepare.scan` finds such files.)
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import io
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from everest_ds.config.errors import UserError
from everest_ds.data.claims import exaggeration
from everest_ds.data.members import Member

NOT_A_VIDEO = "not a video, or cut off"
# Pixels of a picture: 8192 x 8192, as panoramas for two eyes have. 16 of them take 3 GiB, and a few bytes ask for more.
LARGEST_PICTURE = 8192 * 8192
_LONGEST_REASON = 200
REWRITE_IT = "rewrite it with tools/prepare_videos.py"
_NO_DECODER = "{decoder} has no decoder for its codec, {codec}"
# What a library says of files that may be whole, and what it means.
_MEANINGS = {
    "cannot find video stream": _NO_DECODER,
    "No valid stream found": _NO_DECODER,
    "best video stream is unknown": _NO_DECODER,
    "Failed to measure duration": "{decoder} finds no duration in its header",
    "Unable to handle EOF": "{decoder} does not find its last frames",
    "Could not seek file": "{decoder} can't go to its first frame",
}


class DecodeError(Exception):
    """A file from which the frames could not be read; ``passing`` if that may be the storage's fault."""

    def __init__(self, path: str, reason: str, passing: bool = False) -> None:
        # All to Exception: it is rebuilt from its arguments when it comes out of a worker process.
        super().__init__(path, reason, passing)
        self.path = path
        self.reason = reason
        self.passing = passing

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class Reader(Protocol):
    """An open video."""

    def __len__(self) -> int:
        """Return the number of frames."""

    def frames(self, ids: list[int]) -> NDArray[np.uint8]:
        """Return frames (len(ids), H, W, 3), RGB; ``ids`` ascend strictly."""


def decode(path: str, choose: Callable[[int], ArrayLike], decoder: str = "decord") -> NDArray[np.uint8]:
    """Open a video, let ``choose`` pick frame ids knowing the number of frames, and return those frames.

    Args:
        path: a file, or a member of a tar file (:mod:`everest_ds.data.members`).
        choose: maps the number of frames (at least 1) to ids in [0, number), in any order, repeats allowed.
        decoder: a key of :data:`DECODERS`.

    Returns:
        uint8 (T, H, W, 3), RGB, in the order of the ids.

    Raises:
        DecodeError: no such file, not a video, or damaged where it was read.
        UserError: the library is not installed (call :func:`require_decoder` early to hear it once).
    """
    open_reader, errors = DECODERS[decoder]()
    video = open_video(path)
    _check_claims(path, video)
    with _reported(path, decoder, errors):
        reader = open_reader(video)
        length = len(reader)
    if length < 1:
        raise DecodeError(path, "holds no frame")
    # Sorted and without repeats, a file is read forward once, however the views overlap.
    ids, places = np.unique(np.asarray(choose(length), dtype=np.int64), return_inverse=True)
    with _reported(path, decoder, errors):
        frames = reader.frames(ids.tolist())
    return frames if np.array_equal(places, np.arange(len(ids))) else frames[places]


def open_video(path: str) -> str | io.BytesIO:
    """Return what a library opens: the path itself, or all of a tar file's member.

    Raises:
        DecodeError: there is no such file, or nothing in it.
        UserError: the path is a URL, and the library that knows it is missing.
    """
    member = Member.named(path)
    if member is None:
        _check_file(path)
        return path
    try:
        return io.BytesIO(member.read())
    except (OSError, ValueError) as error:
        passing = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
        raise DecodeError(path, (getattr(error, "strerror", None) or one_line(error)).lower(), passing) from error


def require_decoder(name: str) -> None:
    """Load a decoder's library.

    Raises:
        UserError: the name is unknown, or the library is missing or doesn't load.
    """
    if name not in DECODERS:
        raise UserError(f"data.decoder: unknown decoder '{name}'; one of {', '.join(DECODERS)}")
    DECODERS[name]()


def one_line(error: BaseException) -> str:
    """Return an error's message as one readable line, without source positions and stack traces."""
    lines = (line.strip() for line in str(error).splitlines())
    first = next((line for line in lines if line), type(error).__name__)
    # decord: "[12:00:00] /path/x.cc:292: [12:00:00] /path/y.cc:218: Check failed: ..."
    reason = re.sub(r"(\[\d\d:\d\d:\d\d\] \S+\.\w+:\d+: )+", "", first)
    reason = re.sub(r"^Check failed: .* \(-?\d+ vs\. -?\d+\) (?=\S)", "", reason)
    # torchcodec: "function, /path/x.cpp:41, Could not ..."
    reason = re.sub(r"^\w+, \S+\.cpp:\d+, ", "", reason)
    return reason if len(reason) <= _LONGEST_REASON else reason[: _LONGEST_REASON - 3] + "..."


@contextlib.contextmanager
def _reported(path: str, decoder: str, errors: tuple[type[Exception], ...]) -> Iterator[None]:
    try:
        yield
    except errors as error:
        reason = one_line(error)
        # All that decord says of what it can't open.
        unknown = reason.startswith("Error reading ") and reason.endswith("...")
        meaning = next((meaning for said, meaning in _MEANINGS.items() if said in reason), None)
        if meaning is not None:
            raise _explained(path, decoder, meaning) from error
        raise DecodeError(path, NOT_A_VIDEO if unknown else reason) from error


def _explained(path: str, decoder: str, meaning: str) -> DecodeError:
    """Return what to say of a file that another library may well read, after a look at what it holds."""
    # Loaded for such files alone: it takes a worker 20 MB.
    from everest_ds.data.prepare.sequential import opened  # noqa: PLC0415

    try:
        with opened(path) as video:
            codec = video.facts.codec
    except DecodeError as error:
        return error
    return DecodeError(path, f"{meaning.format(decoder=decoder, codec=codec)}; {REWRITE_IT}")


def _check_file(path: str) -> None:
    """Name the plain cases, which the libraries lump together as "Error reading", or wait for, as for a pipe.

    Raises:
        DecodeError: there is no such file, or nothing in it.
    """
    try:
        status = Path(path).stat()
    except (OSError, ValueError) as error:
        raise DecodeError(path, (getattr(error, "strerror", None) or str(error)).lower()) from error
    if not stat.S_ISREG(status.st_mode):
        raise DecodeError(path, "not a file")
    if status.st_size == 0:
        raise DecodeError(path, "empty file")


def _check_claims(path: str, video: str | io.BytesIO) -> None:
    """Refuse what a library would end its process on.

    Raises:
        DecodeError: the file claims what no video has, or can't be read.
    """
    try:
        if isinstance(video, str):
            with open(video, "rb") as file:  # noqa: PTH123 - of text, for every sample
                reason = exaggeration(file)
        else:
            reason = exaggeration(video)
            video.seek(0)
    except OSError as error:
        raise DecodeError(path, (error.strerror or one_line(error)).lower()) from error
    if reason is not None:
        raise DecodeError(path, reason)


def _check_picture(height: int, width: int) -> None:
    if height * width > LARGEST_PICTURE:
        # As the libraries say it: it is the file's fault.
        raise RuntimeError(f"pictures of {width} x {height} pixels")


class _DecordReader:
    def __init__(self, decord: Any, video: str | io.BytesIO) -> None:
        # One thread: the workers are the parallelism.
        self._reader = decord.VideoReader(video, num_threads=1)
        if not isinstance(video, str):
            # decord leaves the file's bytes in a reference cycle: megabytes, which count as few objects.
            gc.collect(0)
        self._error = decord._ffi.base.DECORDError
        # Asked for no frame, it says how large they are without decoding one.
        _check_picture(*self._reader.get_batch([]).shape[1:3])

    def __len__(self) -> int:
        return len(self._reader)

    def frames(self, ids: list[int]) -> NDArray[np.uint8]:
        try:
            frames: NDArray[np.uint8] = self._reader.get_batch(ids).asnumpy()
        except self._error as error:
            if "ArrayCopyFromTo" not in str(error):
                raise
            frames = np.stack([_without_padding(self._reader[i].asnumpy()) for i in ids])
        return frames


def _without_padding(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return RGB (H, W, 3) of a frame whose row padding decord takes for more channels.

    It does so, and then can't make a batch, where a padded row is a multiple of the width: 16, 24, 48 and 72 pixels
    (its issue 336).
    """
    height, width = frame.shape[:2]
    return frame.reshape(height, -1)[:, : 3 * width].reshape(height, width, 3)


class _TorchcodecReader:
    def __init__(self, decoders: Any, video: str | io.BytesIO) -> None:
        self._decoder = decoders.VideoDecoder(video, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
        _check_picture(self._decoder.metadata.height or 0, self._decoder.metadata.width or 0)

    def __len__(self) -> int:
        return len(self._decoder)

    def frames(self, ids: list[int]) -> NDArray[np.uint8]:
        frames: NDArray[np.uint8] = self._decoder.get_frames_at(indices=ids).data.numpy()
        return frames


_Opener = tuple[Callable[["str | io.BytesIO"], Reader], tuple[type[Exception], ...]]


@functools.cache
def _decord() -> _Opener:
    decord = _import("decord")
    # FFmpeg's chatter about broken files; decord itself still writes one line for a file that it can't open.
    decord.logging.set_level(decord.logging.QUIET)
    own = [
        kind for name, kind in vars(decord._ffi.base).items() if name.startswith("DECORD") and name.endswith("Error")
    ]
    # An assertion guards its frame count; a damaged file's frames may differ in shape.
    return functools.partial(_DecordReader, decord), (RuntimeError, AssertionError, ValueError, *own)


@functools.cache
def _torchcodec() -> _Opener:
    decoders = _import("torchcodec.decoders", extra="torchcodec")
    return functools.partial(_TorchcodecReader, decoders), (RuntimeError, ValueError)


DECODERS: dict[str, Callable[[], _Opener]] = {"decord": _decord, "torchcodec": _torchcodec}
"""Name -> a function that loads the library and returns how it opens a file and the exceptions it raises."""


def _import(name: str, extra: str | None = None) -> Any:
    """Import a library where it is first needed: an unused one costs memory in every worker."""
    library = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        wanted = f"everest_ds[{extra}]" if extra else "everest_ds"
        raise UserError(f"data.decoder: {library} is not installed; pip install '{wanted}'") from error
    except (ImportError, OSError, RuntimeError) as error:
        # torchcodec without FFmpeg's shared libraries raises RuntimeError, and the first line says so.
        raise UserError(f"data.decoder: {library} does not load: {one_line(error)}") from error
