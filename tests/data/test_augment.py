from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from everest_ds.config.finetuning import AugmentConfig
from everest_ds.config.schema import DataConfig
from everest_ds.data import augment as module
from everest_ds.data.augment import ClipAugment
from everest_ds.data.dataset import ClipDataset
from everest_ds.data.loader import build_loader, evaluation_batches
from everest_ds.data.manifest import Entry

OFF = {"rand_augment_ops": 0, "erasing": 0.0}


def make(**settings: Any) -> ClipAugment:
    return ClipAugment(AugmentConfig(**settings))


@pytest.fixture
def clip() -> torch.Tensor:
    """A clip (3, 4, 40, 40) of smooth pictures, all frames different."""
    coarse = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)) * 255
    pictures = torch.nn.functional.interpolate(coarse, size=(40, 40), mode="bilinear")
    return pictures.round().to(torch.uint8).transpose(0, 1).contiguous()


def test_switched_off_it_changes_nothing(clip: torch.Tensor) -> None:
    augment = make(**OFF)
    assert all(augment(clip, np.random.default_rng(seed)) is clip for seed in range(5))


@pytest.mark.parametrize("settings", [{}, {"erasing": 0.0}, {"rand_augment_ops": 0, "erasing": 1.0}])
def test_clips_keep_their_form_and_the_argument_its_pixels(clip: torch.Tensor, settings: dict[str, Any]) -> None:
    before, augment = clip.clone(), make(**settings)
    for seed in range(40):
        augmented = augment(clip, np.random.default_rng(seed))
        assert augmented.dtype == torch.uint8
        assert augmented.shape == clip.shape
        assert augmented.is_contiguous()
    assert torch.equal(clip, before)


def test_a_clip_is_a_function_of_the_generator(clip: torch.Tensor) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    clips = [make()(clip, np.random.default_rng(seed)) for seed in range(20)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    again = [make()(clip, np.random.default_rng(seed)) for seed in reversed(range(20))]
    assert all(torch.equal(a, b) for a, b in zip(clips, reversed(again), strict=True))
    assert len({augmented.numpy().tobytes() for augmented in clips}) > 15


class TestRandAugment:
    @pytest.mark.parametrize("seed", range(60))
    def test_all_frames_get_the_same_operations(self, clip: torch.Tensor, seed: int) -> None:
        augment = make(erasing=0.0)
        together = augment(clip, np.random.default_rng(seed))
        alone = [augment(clip[:, t : t + 1], np.random.default_rng(seed)) for t in range(4)]
        assert torch.equal(together, torch.cat(alone, dim=1))

    def recorded(
        self, clip: torch.Tensor, monkeypatch: pytest.MonkeyPatch, **settings: Any
    ) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """Return the strengths, 0 to 10, of 400 clips' operations, and all that those were made with."""
        calls: list[dict[str, Any]] = []

        class Recorder:
            def __init__(self, **arguments: Any) -> None:
                calls.append(arguments)

            def __call__(self, frames: torch.Tensor) -> torch.Tensor:
                return frames

        monkeypatch.setattr(module, "RandAugment", Recorder)
        for seed in range(400):
            make(**settings)(clip, np.random.default_rng(seed))
        strengths = [10 * call["magnitude"] / (call["num_magnitude_bins"] - 1) for call in calls]
        return np.array(strengths), calls

    def test_strength_is_normal_up_to_ten(self, clip: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
        strengths, calls = self.recorded(clip, monkeypatch, rand_augment_magnitude=5.0, rand_augment_std=0.5)
        assert len(strengths) == 800
        assert abs(strengths.mean() - 5) < 0.1
        assert abs(strengths.std() - 0.5) < 0.05
        assert {call["num_ops"] for call in calls} == {1}
        assert {call["fill"] for call in calls} == {128}
        strengths, _ = self.recorded(clip, monkeypatch, rand_augment_magnitude=9.0, rand_augment_std=2.0)
        assert strengths.max() == 10
        assert (strengths == 10).mean() > 0.2
        strengths, _ = self.recorded(clip, monkeypatch, rand_augment_magnitude=0.0)
        assert strengths.min() == 0

    def test_without_deviation_strength_is_exact(self, clip: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
        settings = {"rand_augment_ops": 3, "rand_augment_magnitude": 7.3, "rand_augment_std": 0.0}
        strengths, calls = self.recorded(clip, monkeypatch, **settings)
        assert set(strengths) == {7.3}
        assert len(calls) == 1200

    def test_what_is_moved_in_is_grey(self) -> None:
        white = torch.full((3, 2, 40, 40), 255, dtype=torch.uint8)
        augment = make(rand_augment_ops=1, erasing=0.0, rand_augment_std=0.0)
        greys = [augment(white, np.random.default_rng(seed))[:, 0].unique() for seed in range(60)]
        # Shears, shifts and turns, five of 14 operations; bilinear only where the edge was.
        assert sum(128 in grey for grey in greys) > 10


class TestErasing:
    def boxes(self, share: float = 1.0, count: int = 200, size: int = 96) -> list[np.ndarray]:
        """Return for each clip the mask (T, S, S) of what was erased from black, which noise rarely is."""
        clip = torch.zeros(3, 2, size, size, dtype=torch.uint8)
        augment = make(rand_augment_ops=0, erasing=share)
        clips = [augment(clip, np.random.default_rng(seed)) for seed in range(count)]
        return [erased.sum(dim=0).numpy() > 0 for erased in clips]

    def test_one_rectangle_of_all_frames(self) -> None:
        areas, aspects = [], []
        for first, second in self.boxes():
            rows, columns = np.flatnonzero((first | second).any(1)), np.flatnonzero((first | second).any(0))
            height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
            inside = np.ix_(rows, columns)
            # All three channels are clipped to black once in some 10 000 pixels.
            assert len(rows) * len(columns) == height * width
            assert first[inside].mean() > 0.9
            assert second[inside].mean() > 0.9
            areas.append(height * width / 96**2)
            aspects.append(height / width)
        assert 0.015 < min(areas) < 0.05
        assert 0.28 < max(areas) < 0.345
        assert 0.28 < min(aspects) < 0.4
        assert 2.5 < max(aspects) < 3.6

    def test_its_probability(self) -> None:
        assert 0.19 < np.mean([mask.any() for mask in self.boxes(0.25, count=1000, size=16)]) < 0.31

    def test_noise_is_normal_around_the_mean_and_new_in_every_frame(self) -> None:
        clip = torch.zeros(3, 8, 160, 160, dtype=torch.uint8)
        erased = make(rand_augment_ops=0, erasing=1.0)(clip, np.random.default_rng(2))
        rows, columns = erased.sum(dim=(0, 1, 3)) > 0, erased.sum(dim=(0, 1, 2)) > 0
        noise = erased[:, :, rows][..., columns].float()
        assert noise.numel() > 20_000
        for channel, mean, deviation in zip(noise, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, strict=True):
            # Clipping at black and white narrows it a little.
            assert abs(channel.mean() - 255 * mean) < 4
            assert 0.9 < channel.std() / (255 * deviation) < 1.01
            between_frames = torch.corrcoef(channel.flatten(1))
            assert (between_frames - torch.eye(8)).abs().max() < 0.1

    def test_it_does_not_depend_on_the_operations(self, clip: torch.Tensor) -> None:
        for seed in range(20):
            alone = make(rand_augment_ops=0, erasing=1.0)(clip, np.random.default_rng(seed))
            both = make(erasing=1.0)(clip, np.random.default_rng(seed))
            operations = make(erasing=0.0)(clip, np.random.default_rng(seed))
            erased = alone != clip
            assert torch.equal(both[erased], alone[erased])
            rows, columns = erased.any(dim=(0, 1, 3)), erased.any(dim=(0, 1, 2))
            outside = ~(rows[:, None] & columns)
            assert outside.float().mean() > 0.6
            assert torch.equal(both[..., outside], operations[..., outside])

    def test_where_no_rectangle_fits_nothing_is_erased(self) -> None:
        line = torch.full((3, 2, 1, 100), 7, dtype=torch.uint8)
        assert make(rand_augment_ops=0, erasing=1.0)(line, np.random.default_rng(0)) is line


def test_workers_change_nothing(videos: list[Entry]) -> None:
    def load(workers: int) -> list[torch.Tensor]:
        data = DataConfig(workers=workers, stride=2, clips_per_video=2, crop="resized")
        shape = {"frames": 8, "image_size": 32, "tokens": 4}
        dataset = ClipDataset(videos, data, **shape, seed=3, transform=make(erasing=0.5))
        return [batch.clips for batch in build_loader(dataset, evaluation_batches(12, batch=4))]

    torch.manual_seed(0)
    before = torch.get_rng_state()
    alone = load(0)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(alone, load(2), strict=True))
