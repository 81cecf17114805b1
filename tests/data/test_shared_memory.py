"""/dev/shm held against a rank's batches; what fills it for real is in tests/resilience/test_trouble.py."""

import shutil
from collections import namedtuple

import pytest

from everest_ds.config.errors import RankError, UserError
from everest_ds.config.schema import DataConfig
from everest_ds.data import shared_memory

MIB = 2**20
Usage = namedtuple("Usage", "total used free")
BATCH = 77 * 10**6  # 32 clips of 16 frames at 224 px


def check(monkeypatch, folder, *, total, free, ranks=1, workers=4):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(total, total - free, free))
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    shared_memory.check(DataConfig(workers=workers), BATCH, 4, folder)


def test_a_plain_container_is_refused_with_what_the_run_takes(monkeypatch, tmp_path):
    with pytest.raises(UserError) as caught:
        check(monkeypatch, tmp_path, total=64 * MIB, free=64 * MIB, ranks=2)
    line = str(caught.value)
    assert f"{tmp_path}, which has 64.0 MiB, and this run's 2 ranks take up to 2.58 GiB" in line
    assert "(each 4 workers x 4 batches of 73.4 MiB, and 2 in use)" in line
    assert "--shm-size=3g" in line


def test_what_others_left_there_counts_for_the_rank_that_finds_it(monkeypatch, tmp_path):
    with pytest.raises(RankError, match="remove what others left there"):
        check(monkeypatch, tmp_path, total=64 * 2**30, free=64 * MIB)


@pytest.mark.parametrize("room", [{"total": 2 * 2**30, "free": 2 * 2**30}, {"total": 0, "free": 0, "workers": 0}])
def test_enough_room_and_no_workers_are_fine(monkeypatch, tmp_path, room):
    check(monkeypatch, tmp_path, **room)


def test_without_the_folder_nothing_is_said(tmp_path):
    shared_memory.check(DataConfig(), BATCH, 4, tmp_path / "none")
    assert shared_memory.why_full(RuntimeError("unable to allocate shared memory(shm)"), tmp_path / "none") == ""
