"""Files that are whole and that the training's reader refuses or misreads: the reason is in words, a copy helps."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from readers import decoders
from video_files import CLOSED_GROUPS, encode, moving_frames, read_all

from everest_ds.data.decode import NOT_A_VIDEO, REWRITE_IT, DecodeError, decode
from everest_ds.data.manifest import Entry
from everest_ds.data.prepare.examine import SAME_TIME, examine
from everest_ds.data.prepare.rewrite import Encoding, Job, rewrite_video

FRAMES = moving_frames(30)
NO_DURATION = "decord finds no duration in its header"


class Pipe(io.RawIOBase):
    """What a recorder writes into: it can't go back to the header when the duration is known."""

    def __init__(self) -> None:
        self.data = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:
        self.data += data
        return len(data)


def piped(path: Path, codec: str, container: str) -> Path:
    pipe = Pipe()
    with av.open(pipe, "w", format=container) as file:
        stream = file.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = *FRAMES.shape[1:3], "yuv420p"
        for frame in FRAMES:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode(None))
    path.write_bytes(pipe.data)
    return path


def write_av1(folder: Path) -> Path:
    return encode(folder / "av1.mp4", FRAMES, "libsvtav1", {"preset": "12", "svtav1-params": "lp=1"})


def write_recording(folder: Path) -> Path:
    return piped(folder / "recording.webm", "libvpx", "webm")


def write_piped(folder: Path) -> Path:
    return piped(folder / "piped.mkv", "libx264", "matroska")


def write_bare(folder: Path) -> Path:
    return encode(folder / "bare.h264", FRAMES, "libx264", {})


def write_broadcast(folder: Path) -> Path:
    return encode(folder / "broadcast.ts", FRAMES, "libx264", {})


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (write_av1, "decord has no decoder for its codec, av1"),
        (write_recording, NO_DURATION),
        (write_piped, NO_DURATION),
        (write_bare, NO_DURATION),
        (write_broadcast, "decord does not find its last frames"),
    ],
)
def test_a_reader_that_refuses(tmp_path: Path, write, reason: str) -> None:
    path = write(tmp_path)
    with pytest.raises(DecodeError) as caught:
        decode(str(path), range)
    assert caught.value.reason == f"{reason}; {REWRITE_IT}"
    found = examine(str(path))
    assert (found.reason, found.rewrite_helps, found.frames) == (caught.value.reason, True, len(FRAMES))
    copy = tmp_path / "copy.mp4"
    assert rewrite_video(Job(str(path), str(copy)), Encoding()).frames == len(FRAMES)
    found = examine(str(copy))
    assert (found.reason, found.rewrite_helps, found.frames) == (None, False, len(FRAMES))


@pytest.mark.parametrize(("said", "told"), [("no such thing", "no such thing"), (NOT_A_VIDEO, "decord can't open it")])
def test_whatever_a_reader_says_of_a_whole_file(
    videos: list[Entry], monkeypatch: pytest.MonkeyPatch, said: str, told: str
) -> None:
    def refused(path: str, *_: object) -> None:
        raise DecodeError(path, said)

    monkeypatch.setattr("everest_ds.data.prepare.examine.decode", refused)
    found = examine(videos[0].path)
    assert (found.reason, found.rewrite_helps) == (f"{told}; {REWRITE_IT}", True)


def test_a_title_in_another_encoding_is_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "titled.avi"
    with av.open(str(path), "w") as file:
        file.metadata["title"] = "Smorrebrod"
        stream = file.add_stream("mpeg4", rate=25, options={"qscale": "2"})
        stream.height, stream.width, stream.pix_fmt = *FRAMES.shape[1:3], "yuv420p"
        for frame in FRAMES:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode(None))
    path.write_bytes(path.read_bytes().replace(b"Smorrebrod", "Smørrebrød".encode("latin-1")))
    assert examine(str(path)).reason is None


@decoders
@pytest.mark.parametrize("container", ["mp4", "mkv"])
def test_frames_with_equal_times(tmp_path: Path, container: str, decoder: str) -> None:
    """Recorders that fall behind write them. Readers mix them up, and those next to them."""
    frames = moving_frames(60)
    path = tmp_path / f"equal.{container}"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=25, options=CLOSED_GROUPS | {"bf": "0"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        packets = [packet for frame in frames for packet in stream.encode(av.VideoFrame.from_ndarray(frame))]
        for number, packet in enumerate(packets + stream.encode(None)):
            packet.time_base = Fraction(1, 25)
            packet.dts = number
            # One of them late: so few that a sample can miss it.
            packet.pts = number + 1 if number == 30 else number + 2
            file.mux(packet)
    found = examine(str(path), decoder)
    assert (found.reason, found.frames) == (f"frames 29 and 30 {SAME_TIME}; {REWRITE_IT}", 60)
    assert found.rewrite_helps
    copy = tmp_path / "copy.mp4"
    rewrite_video(Job(str(path), str(copy)), Encoding())
    distance = np.abs(read_all(copy)[:, None].astype(int) - frames[None]).mean(axis=(2, 3, 4))
    assert distance.argmin(axis=1).tolist() == list(range(60))
    assert examine(str(copy), decoder).reason is None
