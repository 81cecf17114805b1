from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from video_files import OPEN_GOP, moving_frames, read_all, write_video

from everest_ds.data.manifest import Entry
from everest_ds.data.prepare import examine as module
from everest_ds.data.prepare.examine import WRONG_FRAMES, distance, examine, thumbnail


def test_a_good_file(videos: list[Entry]) -> None:
    found = examine(videos[11].path)
    assert (found.frames, found.width, found.height, found.codec) == (45, 64, 48, "h264")
    assert (found.duration_s, found.fps) == (45 / 25, 25)
    assert found.compared > 40
    assert found.reason is None


@pytest.mark.parametrize("count", [20, 60])
def test_open_groups_of_pictures_are_told(tmp_path: Path, count: int) -> None:
    found = examine(str(write_video(tmp_path / "open.mp4", moving_frames(count), **OPEN_GOP)))
    assert found.frames == count
    assert found.reason is not None
    assert found.reason.startswith(f"{WRONG_FRAMES}, ")
    # Groups of 12: three frames off.
    assert "asked for frame 9, it gives frame 12;" in found.reason or "frame 10, it gives frame 13;" in found.reason


@pytest.mark.parametrize("options", [{"g": "250", "flags": "-cgop"}, {"g": "1", "bf": "0"}])
def test_other_encodings_are_not_condemned(tmp_path: Path, options: dict[str, str]) -> None:
    assert examine(str(write_video(tmp_path / "a.mp4", moving_frames(70), **options))).reason is None


@pytest.mark.parametrize("count", [1, 2, 5])
def test_short_files(tmp_path: Path, count: int) -> None:
    found = examine(str(write_video(tmp_path / "a.mp4", moving_frames(count))))
    assert (found.frames, found.reason) == (count, None)


def test_a_file_whose_frames_never_change_is_good(tmp_path: Path) -> None:
    frames = np.broadcast_to(moving_frames(1), (60, 48, 64, 3))
    assert examine(str(write_video(tmp_path / "still.mp4", frames, **OPEN_GOP))).reason is None
    assert examine(str(write_video(tmp_path / "black.mp4", np.zeros_like(frames), **OPEN_GOP))).reason is None


def test_foreign_pictures_are_told(videos: list[Entry], monkeypatch: pytest.MonkeyPatch) -> None:
    other = read_all(Path(videos[3].path))
    monkeypatch.setattr(module, "decode", lambda path, choose, decoder: other[choose(34)])
    reason = examine(videos[0].path).reason
    assert reason is not None
    assert "it gives a picture that is not of this video" in reason


def test_brightness_and_contrast_are_no_difference(videos: list[Entry]) -> None:
    first, second = read_all(Path(videos[0].path))[:2]
    paler = (40 + first * 0.7).astype(np.uint8)
    assert distance(thumbnail(first), thumbnail(paler)) < 1
    assert distance(thumbnail(first), thumbnail(second)) > 10
    flat = thumbnail(np.zeros_like(first))
    assert distance(flat, flat) == 0
    assert distance(flat, thumbnail(first)) > 10


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "no such file or directory"),
        ("empty", "empty file"),
        ("folder", "not a file"),
        ("text", "not a video, or cut off"),
        ("cut", "not a video, or cut off"),
        ("audio", "holds no video"),
    ],
)
def test_bad_files(bad_files: dict[str, Path], kind: str, reason: str) -> None:
    found = examine(str(bad_files[kind]))
    assert found.reason == reason
    assert found.frames is None


def test_damage_is_told_though_the_header_is_whole(bad_files: dict[str, Path]) -> None:
    found = examine(str(bad_files["damaged"]))
    assert (found.codec, found.width) == ("h264", 64)
    assert found.reason


def test_damage_between_the_clips_is_found(bad_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    # As if random access met none of it.
    monkeypatch.setattr(module, "decode", lambda path, choose, decoder: np.zeros((len(choose(34)), 48, 64, 3), "u1"))
    reason = examine(str(bad_files["damaged"])).reason
    assert reason is not None
    assert "damaged after frame " in reason


def test_a_pipe_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    assert examine(str(tmp_path / "pipe.mp4")).reason == "not a file"


def test_what_a_library_makes_of_a_strange_file_is_its_reason(
    videos: list[Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    def strange(*_: object) -> None:
        raise ZeroDivisionError("half\na frame")

    monkeypatch.setattr(module, "decode", strange)
    assert examine(videos[0].path).reason == "ZeroDivisionError: half"
