from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from video_files import moving_frames, read_all, write_video

from everest_ds.config.errors import UserError
from everest_ds.config.finetuning import AugmentConfig
from everest_ds.config.schema import DataConfig
from everest_ds.data import dataset as module
from everest_ds.data.augment import ClipAugment
from everest_ds.data.dataset import MAX_ATTEMPTS, ClipDataset, Sample
from everest_ds.data.decode import DecodeError
from everest_ds.data.manifest import Entry


def make(entries: Sequence[Entry], seed: int = 0, data: dict[str, Any] | None = None, **settings: Any) -> ClipDataset:
    shape = {"frames": 8, "image_size": 32, "tokens": 64}
    return ClipDataset(entries, DataConfig(**{"stride": 2, **(data or {})}), **{**shape, **settings}, seed=seed)


def same(a: Sample, b: Sample) -> bool:
    return torch.equal(a.clips, b.clips) and torch.equal(a.noise, b.noise) and (a.label, a.index) == (b.label, b.index)


def test_a_sample(videos: list[Entry]) -> None:
    sample = make(videos)[0, 3]
    assert sample.clips.shape == (1, 3, 8, 32, 32)
    assert sample.clips.dtype == torch.uint8
    assert sample.clips.is_contiguous()
    assert sample.noise.shape == (1, 64)
    assert sample.noise.dtype == torch.float32
    assert sample.noise.min() >= 0
    assert sample.noise.max() < 1
    assert sample.noise.unique().numel() == 64
    assert (sample.label, sample.index, sample.bad) == (3, 3, [])


def test_a_sample_is_a_function_of_seed_epoch_index_and_view(videos: list[Entry]) -> None:
    first, again = make(videos, data={"clips_per_video": 2}), make(videos, data={"clips_per_video": 2})
    keys = [(0, 0), (0, 1), (1, 0), (5, 7)]
    samples = [first[key] for key in keys]
    np.random.seed(1)
    torch.manual_seed(1)
    assert all(same(sample, again[key]) for key, sample in reversed(list(zip(keys, samples, strict=True))))
    other_seed = make(videos, seed=1, data={"clips_per_video": 2})[0, 0]
    # Everything drawn differs: views of one sample, epochs, videos, seeds.
    everything = [view for sample in (*samples, other_seed) for view in zip(sample.clips, sample.noise, strict=True)]
    for i, (clip, noise) in enumerate(everything):
        for other_clip, other_noise in everything[:i]:
            assert not torch.equal(noise, other_noise)
            assert not torch.equal(clip, other_clip)


def test_noise_does_not_depend_on_what_was_read(videos: list[Entry], tmp_path: Path) -> None:
    other = [Entry(str(tmp_path / "missing.mp4"), 0), *videos[1:]]
    assert torch.equal(make(videos)[2, 0].noise, make(other)[2, 0].noise)


def test_more_views_leave_the_first_as_it_was(videos: list[Entry]) -> None:
    one, three = make(videos), make(videos, data={"clips_per_video": 3})
    assert three[0, 4].clips.shape == (3, 3, 8, 32, 32)
    assert torch.equal(one[0, 4].clips[0], three[0, 4].clips[0])
    assert torch.equal(one[0, 4].noise[0], three[0, 4].noise[0])


def test_all_views_come_from_one_opened_file(videos: list[Entry], monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def counting(path: str, *rest: Any) -> np.ndarray:
        opened.append(path)
        return real(path, *rest)

    real = module.decode
    monkeypatch.setattr(module, "decode", counting)
    make(videos, data={"clips_per_video": 4})[0, 2]
    assert opened == [videos[2].path]


def test_without_augmentation_the_centre_is_taken(videos: list[Entry]) -> None:
    dataset = make(videos, data={"clips_per_video": 2}, augment=False, image_size=48)
    clips = dataset[0, 0].clips  # 34 frames: starts 0 ... 18
    truth = torch.from_numpy(read_all(Path(videos[0].path))).permute(3, 0, 1, 2)[..., 8:56]
    for clip, start in zip(clips, (0, 18), strict=True):
        assert (clip.float() - truth[:, start : start + 16 : 2].float()).abs().mean() < 2
    assert same(dataset[0, 0], dataset[3, 0]) is False  # noise is still drawn by epoch
    assert torch.equal(dataset[0, 0].clips, dataset[3, 0].clips)


def truth_of(video: Entry) -> torch.Tensor:
    """Return all frames as a float clip (3, T, H, W)."""
    return torch.from_numpy(read_all(Path(video.path))).permute(3, 0, 1, 2).float()


def shown(clip: torch.Tensor, truth: torch.Tensor) -> list[int]:
    """Return for each frame of a clip (3, T, 48, 48) the frame of the video (3, L, 48, 64) whose centre is like it."""
    differences = (clip.float()[:, :, None] - truth[:, None, ..., 8:56]).abs().mean(dim=(0, 3, 4))
    assert differences.min(dim=1).values.max() < 2
    return differences.argmin(dim=1).tolist()


def test_segments_span_the_whole_video(videos: list[Entry]) -> None:
    dataset = make(videos, data={"sampling": "segments", "clips_per_video": 2}, augment=False, image_size=48)
    truth = truth_of(videos[6])  # 40 frames: parts of 5
    first, second = dataset[0, 6].clips
    assert shown(first, truth) == [1, 6, 11, 16, 21, 26, 31, 36]
    assert shown(second, truth) == [3, 8, 13, 18, 23, 28, 33, 38]
    data = {"sampling": "segments", "flip": False, "crop": "resized", "crop_area": (0.75, 0.75)}
    random = make(videos, data=data, image_size=48)
    assert not torch.equal(random[0, 6].clips, random[1, 6].clips)
    assert random[0, 6].clips.shape == (1, 3, 8, 48, 48)


def test_segments_of_a_video_with_fewer_frames(tmp_path: Path) -> None:
    path = write_video(tmp_path / "four.mp4", moving_frames(4))
    entries = [Entry(str(path), 0)]
    clip = ClipDataset.for_evaluation(entries, DataConfig(sampling="segments"), frames=8, image_size=48)[0, 0].clips[0]
    assert shown(clip, truth_of(entries[0])) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_resized_crop_is_cut(videos: list[Entry]) -> None:
    data = {"crop": "resized", "crop_area": (0.1, 0.9)}
    first, again, multiscale = make(videos, data=data)[2, 3], make(videos, data=data)[2, 3], make(videos)[2, 3]
    assert first.clips.shape == (1, 3, 8, 32, 32)
    assert same(first, again)
    assert torch.equal(first.noise, multiscale.noise)
    assert not torch.equal(first.clips, multiscale.clips)


class TestTransform:
    def test_it_is_given_every_clip_and_a_generator_of_its_own(self, videos: list[Entry]) -> None:
        seen = []

        def transform(clip: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
            seen.append((clip, tuple(rng.integers(2**63, size=2))))
            return 255 - clip

        plain = make(videos, data={"clips_per_video": 2})
        transformed = make(videos, data={"clips_per_video": 2}, transform=transform)
        for key in ((0, 4), (1, 4), (0, 5)):
            sample = transformed[key]
            assert torch.equal(255 - sample.clips, plain[key].clips)
            assert torch.equal(sample.noise, plain[key].noise)
        draws = [draw for _, draw in seen]
        assert len(draws) == len(set(draws)) == 6
        assert {(clip.shape, clip.dtype) for clip, _ in seen} == {((3, 8, 32, 32), torch.uint8)}
        transformed[0, 4]
        assert [draw for _, draw in seen[6:]] == draws[:2]

    def test_it_is_not_for_evaluation(self, videos: list[Entry]) -> None:
        plain = make(videos, augment=False)
        assert same(make(videos, augment=False, transform=lambda *_: torch.zeros(0))[0, 3], plain[0, 3])


class TestEvaluation:
    def make(self, entries: Sequence[Entry], data: DataConfig | None = None, **views: int) -> ClipDataset:
        return ClipDataset.for_evaluation(entries, data or DataConfig(stride=2), frames=8, image_size=48, **views)

    def test_views_are_ordered_clip_by_clip(self, videos: list[Entry]) -> None:
        dataset = self.make(videos, clips=2, crops=3)
        sample = dataset[0, 0]
        truth = truth_of(videos[0])  # 34 frames, 48 x 64: starts 0 ... 18
        expected = [(start, left) for start in (0, 18) for left in (0, 8, 16)]
        assert dataset.views == len(sample.clips) == 6
        for clip, (start, left) in zip(sample.clips, expected, strict=True):
            assert (clip.float() - truth[:, start : start + 16 : 2, :, left : left + 48]).abs().mean() < 2
        assert sample.noise.shape == (6, 0)
        assert (sample.label, sample.index, sample.bad) == (0, 0, [])

    def test_one_view_is_the_centre_of_the_middle(self, videos: list[Entry]) -> None:
        sample = self.make(videos)[0, 0]
        assert sample.clips.shape == (1, 3, 8, 48, 48)
        assert shown(sample.clips[0], truth_of(videos[0])) == list(range(9, 25, 2))

    def test_tall_frames_are_cut_from_top_to_bottom(self, tmp_path: Path) -> None:
        path = write_video(tmp_path / "tall.mp4", moving_frames(20, height=64, width=48))
        clips = self.make([Entry(str(path), 0)], crops=2)[0, 0].clips
        truth = truth_of(Entry(str(path), 0))
        for clip, top in zip(clips, (0, 16), strict=True):
            assert (clip.float() - truth[:, 2:18:2, top : top + 48]).abs().mean() < 2

    def test_nothing_is_random(self, videos: list[Entry]) -> None:
        data = DataConfig(stride=2, crop="resized", clips_per_video=3)
        one, other = self.make(videos, data, clips=2), self.make(videos, clips=2)
        assert same(one[0, 4], other[7, 4])
        assert one.views == 2

    def test_a_file_is_opened_once_and_decoded_once_per_clip(
        self, videos: list[Entry], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        frames: list[int] = []

        def counting(*arguments: Any) -> np.ndarray:
            frames.append(len(real(*arguments)))
            return real(*arguments)

        real = module.decode
        monkeypatch.setattr(module, "decode", counting)
        self.make(videos, clips=2, crops=3)[0, 2]
        assert frames == [16]

    def test_one_frame(self, tmp_path: Path) -> None:
        path = write_video(tmp_path / "one.mp4", moving_frames(1))
        for sampling in ("dense", "segments"):
            sample = self.make([Entry(str(path), 0)], DataConfig(sampling=sampling), clips=2, crops=2)[0, 0]
            assert sample.clips.shape == (4, 3, 8, 48, 48)
            assert (sample.clips == sample.clips[:, :, :1]).all()

    def test_an_unreadable_video_is_lost_in_all_its_views(self, videos: list[Entry]) -> None:
        sample = self.make([Entry("/nowhere.mp4", 9), *videos], clips=2, crops=3)[0, 0]
        assert sample.clips.shape == (6, 3, 8, 48, 48)
        assert (sample.index, sample.label) == (-1, -1)
        assert [failure.path for failure in sample.bad] == ["/nowhere.mp4"]

    def test_several_crops_are_for_evaluation_alone(self, videos: list[Entry]) -> None:
        with pytest.raises(ValueError, match="a random clip has one crop"):
            make(videos, crops=3)


@pytest.mark.parametrize("data", [{}, {"sampling": "segments", "crop": "resized"}])
def test_a_dataset_can_be_sent_to_a_spawned_worker(videos: list[Entry], data: dict[str, Any]) -> None:
    dataset = make(videos, data=data, transform=ClipAugment(AugmentConfig()))
    # Its shared marks travel by torch.multiprocessing alone.
    dataset._reading, dataset._since = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    assert same(pickle.loads(pickle.dumps(dataset))[0, 0], dataset[0, 0])


def test_stride_crops_and_flip_follow_the_configuration(videos: list[Entry]) -> None:
    whole = make(videos, data={"flip": False, "crop_scales": (1.0,), "stride": 1}, image_size=48)
    truth = torch.from_numpy(read_all(Path(videos[0].path))).permute(3, 0, 1, 2).float()
    for epoch in range(4):
        clip = whole[epoch, 0].clips[0].float()
        options = [
            (float((clip - truth[:, start : start + 8, :, left : left + 48]).abs().mean()), start)
            for start in range(26)  # start 26 repeats its last frame
            for left in (0, 4, 8, 12, 16)
        ]
        assert min(options)[0] < 2


def test_one_frame_gives_equal_frames(tmp_path: Path) -> None:
    path = write_video(tmp_path / "one.mp4", moving_frames(1))
    sample = make([Entry(str(path), None)])[0, 0]
    assert sample.bad == []
    assert sample.clips.float().std() > 10
    assert (sample.clips == sample.clips[:, :, :1]).all()


def test_videos_smaller_than_the_output(tmp_path: Path) -> None:
    path = write_video(tmp_path / "small.mp4", moving_frames(20, height=16, width=24))
    assert make([Entry(str(path), None)], image_size=64)[0, 0].clips.shape == (1, 3, 8, 64, 64)


def test_a_manifest_without_labels_gives_minus_one(videos: list[Entry]) -> None:
    dataset = make([Entry(video.path, None) for video in videos])
    assert dataset[0, 5].label == -1
    assert dataset.labels.tolist() == [-1] * 12


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "cut", "audio", "damaged", "folder"])
def test_an_unreadable_video_is_replaced_and_reported(
    videos: list[Entry], bad_files: dict[str, Path], kind: str
) -> None:
    entries = [*videos, Entry(str(bad_files[kind]), 99)]
    sample = make(entries)[0, 12]
    assert [failure.path for failure in sample.bad] == [str(bad_files[kind])]
    assert sample.bad[0].reason
    assert 0 <= sample.index < 12
    assert sample.label == sample.index
    assert sample.clips.float().std() > 10
    assert same(sample, make(entries)[0, 12])


def test_the_substitute_depends_on_the_epoch(videos: list[Entry]) -> None:
    dataset = make([*videos, Entry("/nowhere.mp4", 99)])
    assert len({dataset[epoch, 12].index for epoch in range(8)}) > 1


def test_when_nothing_can_be_read_the_sample_is_lost(tmp_path: Path) -> None:
    entries = [Entry(str(tmp_path / f"{i}.mp4"), i) for i in range(100)]
    sample = make(entries)[0, 7]
    assert (sample.index, sample.label) == (-1, -1)
    assert sample.clips.shape == (1, 3, 8, 32, 32)
    assert sample.clips.max() == 0
    assert len(sample.bad) == len(set(sample.bad)) == MAX_ATTEMPTS
    assert sample.bad[0].path == entries[7].path


def test_no_video_is_tried_twice_for_one_sample(tmp_path: Path) -> None:
    sample = make([Entry(str(tmp_path / "a.mp4"), 0), Entry(str(tmp_path / "b.mp4"), 1)])[0, 0]
    assert sample.index == -1
    assert [Path(failure.path).name for failure in sample.bad] == ["a.mp4", "b.mp4"]


def test_evaluation_never_substitutes(videos: list[Entry]) -> None:
    sample = make([Entry("/nowhere.mp4", 99), *videos], attempts=1)[0, 0]
    assert sample.index == -1
    assert [failure.path for failure in sample.bad] == ["/nowhere.mp4"]


def test_other_errors_are_not_swallowed(videos: list[Entry], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(module, "cut", broken)
    with pytest.raises(ZeroDivisionError):
        make(videos)[0, 0]


def test_the_video_being_read_is_marked(videos: list[Entry], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int | None] = []

    def noting(path: str, *_: Any) -> None:
        seen.append(dataset.reading_by(0))
        raise DecodeError(path, "no")

    monkeypatch.setattr(module, "decode", noting)
    dataset = make(videos, data={"workers": 1}, attempts=1)
    dataset[0, 4]
    assert seen == [4]
    assert dataset.reading_by(0) is None


def test_paths_come_back_from_their_packing() -> None:
    paths = ["/a.mp4", "/b/\u00fcn\u00ef c.mp4", "/d.mp4"]
    dataset = make([Entry(path, i) for i, path in enumerate(paths)])
    assert [dataset.path(i) for i in range(3)] == paths
    assert len(dataset) == 3


def test_a_missing_decoder_is_heard_before_any_worker_starts(
    videos: list[Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise UserError(f"{name} is missing")

    monkeypatch.setattr(module, "require_decoder", missing)
    with pytest.raises(UserError, match="torchcodec is missing"):
        make(videos, data={"decoder": "torchcodec"})
