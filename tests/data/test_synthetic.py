from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from video_files import read_all

from everest_ds.config.errors import UserError
from everest_ds.config.schema import DataConfig
from everest_ds.data import synthetic
from everest_ds.data.dataset import ClipDataset
from everest_ds.data.decode import decode
from everest_ds.data.manifest import read_manifest
from everest_ds.data.synthetic import DIRECTIONS, main, render_motion, write_motion_videos


def estimate_direction(video: np.ndarray) -> int:
    """Return the direction in which whatever isn't still moves, by correlating neighbouring frames on the torus."""
    moving = video.astype(np.float64) - np.median(video, axis=0)
    moving[np.abs(moving) < 60] = 0  # noise and shake
    spectrum = np.fft.fft2(moving)
    correlation = np.fft.ifft2(spectrum[1:] * spectrum[:-1].conj()).real.sum(axis=0)
    angles = np.arange(DIRECTIONS) * math.tau / DIRECTIONS
    shifts = 3 * np.stack([np.sin(angles), np.cos(angles)], axis=1)
    near = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    rows, columns = np.rint(shifts).astype(int).T
    return int(np.argmax(sum(correlation[rows + y, columns + x] for y, x in near)))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_motion_videos(tmp_path_factory.mktemp("synthetic") / "train", 24, seed=1)


def test_the_manifest_lists_decodable_videos(manifest: Path) -> None:
    entries = read_manifest(manifest)
    assert [entry.label for entry in entries] == [i % DIRECTIONS for i in range(24)]
    assert all(entry.path.startswith(str(manifest.parent / "train")) for entry in entries)
    for i, entry in enumerate(entries):
        drawn, _ = render_motion(1, i)
        read = decode(entry.path, range)
        assert read.shape == (20, 48, 48, 3)
        for frames in (read, read_all(Path(entry.path))):
            # Grey to 4:2:0 and back, compressed: right to a few levels.
            assert np.abs(frames.astype(int) - drawn[..., None]).mean() < 2.5
    assert not list(manifest.parent.glob("train/*.unfinished"))


def test_the_label_is_the_motion_seen_in_the_files(manifest: Path) -> None:
    entries = read_manifest(manifest)
    videos = [decode(entry.path, range)[..., 0] for entry in entries]
    right = [estimate_direction(video) == entry.label for video, entry in zip(videos, entries, strict=True)]
    assert sum(right) >= 22


def test_no_single_frame_gives_the_label_away_but_two_do() -> None:
    def share_right(video_features: np.ndarray, labels: np.ndarray) -> float:
        """Return the accuracy of ridge regression on the second half, fitted on the first."""
        half = len(labels) // 2
        features = video_features - video_features[:half].mean(axis=0)
        gram = features[:half] @ features[:half].T
        weights = np.linalg.solve(gram + 0.1 * np.trace(gram) / half * np.eye(half), np.eye(DIRECTIONS)[labels[:half]])
        return float((np.argmax(features[half:] @ features[:half].T @ weights, axis=1) == labels[half:]).mean())

    rendered = [render_motion(2, i, frames=8) for i in range(1600)]
    videos, labels = np.stack([video for video, _ in rendered]).astype(np.float64), np.array([n for _, n in rendered])
    frame = videos[:, 4].reshape(len(videos), -1)
    # A frame's brightness, spectrum and pixels; the spectrum doesn't depend on where the sprites are.
    spectrum = np.abs(np.fft.rfft2(videos[:, 4])).reshape(len(videos), -1)
    chance, error = 1 / DIRECTIONS, math.sqrt(1 / DIRECTIONS * (1 - 1 / DIRECTIONS) / 800)
    assert share_right(frame, labels) < chance + 4 * error
    assert share_right(spectrum, labels) < chance + 4 * error
    # The same reader on the correlation of two frames: the features, not the reader, are what failed above.
    spectra = np.fft.fft2(videos[:, 3:5] - videos[:, 3:5].mean(axis=(2, 3), keepdims=True))
    correlation = np.fft.ifft2(spectra[:, 1] * spectra[:, 0].conj()).real
    middle = np.roll(correlation, (6, 6), axis=(1, 2))[:, :13, :13].reshape(len(videos), -1)
    assert share_right(middle, labels) > 0.5


def test_a_clip_is_a_function_of_seed_and_index() -> None:
    video, label = render_motion(3, 11)
    assert label == 3
    assert np.array_equal(video, render_motion(3, 11)[0])
    assert not np.array_equal(video, render_motion(4, 11)[0])
    assert not np.array_equal(video, render_motion(3, 12)[0])


def test_the_picture_is_as_described() -> None:
    video, _ = render_motion(0, 0, size=64, frames=100)
    assert video.shape == (100, 64, 64)
    assert video.dtype == np.uint8
    bright = video > 140
    # 3 to 5 sprites of 64 pixels, which may overlap.
    assert (bright.sum(axis=(1, 2)) <= 5 * 64).all()
    assert (bright.sum(axis=(1, 2)) >= 2 * 64).all()
    assert 66 < video[~bright].mean() < 74
    assert video.max() < 250


def test_a_quarter_of_the_frames_is_shaken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "_NOISE_SIGMA", 0.0)
    video, _ = render_motion(0, 0, size=64, frames=200)
    still = np.median(video, axis=0)
    # Without noise a frame that did not move shows the very same background.
    shaken = np.mean([(frame != still)[still < 110].mean() > 0.5 for frame in video])
    assert 0.15 < shaken < 0.35


def test_a_crop_of_a_video_with_a_margin_is_the_same_world_shifted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "_NOISE_SIGMA", 0.0)
    world, label = render_motion(5, 3)
    wide, same = render_motion(5, 3, margin=8)
    assert (wide.shape, same) == ((20, 64, 64), label)
    assert np.array_equal(wide[:, 8:56, 8:56], world)
    assert np.array_equal(wide[:, :48, 12:60], np.roll(world, (8, -4), axis=(1, 2)))


def test_first_index_names_and_draws_other_videos(tmp_path: Path) -> None:
    path = write_motion_videos(tmp_path / "more", 3, seed=1, first_index=21, frames=16, size=32)
    assert path.read_text().splitlines() == ["path,label", *(f"more/{i:07d}.mp4,{i % 8}" for i in (21, 22, 23))]
    drawn, _ = render_motion(1, 22, frames=16, size=32)
    assert np.abs(read_all(tmp_path / "more/0000022.mp4").astype(int) - drawn[..., None]).mean() < 2.5


def test_workers_write_the_same_set(tmp_path: Path) -> None:
    one, two = (write_motion_videos(tmp_path / str(n) / "v", 4, seed=1, workers=n) for n in (1, 2))
    assert one.read_text() == two.read_text()
    for entry, other in zip(read_manifest(one), read_manifest(two), strict=True):
        assert np.abs(read_all(Path(entry.path)).astype(int) - read_all(Path(other.path))).mean() < 2


def test_the_dataset_reads_it(manifest: Path) -> None:
    data = DataConfig(stride=1, flip=False, crop_scales=(1.0,))
    dataset = ClipDataset(read_manifest(manifest), data, frames=16, image_size=48, tokens=288, seed=0)
    sample = dataset[0, 5]
    assert sample.clips.shape == (1, 3, 16, 48, 48)
    assert estimate_direction(sample.clips[0, 0].numpy()) == sample.label == 5


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"size": 47}, "size: must be even and at least 16 pixels, got 47"),
        ({"size": 8}, "size: must be even"),
        ({"count": 0}, "count: must be positive, got 0"),
        ({"frames": 0}, "frames: must be positive, got 0"),
        ({"seed": -1}, "seed: must not be negative"),
        ({"margin": -1}, "margin: must not be negative"),
    ],
)
def test_mistakes(tmp_path: Path, settings: dict[str, int], words: str) -> None:
    with pytest.raises(UserError, match=words):
        write_motion_videos(tmp_path / "v", **{"count": 2, "seed": 0, **settings})
    assert not (tmp_path / "v").exists()


class TestCommand:
    def test_writes_reuses_and_refuses(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "set"
        arguments = [str(out), "--train", "3", "--val", "2"]
        main(arguments)
        assert "train: 3 of 3 videos" in capsys.readouterr().err
        train, val = read_manifest(out / "train.csv"), read_manifest(out / "val.csv")
        assert (len(train), len(val)) == (3, 2)
        assert len({Path(entry.path).read_bytes() for entry in (*train, *val)}) == 5
        written = Path(train[0].path).stat().st_mtime_ns

        main(arguments)
        assert "already holds this set" in capsys.readouterr().err
        assert Path(train[0].path).stat().st_mtime_ns == written

        with pytest.raises(SystemExit) as caught:
            main([*arguments, "--seed", "7"])
        assert caught.value.code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"{out} holds a different set (seed 0 not 7)" in error
        assert Path(train[0].path).stat().st_mtime_ns == written

    def test_an_unfinished_set_is_finished(self, tmp_path: Path) -> None:
        arguments = [str(tmp_path / "set"), "--train", "3", "--val", "2"]
        main(arguments)
        (tmp_path / "set/val/1000001.mp4").unlink()
        (tmp_path / "set/train.csv").unlink()
        main(arguments)
        assert len(read_all(tmp_path / "set/val/1000001.mp4")) == 20
        assert len(read_manifest(tmp_path / "set/train.csv")) == 3

    def test_training_videos_alone_have_a_margin(self, tmp_path: Path) -> None:
        main([str(tmp_path / "set"), "--train", "1", "--val", "1", "--margin", "4"])
        shapes = [read_all(tmp_path / f"set/{name}.mp4").shape for name in ("train/0000000", "val/1000000")]
        assert shapes == [(20, 56, 56, 3), (20, 48, 48, 3)]

    def test_a_folder_with_other_things_is_left_alone(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "thesis.tex").write_text("dear reader")
        with pytest.raises(SystemExit) as caught:
            main([str(tmp_path), "--train", "1", "--val", "1"])
        assert caught.value.code == 2
        assert "is not empty and holds no synthetic set" in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]

    @pytest.mark.parametrize("record", ["{", "7", '{"train": 1}', "null"])
    def test_a_strange_record_is_refused(self, tmp_path: Path, record: str, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "synthetic.json").write_text(record)
        with pytest.raises(SystemExit) as caught:
            main([str(tmp_path), "--train", "1", "--val", "1"])
        assert caught.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
        assert [path.name for path in tmp_path.iterdir()] == ["synthetic.json"]

    def test_a_mistake_leaves_nothing_behind(self, tmp_path: Path) -> None:
        with pytest.raises(SystemExit) as caught:
            main([str(tmp_path / "set"), "--train", "1", "--val", "0"])
        assert caught.value.code == 2
        assert not (tmp_path / "set").exists()

    def test_as_a_command_it_needs_no_torch(self, tmp_path: Path) -> None:
        code = (
            "import sys, runpy; sys.argv[1:] = [sys.argv[1], '--train', '1', '--val', '1']\n"
            "runpy.run_module('everest_ds.data.synthetic', run_name='__main__'); print('torch' in sys.modules)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, tmp_path / "set"], capture_output=True, text=True, check=True
        )
        assert done.stdout == "False\n"
        assert done.stderr.splitlines() == ["train: 1 of 1 videos", "val: 1 of 1 videos"]
