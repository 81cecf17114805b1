"""The data benchmark: its baseline reads the same clips, its table says what was measured. Times are not looked at."""

from pathlib import Path

import av
import pytest
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.transforms.v2.functional import normalize

from everest_ds.benchmarks import data
from everest_ds.benchmarks.data import REFERENCE, Settings
from everest_ds.benchmarks.data_report import report
from everest_ds.benchmarks.footage import FRAMES, HEIGHT, WIDTH, write_footage
from everest_ds.benchmarks.reference_data import read_clip
from everest_ds.config.errors import UserError
from everest_ds.config.schema import DataConfig
from everest_ds.data.dataset import ClipDataset
from everest_ds.data.manifest import Entry, format_manifest, read_manifest
from everest_ds.data.randomness import Stream, generator

FRAMES_READ, SIZE = 16, 32


@pytest.fixture(scope="module")
def some_videos(motion_videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of four of the motion videos."""
    paths = [entry.path for entry in read_manifest(motion_videos)[:4]]
    manifest = tmp_path_factory.mktemp("some") / "videos.csv"
    manifest.write_text(format_manifest([Entry(path, None) for path in paths]))
    return manifest


def test_the_baseline_reads_the_clips_that_we_read(some_videos: Path):
    entries, config = read_manifest(some_videos), DataConfig(workers=0, stride=1)
    dataset = ClipDataset(entries, config, frames=FRAMES_READ, image_size=SIZE, tokens=0, seed=0)
    for video, entry in enumerate(entries):
        rng = generator(Stream.VIEW, 0, 1, video, 0)
        theirs = read_clip(entry.path, config, frames=FRAMES_READ, image_size=SIZE, rng=rng)
        frames = dataset[1, video].clips[0].transpose(0, 1)
        ours = normalize(frames / 255, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD).transpose(0, 1)
        assert theirs.shape == ours.shape == (3, FRAMES_READ, SIZE, SIZE)
        # Two resamplers of the same rule: they differ by rounding.
        assert (theirs - ours).abs().mean() < 0.02


@pytest.fixture(scope="module")
def result(some_videos: Path, tmp_path_factory: pytest.TempPathFactory) -> data.Result:
    threads = torch.get_num_threads()
    settings = Settings(folder=tmp_path_factory.mktemp("data"), manifest=some_videos, views=2, pairs=2)
    try:
        return data.measure(settings, lambda line: None)
    finally:
        torch.set_num_threads(threads)


def test_every_form_is_read_and_compared(result: data.Result):
    assert [row.form for row in result.rows] == [
        REFERENCE,
        "originals",
        "originals, 2 clips a file",
        "prepared",
        "prepared, 2 clips a file",
        "prepared, in shards, 2 clips a file",
    ]
    assert [ratio.denominator for ratio in result.ratios].count(REFERENCE) == 5
    assert all(row.clips_per_s.least > 0 for row in result.rows)
    assert all(row.decode_ms > 0 and row.transform_ms > 0 for row in result.rows[1:])


def test_ratios_are_taken_round_by_round(result: data.Result):
    ours, baseline = result.rows[1].clips_per_s, result.rows[0].clips_per_s
    spread = result.ratios[0].spread
    assert ours.least / baseline.most <= spread.least <= spread.most <= ours.most / baseline.least


def test_the_report_lists_rows_and_ratios(result: data.Result):
    text = "\n".join(report(result, command="c"))
    for row in result.rows:
        assert f"| {row.form} | {row.clips_per_s:.1f} |" in text
    for ratio in result.ratios:
        assert f"| {ratio.numerator} / {ratio.denominator} | {ratio.spread:.2f} |" in text


@pytest.mark.parametrize("key", ["videos", "views", "pairs"])
def test_mistakes(tmp_path: Path, key: str):
    with pytest.raises(UserError, match=f"--{key}: must be positive"):
        Settings(folder=tmp_path, **{key: 0})


def test_videos_that_can_not_be_read(some_videos: Path, tmp_path: Path):
    bad = tmp_path / "set" / "bad.mp4"
    bad.parent.mkdir()
    bad.write_bytes(b"no video")
    manifest = tmp_path / "videos.csv"
    good = [entry.path for entry in read_manifest(some_videos)]
    manifest.write_text(format_manifest([Entry(path, None) for path in [*good, str(bad)]]))
    with pytest.raises(UserError, match="--manifest: 1 of 5 videos can't be read"):
        data.storage(Settings(folder=tmp_path / "out", manifest=manifest), lambda line: None)


def test_footage_is_like_a_cameras(tmp_path: Path):
    (entry,) = write_footage(tmp_path, 1)
    with av.open(entry.path) as video:
        stream = video.streams.video[0]
        assert (stream.height, stream.width, stream.frames) == (HEIGHT, WIDTH, FRAMES)
        packets = [packet for packet in video.demux(stream) if packet.size]
    assert sum(packet.is_keyframe for packet in packets) <= 3
    assert [p.pts for p in packets] != sorted(p.pts for p in packets)  # B-frames
    written = Path(entry.path).stat().st_mtime_ns
    assert write_footage(tmp_path, 1) == [Entry(entry.path, None)]
    assert Path(entry.path).stat().st_mtime_ns == written
    with pytest.raises(UserError, match=r"--videos: .* holds 1 videos, not 2"):
        write_footage(tmp_path, 2)
    with pytest.raises(UserError, match="--folder: cannot write to"):
        write_footage(Path(entry.path) / "in a file", 1)
