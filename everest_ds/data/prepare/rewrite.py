"""Copies of videos that are good to train on: small, H.264, every frame reached from a key frame close before it.

The copies have no B-frames and closed groups of pictures, so readers agree on which frame is which, and reading a clip
from the middle decodes few frames in vain. Each frame of the original becomes one of the copy, at a constant rate (the
mean of the original); sound is left out; what is stored turned or mirrored is laid down as it is to be shown.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections import Counter
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import av
from av.video.frame import PictureType
from av.video.reformatter import ColorRange, Colorspace

from everest_ds.config.errors import UserError
from everest_ds.config.progress import CountLine
from everest_ds.data.decode import DecodeError, one_line
from everest_ds.data.manifest import UNLISTABLE, Entry, can_list, format_manifest
from everest_ds.data.members import Member, is_url
from everest_ds.data.prepare import jobs
from everest_ds.data.prepare.folder import Record, WorkFolder, status_of
from everest_ds.data.prepare.scan import BAD, Limits, format_bad
from everest_ds.data.prepare.sequential import ONE_THREAD, UPRIGHT, Video, opened, orientation, upright
from everest_ds.data.prepare.sources import Source

MANIFEST = "manifest.csv"
# Raise it whenever the same video would become another copy.
_VERSION = 2
_UNFINISHED = ".unfinished"
# What FFmpeg calls a frame whose colours are not coded as luma and chroma (AVCOL_SPC_RGB).
_RGB = 0
_FULL = (errno.ENOSPC, errno.EDQUOT)
_USUAL_RATE = 25
_HIGHEST_RATE = 1000


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How a copy is encoded.

    ``short_side`` of a frame in pixels, at most (nothing is enlarged); ``gop``: frames from a key frame to the next, at
    most; ``crf``: libx264's quality, 0 (lossless) to 51.
    """

    short_side: int = 256
    gop: int = 12
    crf: int = 18

    def __post_init__(self) -> None:
        if self.short_side < 2 or self.short_side % 2:
            raise UserError(f"--short-side: must be even and at least 2 pixels, got {self.short_side}")
        if self.gop < 1:
            raise UserError(f"--gop: must be positive, got {self.gop}")
        if not 0 <= self.crf <= 51:
            raise UserError(f"--crf: must be in 0 ... 51, got {self.crf}")

    @property
    def options(self) -> dict[str, str]:
        """Options of libx264."""
        return {"preset": "veryfast", "crf": str(self.crf), "g": str(self.gop), "bf": "0", "flags": "+cgop"}


class Job(NamedTuple):
    """A video and where its copy goes."""

    path: str
    target: str


@dataclass(frozen=True, kw_only=True)
class Rewritten:
    """A copy, or the ``reason`` why there is none; ``passing``: another try may well succeed."""

    frames: int | None = None
    width: int | None = None
    height: int | None = None
    reason: str | None = None
    passing: bool = False


def rewrite(source: Source, out: Path, limits: Limits, encoding: Encoding) -> dict[str, int]:
    """Write copies of all videos under ``out``, with a manifest that has their labels and a list of bad files.

    A second call writes only the copies of videos that are new, have changed, or took too long, and those that are
    missing. The originals are only read.

    Args:
        source: the videos; a copy has its video's path below ``source.base``, or below what all have in common.
        out: new, or that of an earlier call for the same source and encoding.
        limits: processes and seconds per video.
        encoding: of the copies.

    Returns:
        Counts: ``files``, ``copies`` and ``bad``.

    Raises:
        UserError: ``out`` is where the originals are, holds something else, can't be written, or the disk is full.
    """
    jobs_of = _jobs(source, out)
    _keep_apart(source, out)
    settings = {"command": "rewrite", "version": _VERSION, "source": source.name, "base": source.base}
    with WorkFolder(out, settings | asdict(encoding)) as folder:
        records = _records(jobs_of, folder, limits, encoding)
        folder.finish(records.values())
        copied = [entry for entry in source.entries if records[entry.path]["reason"] is None]
        # Relative paths: the copies can be moved with their manifest.
        names = [records[entry.path]["target"] for entry in copied]
        folder.write(MANIFEST, format_manifest([Entry(n, e.label) for n, e in zip(names, copied, strict=True)]))
        folder.write(BAD, format_bad(records.values()))
    bad = sum(record["reason"] is not None for record in records.values())
    return {"files": len(records), "copies": len(records) - bad, "bad": bad}


def _jobs(source: Source, out: Path) -> dict[str, Job]:
    """Return by path what is to be done, in the source's order."""
    paths = {path: _unpacked(path) for path in source.paths}
    base = source.base
    if not all(path.startswith(f"{base}/") for path in paths.values()):
        base = os.path.commonpath([os.path.dirname(path) for path in paths.values()])  # noqa: PTH120 - of text, as below
    names = {path: os.path.relpath(place, base) for path, place in paths.items()}
    shared = Counter(_renamed(name) for name in names.values())
    targets = {}
    for path, name in names.items():
        # a.avi beside a.mp4 becomes a.avi.mp4.
        alone = shared[_renamed(name)] == 1 or name == _renamed(name)
        targets[path] = str(out.absolute() / (_renamed(name) if alone else f"{name}.mp4"))
    twice = next((target for target, count in Counter(targets.values()).items() if count > 1), None)
    if twice is not None:
        raise UserError(f"SOURCE: two videos would both become {twice}; rename one of them")
    return {path: Job(path, target) for path, target in targets.items()}


def _unpacked(path: str) -> str:
    """Return where a video would lie if its shard were unpacked where it is."""
    if is_url(path):
        raise UserError(f"SOURCE: {path} is far away; rewrite reads files and shards of a file system")
    member = Member.named(path)
    return path if member is None else os.path.normpath(f"{os.path.splitext(member.shard)[0]}/{member.name}")  # noqa: PTH122


def _renamed(name: str) -> str:
    return f"{os.path.splitext(name)[0]}.mp4"  # noqa: PTH122 - of text


def _keep_apart(source: Source, out: Path) -> None:
    """Raise if copies would lie among the originals, or originals among the copies."""
    real = out.resolve()
    members = ((path, Member.named(path)) for path in source.paths)
    files = {path if member is None else member.shard for path, member in members}
    folders = {Path(folder).resolve() for folder in {os.path.dirname(file) for file in files}}  # noqa: PTH120
    if Path(source.name).is_dir():
        folders.add(Path(source.name).resolve())
    for folder in sorted(folders):
        if real == folder or folder in real.parents or real in folder.parents:
            raise UserError(
                f"--out: {out} and {folder}, which holds originals, lie in one another; name another folder"
            )


def _records(todo: dict[str, Job], folder: WorkFolder, limits: Limits, encoding: Encoding) -> dict[str, Record]:
    """Return the records of all videos, in the source's order."""
    status = {path: status_of(path) for path in todo}
    records = {}
    for path, job in todo.items():
        record = folder.unchanged(path, status[path])
        if record and record["target"] == _below(folder, job) and (record["reason"] or Path(job.target).is_file()):
            records[path] = record
    rest = [job for path, job in todo.items() if path not in records]
    with CountLine("videos rewritten", speaks=bool(rest)) as progress:
        encode = partial(rewrite_video, encoding=encoding)
        outcomes = jobs.run(encode, rest, workers=limits.workers, limit_s=limits.limit_s)
        for done, (job, result) in enumerate(outcomes, start=1):
            if isinstance(result, jobs.Lost):
                _unfinished(job).unlink(missing_ok=True)
            found = Rewritten(reason=result.reason, passing=True) if isinstance(result, jobs.Lost) else result
            facts = {"target": _below(folder, job), **asdict(found)}
            settled = not facts.pop("passing")
            records[job.path] = folder.add(job.path, status[job.path], settled=settled, **facts)
            progress(done, len(rest))
    return {path: records[path] for path in todo}


def _below(folder: WorkFolder, job: Job) -> str:
    return os.path.relpath(job.target, folder.path)


def rewrite_video(job: Job, encoding: Encoding) -> Rewritten:
    """Write the copy of a video, which appears under its name only when it is whole.

    Raises:
        UserError: the disk is full.
    """
    if not can_list(job.path):
        return Rewritten(reason=UNLISTABLE)
    try:
        _unfinished(job).parent.mkdir(parents=True, exist_ok=True)
        with opened(job.path) as video:
            done = _encode(job, video, encoding)
        _unfinished(job).replace(job.target)
        return done
    except DecodeError as error:
        return Rewritten(reason=error.reason, passing=error.passing)
    except Exception as error:
        if getattr(error, "errno", None) in _FULL:
            raise UserError(f"--out: no room left for {job.target}; the same command goes on from here") from error
        # Whatever a library makes of a strange file: the other files are still to be done.
        passing = isinstance(error, OSError) and not isinstance(error, av.FFmpegError)
        return Rewritten(reason=f"{type(error).__name__}: {one_line(error)}", passing=passing)
    finally:
        _unfinished(job).unlink(missing_ok=True)


def _unfinished(job: Job) -> Path:
    return Path(job.target + _UNFINISHED)


def _encode(job: Job, video: Video, encoding: Encoding) -> Rewritten:
    frames = video.frames()
    first = next(frames, None)
    if first is None:
        raise DecodeError(job.path, "holds no frame")
    width, height = shrunk(*_shown_size(first), encoding.short_side)
    rate = _rate(video)
    count = 0
    # The index first: a file that is read from afar says at once where its frames are.
    with av.open(str(_unfinished(job)), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=rate, options=encoding.options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.thread_count = 1
        for count, frame in enumerate(itertools.chain([first], frames), start=1):
            copy = _prepared(frame, width, height)
            if count == 1:
                context = stream.codec_context
                context.colorspace, context.color_range = copy.colorspace, ColorRange.MPEG
            copy.pts, copy.time_base = count - 1, 1 / rate
            container.mux(stream.encode(copy))
        container.mux(stream.encode(None))
    return Rewritten(frames=count, width=width, height=height)


def shrunk(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Return the size of a copy: in proportion, not enlarged, even (4:2:0 halves the colours' resolution)."""
    short = min(width, height)
    side = min(short, short_side)
    # Whole numbers throughout: a side of 256 stays 256.
    return max(2, width * side // short // 2 * 2), max(2, height * side // short // 2 * 2)


def _shown_size(frame: Any) -> tuple[int, int]:
    return (frame.height, frame.width) if orientation(frame).transposed else (frame.width, frame.height)


def _rate(video: Video) -> Fraction:
    rate = video.stream.average_rate
    # Some files claim the ticks of their clock.
    if not rate or not 0 < rate <= _HIGHEST_RATE:
        return Fraction(_USUAL_RATE)
    return rate.limit_denominator(1001) or rate  # a frame an hour is a rate, too


def _prepared(frame: Any, width: int, height: int) -> Any:
    """Return a frame upright, of the copy's size and format, and free of what the original's encoder decided."""
    if orientation(frame) != UPRIGHT:
        frame = av.VideoFrame.from_ndarray(upright(frame), format="rgb24")
    space = Colorspace.ITU601 if frame.colorspace == _RGB else frame.colorspace
    copy = frame.reformat(
        width,
        height,
        "yuv420p",
        dst_colorspace=space,
        interpolation="BICUBIC",
        src_color_range=frame.color_range,
        dst_color_range=ColorRange.MPEG,
        **ONE_THREAD,
    )
    # It would be encoded as the type that it had.
    copy.pict_type = PictureType.NONE
    return copy
