"""What data workers prepare ahead stays within a bound, in bytes as they are taken."""

from __future__ import annotations

import logging

import pytest

from everest_ds.config.schema import AHEAD_BYTES, DataConfig
from everest_ds.data import ahead
from everest_ds.data.ahead import batches_ahead, pinned_bytes
from everest_ds.data.dataset import ClipDataset
from everest_ds.data.loader import StepSampler, build_loader, evaluation_batches
from everest_ds.data.manifest import Entry

GIB = 2**30
CLIP_BYTES = 3 * 16 * 224 * 224


@pytest.mark.parametrize(
    ("clips", "workers", "prefetch", "expected"),
    [
        (32, 4, 4, 4),  # the defaults: 128 MiB each, 2 GiB in all
        (64, 4, 4, 4),  # 4 GiB
        (112, 4, 4, 2),  # 257 MiB: the next power of two
        (128, 4, 4, 2),
        (256, 4, 4, 1),
        (32, 8, 100, 4),
        (32, 4, 1, 1),  # the setting is a maximum
        (1024, 4, 4, 1),
    ],
)
def test_the_bound_is_in_bytes(clips: int, workers: int, prefetch: int, expected: int) -> None:
    each = pinned_bytes(clips * CLIP_BYTES)
    found = batches_ahead(DataConfig(workers=workers, prefetch=prefetch), each)
    assert found == expected
    assert found == 1 or found * workers * each <= AHEAD_BYTES


def test_more_than_the_bound_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    ahead._warn.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert [batches_ahead(DataConfig(workers=12), GIB) for _ in range(3)] == [1, 1, 1]
    assert [record.getMessage() for record in caplog.records] == [
        "data.workers: 12 that prepare a batch of 1.00 GiB each take up to 12.0 GiB of a rank's host memory; lower it, "
        "or train.micro_batch"
    ]


@pytest.mark.parametrize(("device", "expected"), [("cpu", 3), ("cuda", 2)])
def test_the_loader_keeps_to_it(videos: list[Entry], device: str, expected: int) -> None:
    """Batches of three videos with two views each: 1.125 GiB, of which pinned memory makes 2."""
    data = DataConfig(workers=1, prefetch=4, clips_per_video=2)
    dataset = ClipDataset(videos, data, frames=1024, image_size=256, tokens=0, seed=0)
    sampler = StepSampler(12, seed=0, micro_batch=6, clips_per_video=2)
    assert 3 * dataset.sample_bytes == 9 * GIB // 8
    assert build_loader(dataset, sampler, device=device)._start([]).prefetch_factor == expected


def test_nothing_to_read_and_nobody_to_read_it(videos: list[Entry]) -> None:
    dataset = ClipDataset(videos, DataConfig(workers=0), frames=8, image_size=32, tokens=0, seed=0)
    assert build_loader(dataset, evaluation_batches(12, batch=4))._start([]).prefetch_factor is None
    dataset = ClipDataset(videos, DataConfig(workers=2), frames=8, image_size=32, tokens=0, seed=0)
    assert list(build_loader(dataset, [])) == []
