from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from everest_ds.config.finetuning import AugmentConfig
from everest_ds.data.mixing import Mixing

LABELS = torch.tensor([2, 0, 3, 2])
ONE_HOT = torch.tensor([[0, 0, 1, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 1, 0], [0, 0, 1, 0, 0]], dtype=torch.float32)


def make(clips_per_video: int = 1, **settings: Any) -> Mixing:
    return Mixing(AugmentConfig(**settings), 5, clips_per_video=clips_per_video)


@pytest.fixture
def clips() -> torch.Tensor:
    return torch.randint(256, (4, 3, 2, 24, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def numbered(count: int) -> torch.Tensor:
    """Return clips (count, 3, 2, 24, 32) of which the i-th is filled with i + 1."""
    return torch.arange(1, count + 1, dtype=torch.uint8)[:, None, None, None, None].repeat(1, 3, 2, 24, 32)


@pytest.mark.parametrize("settings", [{"mixup": 0.0, "cutmix": 0.0}, {"mix_probability": 0.0}])
def test_switched_off_it_returns_the_very_clips(clips: torch.Tensor, settings: dict[str, float]) -> None:
    for _ in range(5):
        same, targets = make(**settings)(clips, LABELS)
        assert same is clips
        assert targets.dtype == torch.float32
        assert torch.equal(targets, ONE_HOT)


@pytest.mark.parametrize("alpha", [0.2, 0.8, 5.0])
def test_mixup_is_the_weighted_sum_with_the_clip_before(clips: torch.Tensor, alpha: float) -> None:
    before, weights = clips.clone(), []
    for seed in range(30):
        torch.manual_seed(seed)
        mixed, targets = make(mixup=alpha, cutmix=0.0)(clips, LABELS)
        weights.append(weight := float(targets[1, 0]))  # the only clip of its class, and not before itself
        own, other = clips.numpy().astype(np.float64), np.roll(clips.numpy(), 1, axis=0).astype(np.float64)
        expected = weight * own + (1 - weight) * other
        assert type(mixed) is torch.Tensor
        assert mixed.dtype == torch.uint8
        assert np.abs(mixed.numpy() - expected).max() < 0.5001
        assert np.allclose(targets, weight * ONE_HOT + (1 - weight) * ONE_HOT.roll(1, 0), atol=1e-6)
    assert torch.equal(clips, before)
    # A symmetric Beta has mean 1/2 and variance 1 / (4 (2 alpha + 1)).
    assert abs(np.mean(weights) - 0.5) < 0.25
    assert 0.5 < np.std(weights) * 2 * np.sqrt(2 * alpha + 1) < 1.5


def test_cutmix_weights_labels_by_area() -> None:
    clips, boxes = numbered(4), set()
    for seed in range(30):
        torch.manual_seed(seed)
        mixed, targets = make(mixup=0.0)(clips, LABELS)
        assert mixed.dtype == torch.uint8
        own = mixed == clips
        # One rectangle of all clips, channels and frames.
        assert (own == own[:1, :1, :1]).all()
        cut = ~own[0, 0, 0]
        rows, columns = cut.any(1).nonzero(), cut.any(0).nonzero()
        if len(rows):
            assert cut[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()
            assert torch.equal(mixed[..., cut], clips.roll(1, 0)[..., cut])
        share = 1 - cut.float().mean()
        boxes.add(float(share))
        assert torch.allclose(targets, share * ONE_HOT + (1 - share) * ONE_HOT.roll(1, 0), atol=1e-6)
    assert len(boxes) > 10


def test_draws_come_from_the_global_generator(clips: torch.Tensor) -> None:
    results = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        results.append(make()(clips, LABELS))
    assert torch.equal(results[0][0], results[2][0])
    assert torch.equal(results[0][1], results[2][1])
    assert not torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize(
    ("settings", "unmixed", "cutmix"),
    [
        ({}, 0.0, 0.5),
        ({"mix_probability": 0.6, "cutmix_share": 0.25}, 0.4, 0.15),
        ({"cutmix_share": 0.0}, 0.0, 0.0),
        ({"cutmix_share": 1.0}, 0.0, 1.0),
        ({"mixup": 0.0, "cutmix_share": 0.0}, 0.0, 1.0),
        ({"cutmix": 0.0, "cutmix_share": 1.0}, 0.0, 0.0),
    ],
)
def test_shares(settings: dict[str, float], unmixed: float, cutmix: float, monkeypatch: pytest.MonkeyPatch) -> None:
    clips, mixing, chosen = numbered(2), make(**settings), []
    for mix in mixing._mixes:
        monkeypatch.setattr(mix, "forward", lambda *both, mix=mix: chosen.append(type(mix).__name__) or both)
    torch.manual_seed(0)
    same = sum(mixing(clips, LABELS[:2])[0] is clips for _ in range(600)) / 600
    assert abs(same - unmixed) <= 0.06 * (unmixed > 0)
    assert abs(chosen.count("CutMix") / 600 - cutmix) <= 0.06 * (0 < cutmix < 1)
    assert len(chosen) == round(600 * (1 - same))


@pytest.mark.parametrize("settings", [{"mixup": 0.0}, {"cutmix": 0.0}])
def test_the_host_reads_nothing_from_the_device(clips: torch.Tensor, settings: dict[str, float]) -> None:
    # Meta tensors hold nothing that could be read.
    for _ in range(5):
        mixed, targets = make(**settings)(clips.to("meta"), LABELS.to("meta"))
        assert mixed.shape == clips.shape
        assert (mixed.dtype, targets.shape, targets.dtype) == (torch.uint8, (4, 5), torch.float32)


@pytest.mark.parametrize("settings", [{"mixup": 0.0}, {"cutmix": 0.0}])
def test_no_clip_is_mixed_with_its_own_video(settings: dict[str, float]) -> None:
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    clips = (40 * (labels + 1)).to(torch.uint8)[:, None, None, None, None].repeat(1, 3, 2, 24, 32)
    for seed in range(20):
        torch.manual_seed(seed)
        mixed, targets = make(clips_per_video=2, **settings)(clips, labels)
        assert torch.allclose(targets.sum(1), torch.ones(6))
        assert torch.allclose(targets.max(1).values, targets.max())
        # Pixels and targets stay together: the mean grey is the mean of the classes' greys.
        means = mixed.float().mean(dim=(1, 2, 3, 4))
        assert (means - targets @ torch.tensor([40.0, 80, 120, 0, 0])).abs().max() < 0.51
        assert (targets.sort(1).values[:, -2] > 0).all() or targets.max() == 1


def test_a_sample_without_a_label_has_no_target(clips: torch.Tensor) -> None:
    _, targets = make(mixup=0.0, cutmix=0.0)(clips, torch.tensor([1, -1, 0, 4]))
    assert targets.sum(1).tolist() == [1, 0, 1, 1]
    _, targets = make()(clips, torch.full((4,), -1))
    assert not targets.any()


def test_a_pass_of_one_clip_stays_as_it_is(clips: torch.Tensor) -> None:
    for _ in range(10):
        mixed, targets = make()(clips[:1], LABELS[:1])
        assert torch.equal(mixed, clips[:1])
        assert torch.allclose(targets, ONE_HOT[:1])
