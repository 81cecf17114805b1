"""/dev/shm held against a rank's batches; what fills it for real is in tests/resilience/test_trouble.py."""

import shutil
from collections import namedtuple

import pytest

from everest_ds.config.errors import RankError, UserError
from everest_ds.config.schema import DataConfig
from everest_ds.data import shared_memory
from everest_ds.data.dataset import ClipDataset
from everest_ds.data.loader import handed_over_bytes
from everest_ds.data.manifest import Entry

MIB = 2**20
Usage = namedtuple("Usage", "total used free")


def needed(device="cpu", **data):
    """Of 32 clips of 16 frames at 224 px: 73.5 MiB."""
    dataset = ClipDataset([Entry("a.mp4", 0)], DataConfig(**data), frames=16, image_size=224, tokens=8, seed=0)
    return handed_over_bytes(dataset, 32, device)


@pytest.fixture
def room(monkeypatch, tmp_path):
    def check(needed_bytes, total, free, ranks=1):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(total, total - free, free))
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        shared_memory.check(needed_bytes, tmp_path)

    return check


@pytest.mark.parametrize(
    ("settings", "batches"),
    [
        ({}, 4 * 4 + 2),
        ({"workers": 2, "prefetch": 3}, 2 * 3 + 2),
        ({"device": "cuda"}, 4 + 2),  # torch takes them from there as they come
        ({"workers": 0}, 0),
    ],
)
def test_what_a_rank_takes_goes_by_its_own_batch_and_prefetch(settings, batches):
    assert needed(**settings) == batches * 32 * 3 * 16 * 224 * 224


def test_a_plain_container_is_refused_with_what_the_run_takes(room):
    with pytest.raises(UserError) as caught:
        room(needed(), total=64 * MIB, free=64 * MIB, ranks=2)
    line = str(caught.value)
    assert "which has 64.0 MiB, and this run's 2 ranks take up to 2.58 GiB" in line
    assert "--shm-size=3g, lower data.prefetch or train.micro_batch, or set data.workers=0" in line


def test_what_others_left_there_counts_for_the_rank_that_finds_it(room):
    with pytest.raises(RankError, match="remove what others left there"):
        room(needed(), total=64 * 2**30, free=64 * MIB)


def test_enough_room_and_no_workers_are_fine(room):
    room(needed(), total=2 * 2**30, free=2 * 2**30)
    room(needed(workers=0), total=0, free=0)


def test_other_errors_of_sharing_are_not_its_room(tmp_path):
    full = "unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)"
    assert "no room is left for a batch in" in shared_memory.why_full(RuntimeError(full), tmp_path)
    for other in ("unable to open shared memory object </torch_1_2_3>: Too many open files (24)", "damaged"):
        assert shared_memory.why_full(RuntimeError(other), tmp_path) == ""
