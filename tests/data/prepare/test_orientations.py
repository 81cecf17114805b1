"""Videos that are to be shown turned, mirrored or both: phones store them so, selfies above all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from readers import decoders
from video_files import ORIENTATIONS, encode, moving_frames, oriented, read_all, shown

from everest_ds.data.decode import REWRITE_IT, decode
from everest_ds.data.prepare.examine import WRONG_WAY, examine
from everest_ds.data.prepare.rewrite import Encoding, Job, rewrite_video
from everest_ds.data.prepare.sequential import opened, upright

FRAMES = 20
MIRRORED = ("mirrored", "upside down", "transposed", "transposed over the other diagonal")
# What two encodings of a frame differ by; another frame, or another orientation, is 40 away.
NOISE = 6
CODECS = {"mp4": ("libx264", {"crf": "10", "bf": "2"}), "mov": ("libx265", {"x265-params": "log-level=none:crf=10"})}

containers = pytest.mark.parametrize("container", list(CODECS))
orientations = pytest.mark.parametrize("orientation", list(ORIENTATIONS))


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A video per container, with nothing said of how to show it."""
    folder = tmp_path_factory.mktemp("stored")
    return {kind: encode(folder / f"stored.{kind}", moving_frames(FRAMES), *CODECS[kind]) for kind in CODECS}


@pytest.fixture
def video(stored: dict[str, Path], tmp_path: Path, container: str, orientation: str) -> Path:
    return oriented(tmp_path / f"video.{container}", stored[container], orientation)


@pytest.fixture
def truth(stored: dict[str, Path], container: str, orientation: str) -> np.ndarray:
    return shown(read_all(stored[container]), orientation)


def difference(frames: np.ndarray, truth: np.ndarray) -> float:
    assert frames.shape == truth.shape
    return float(np.abs(frames.astype(int) - truth).mean())


@containers
@orientations
def test_frames_from_the_start_are_as_a_player_shows_them(video: Path, truth: np.ndarray) -> None:
    with opened(str(video)) as file:
        assert np.array_equal(np.stack([upright(frame) for frame in file.frames()]), truth)


@decoders
@containers
@orientations
def test_a_scan_names_what_the_reader_gets_wrong(
    video: Path, truth: np.ndarray, orientation: str, decoder: str
) -> None:
    found = examine(str(video), decoder)
    given = decode(str(video), range, decoder)
    right = given.shape == truth.shape and difference(given, truth) < NOISE
    # The libraries turn; whether a later one mirrors, too, is no matter.
    assert right or orientation in MIRRORED
    assert found.reason == (None if right else f"{decoder} gives it {WRONG_WAY}; {REWRITE_IT}")
    assert found.rewrite_helps != right
    assert (found.frames, found.height, found.width) == (FRAMES, *truth.shape[1:3])


@decoders
@containers
@orientations
def test_a_copy_is_upright(video: Path, truth: np.ndarray, decoder: str) -> None:
    copy = video.with_name("copy.mp4")
    assert rewrite_video(Job(str(video), str(copy)), Encoding()).reason is None
    assert difference(decode(str(copy), range, decoder), truth) < NOISE
    # As it is stored, so that nothing is left to turn.
    assert difference(read_all(copy), truth) < NOISE
    assert examine(str(copy), decoder).reason is None


def test_a_video_that_hardly_differs_from_its_mirror_image(tmp_path: Path) -> None:
    pale = (128 + (moving_frames(FRAMES).astype(int) - 128) // 12).astype(np.uint8)
    path = encode(tmp_path / "pale.mp4", pale, *CODECS["mp4"])
    assert examine(str(path)).reason is None
    mirrored = examine(str(oriented(tmp_path / "mirrored.mp4", path, "mirrored")))
    assert mirrored.reason is not None
    assert WRONG_WAY in mirrored.reason
