"""Files that hold more than one video stream: covers, previews, stills."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from readers import decoders
from video_files import moving_frames, read_all, write_video

from everest_ds.data.decode import DecodeError, decode
from everest_ds.data.prepare.examine import examine
from everest_ds.data.prepare.rewrite import Encoding, Job, rewrite_video
from everest_ds.data.prepare.sequential import opened, upright

VIDEO = moving_frames(30)
COVER = moving_frames(1, 96, 96, seed=9)
# Of fewer bits, too, as previews are.
PREVIEW = np.broadcast_to(moving_frames(1, 24, 32, seed=5), (30, 24, 32, 3))
CRF = 10
# What encoding changes, colours at half the resolution; another frame is 40 away.
NOISE = 16


def add_pictures(container: av.container.OutputContainer, codec: str, frames: np.ndarray) -> Callable[[], None]:
    """Add a stream, and return what writes its frames."""
    stream = container.add_stream(codec, rate=25, options={"crf": str(CRF)} if codec == "libx264" else {})
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    # A number: PyAV 17.0 takes nothing else.
    stream.disposition = (Disposition.attached_pic if codec == "mjpeg" else Disposition.default).value

    def write() -> None:
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))

    return write


def add_sound(container: av.container.OutputContainer, codec: str) -> Callable[[], None]:
    stream = container.add_stream(codec, rate=48000)
    stream.layout = "mono"

    def write() -> None:
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 24000), np.float32), format="flt", layout="mono")
        silence.sample_rate, silence.pts = 48000, 0
        container.mux(stream.encode(silence))
        container.mux(stream.encode(None))

    return write


def write_streams(path: Path, *streams: tuple[str, np.ndarray | None]) -> Path:
    """Write streams by codec and frames; None: sound."""
    with av.open(str(path), "w") as container:
        parts = [
            add_sound(container, codec) if frames is None else add_pictures(container, codec, frames)
            for codec, frames in streams
        ]
        for write in parts:
            write()
    return path


def with_cover_first(path: Path) -> Path:
    """Bring the box that holds an mp4's cover before its tracks, as tagging programs leave it."""
    data = path.read_bytes()
    start = data.index(b"moov") - 4
    (size,) = struct.unpack_from(">I", data, start)
    children, place = [], start + 8
    while place < start + size:
        (length,) = struct.unpack_from(">I", data, place)
        children.append(data[place : place + length])
        place += length
    # The index comes last: no place in the file changes that it speaks of.
    children.sort(key=lambda box: box[4:8] != b"udta")
    path.write_bytes(data[: start + 8] + b"".join(children) + data[start + size :])
    return path


def first_of(path: Path) -> str:
    with av.open(str(path)) as container:
        return str(container.streams.video[0].codec_context.name)


def cover_first(folder: Path) -> Path:
    path = write_streams(folder / "cover.mp4", ("mjpeg", COVER), ("libx264", VIDEO))
    assert first_of(with_cover_first(path)) == "mjpeg"
    return path


def cover_last(folder: Path) -> Path:
    return write_streams(folder / "cover.mp4", ("libx264", VIDEO), ("mjpeg", COVER))


def still_first(folder: Path) -> Path:
    # Matroska keeps no mark that this is a cover.
    path = write_streams(folder / "still.mkv", ("mjpeg", COVER), ("libx264", VIDEO))
    assert first_of(path) == "mjpeg"
    return path


def preview_first(folder: Path) -> Path:
    return write_streams(folder / "preview.mp4", ("libx264", PREVIEW), ("libx264", VIDEO))


def preview_last(folder: Path) -> Path:
    return write_streams(folder / "preview.mov", ("libx264", VIDEO), ("libx264", PREVIEW), ("aac", None))


@pytest.mark.parametrize("write", [cover_first, cover_last, still_first, preview_first, preview_last])
class TestTheBestStreamIsTheVideo:
    @decoders
    def test_of_a_scan(self, tmp_path: Path, write: Callable[[Path], Path], decoder: str) -> None:
        path = write(tmp_path)
        found = examine(str(path), decoder)
        assert (found.codec, found.frames, found.height, found.width) == ("h264", 30, 48, 64)
        # A reader may not manage to open such a file: then a copy helps.
        refused = "torchcodec has no decoder for its codec"
        assert found.reason is None or (found.rewrite_helps and found.reason.startswith(refused))

    def test_of_a_copy(self, tmp_path: Path, write: Callable[[Path], Path]) -> None:
        copy = tmp_path / "copy.mp4"
        rewrite_video(Job(str(write(tmp_path)), str(copy)), Encoding())
        frames = read_all(copy)
        assert frames.shape == VIDEO.shape
        assert np.abs(frames.astype(int) - VIDEO).mean() < NOISE

    def test_of_training(self, tmp_path: Path, write: Callable[[Path], Path]) -> None:
        frames = decode(str(write(tmp_path)), range)
        assert frames.shape == VIDEO.shape
        assert np.abs(frames.astype(int) - VIDEO).mean() < NOISE


def test_a_cover_that_passes_for_the_best_stream(tmp_path: Path) -> None:
    """What speaks against the video: it is described for those who can't see it, and not played unasked."""
    path = tmp_path / "described.mp4"
    with av.open(str(path), "w") as container:
        parts = [add_pictures(container, "libx264", VIDEO), add_pictures(container, "mjpeg", COVER)]
        container.streams[0].disposition = Disposition.visual_impaired.value
        for write in parts:
            write()
    data = path.read_bytes()
    path.write_bytes(data.replace(b"tkhd\0\0\0\3", b"tkhd\0\0\0\2"))
    with av.open(str(path)) as container:
        assert container.streams.best("video").codec_context.name == "mjpeg"
    with opened(str(path)) as video:
        assert [upright(frame).shape for frame in video.frames()] == [(48, 64, 3)] * 30
    assert examine(str(path)).reason is None


@pytest.mark.parametrize(
    ("name", "sound"), [("song.flac", "flac"), ("song.mp3", "libmp3lame"), ("song.mp4", "aac"), ("cover.mp4", None)]
)
def test_a_cover_is_no_video(tmp_path: Path, name: str, sound: str | None) -> None:
    streams = [("mjpeg", COVER)] if sound is None else [(sound, None), ("mjpeg", COVER)]
    path = str(write_streams(tmp_path / name, *streams))
    reason = "holds a cover picture and no video"
    found = examine(path)
    assert (found.reason, found.rewrite_helps) == (reason, False)
    assert rewrite_video(Job(path, str(tmp_path / "copy.mp4")), Encoding()).reason == reason
    with pytest.raises(DecodeError, match=reason):
        decode(path, range)


def test_a_codec_that_nobody_knows(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", VIDEO)
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz"))
    reason = "holds a video whose codec FFmpeg does not know"
    assert examine(str(path)).reason == reason
    with pytest.raises(DecodeError, match=reason):
        decode(str(path), range)
