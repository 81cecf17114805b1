"""Workers read thousands of clips and don't grow: decoders hold memory that no garbage collector sees."""

from __future__ import annotations

import psutil

from everest_ds.config.schema import DataConfig
from everest_ds.data.dataset import ClipDataset
from everest_ds.data.loader import StepSampler, build_loader
from everest_ds.data.manifest import Entry

MIB = 2**20
READS, WARM_READS = 5000, 500
MICRO_BATCH = 4  # videos; the twelve of the fixture are three batches an epoch
VIEWS = 2
LIMIT_BYTES = 50 * MIB


def resident(workers: set[int]) -> list[int]:
    """Resident sets of processes, bytes."""
    return [psutil.Process(pid).memory_info().rss for pid in sorted(workers)]


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


def test_workers_do_not_grow(videos: list[Entry]) -> None:
    data = DataConfig(workers=2, stride=2, prefetch=2, clips_per_video=VIEWS)
    dataset = ClipDataset(videos, data, frames=8, image_size=32, tokens=64, seed=3)
    sampler = StepSampler(len(videos), seed=5, micro_batch=MICRO_BATCH)
    seen: list[list[int]] = []
    others, mine = children(), set[int]()
    for number, batch in enumerate(build_loader(dataset, sampler), start=1):
        assert not batch.bad
        mine = mine or children() - others
        reads = number * MICRO_BATCH * VIEWS
        if reads >= WARM_READS * (len(seen) + 1):
            seen.append(resident(mine))
        if reads >= READS:
            break
    workers = list(zip(*seen, strict=True))
    assert len(workers) == data.workers
    assert [len(sizes) for sizes in workers] == [READS // WARM_READS] * data.workers
    assert max(max(sizes) - sizes[0] for sizes in workers) < LIMIT_BYTES, workers
