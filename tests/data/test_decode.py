from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from readers import decoders
from video_files import moving_frames, read_all, write_video

from everest_ds.config.errors import UserError
from everest_ds.data import decode as module
from everest_ds.data.decode import DecodeError, decode, one_line, require_decoder
from everest_ds.data.manifest import Entry


def nearest(frames: np.ndarray, truth: np.ndarray) -> tuple[list[int], float]:
    """Return for each frame the most similar one of ``truth``, and the largest of the mean differences to those."""
    distance = np.abs(frames[:, None].astype(np.int16) - truth[None]).mean(axis=(2, 3, 4))
    return distance.argmin(axis=1).tolist(), float(distance.min(axis=1).max())


@decoders
@pytest.mark.parametrize("ids", [list(range(45)), [0, 4, 8, 44, 44], [30, 2, 30, 17, 3], [44], [13, 12, 11]])
def test_frames_are_those_of_a_sequential_decode(videos: list[Entry], decoder: str, ids: list[int]) -> None:
    path = videos[11].path
    frames = decode(path, lambda length: ids if length == 45 else [], decoder)
    assert frames.dtype == np.uint8
    assert frames.shape == (len(ids), 48, 64, 3)
    found, difference = nearest(frames, read_all(Path(path)))
    assert found == ids
    assert difference < 2


@decoders
def test_channels_are_red_green_blue(tmp_path: Path, decoder: str) -> None:
    colour = np.array([200, 40, 90], dtype=np.uint8)
    path = write_video(tmp_path / "red.mp4", np.broadcast_to(colour, (5, 32, 32, 3)))
    frames = decode(str(path), range, decoder)
    assert np.abs(frames.astype(int) - colour).max() <= 4


@decoders
@pytest.mark.parametrize("width", [16, 24, 40, 48, 56, 72, 80])
def test_widths_that_decord_trips_over(tmp_path: Path, decoder: str, width: int) -> None:
    path = write_video(tmp_path / "narrow.mp4", moving_frames(30, height=32, width=width))
    ids = [20, 3, 5, 21, 3]
    frames = decode(str(path), lambda _: ids, decoder)
    assert frames.shape == (5, 32, width, 3)
    assert np.abs(frames.astype(int) - read_all(path)[ids]).mean() < 2


@decoders
def test_one_frame(tmp_path: Path, decoder: str) -> None:
    path = write_video(tmp_path / "one.mp4", moving_frames(1))
    assert decode(str(path), lambda length: [length - 1] * 3, decoder).shape == (3, 48, 64, 3)


@decoders
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "no such file or directory"),
        ("empty", "empty file"),
        ("folder", "not a file"),
        ("text", None),
        ("cut", None),
        ("audio", None),
        ("damaged", None),
    ],
)
def test_bad_files_are_reported_in_one_line(
    bad_files: dict[str, Path], decoder: str, kind: str, reason: str | None
) -> None:
    path = str(bad_files[kind])
    with pytest.raises(DecodeError) as caught:
        decode(path, range, decoder)
    assert caught.value.path == path
    assert caught.value.reason == reason or reason is None
    assert 5 < len(caught.value.reason) <= 200
    assert "\n" not in caught.value.reason
    assert str(caught.value) == f"{path}: {caught.value.reason}"


def test_reasons_of_decord_are_readable(bad_files: dict[str, Path]) -> None:
    reasons = {}
    for kind in ("text", "cut", "audio", "damaged"):
        with pytest.raises(DecodeError) as caught:
            decode(str(bad_files[kind]), range)
        reasons[kind] = caught.value.reason
    assert reasons["text"] == reasons["cut"] == "not a video, or cut off"
    assert reasons["audio"] == "holds no video"
    assert not any("/src/" in reason or "Check failed" in reason for reason in reasons.values())


def test_a_mistake_in_choosing_is_not_the_files_fault(videos: list[Entry]) -> None:
    def choose(length: int) -> list[int]:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        decode(videos[0].path, choose)


def test_the_error_survives_the_way_out_of_a_worker() -> None:
    error = pickle.loads(pickle.dumps(DecodeError("a.mp4", "gone")))
    assert (error.path, error.reason, str(error)) == ("a.mp4", "gone", "a.mp4: gone")


def test_long_messages_are_cut() -> None:
    assert (
        one_line(RuntimeError("\n\n[06:37:42] /g/a.cc:292: [06:37:42] /g/b.cc:2: because\nStack trace:\n")) == "because"
    )
    assert one_line(RuntimeError("decode_av_frame, /x/Y.cpp:14, Could not push")) == "Could not push"
    assert one_line(RuntimeError("x" * 1000)) == "x" * 197 + "..."
    assert one_line(AssertionError()) == "AssertionError"


def test_unknown_and_missing_decoders(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="unknown decoder 'pyav'; one of decord, torchcodec"):
        require_decoder("pyav")
    module._torchcodec.cache_clear()
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(UserError, match=r"torchcodec is not installed; pip install 'everest_ds\[torchcodec\]'"):
        require_decoder("torchcodec")


def test_a_library_that_does_not_load_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise RuntimeError("\nCould not load libtorchcodec. Likely causes:\n1. FFmpeg ...")

    module._torchcodec.cache_clear()
    monkeypatch.setattr(module.importlib, "import_module", broken)
    with pytest.raises(UserError, match="torchcodec does not load: Could not load libtorchcodec"):
        require_decoder("torchcodec")


def test_ffmpeg_is_quiet_about_damage(bad_files: dict[str, Path]) -> None:
    code = (
        "import sys; from everest_ds.data.decode import decode, DecodeError\n"
        "try: decode(sys.argv[1], range)\n"
        "except DecodeError: print('reported')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, bad_files["damaged"]], capture_output=True, text=True, check=True
    )
    assert done.stdout == "reported\n"
    assert "NAL" not in done.stderr
