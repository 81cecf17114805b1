"""Workers that hang or die: named, replaced, and nothing else changes."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import torch
from video_files import silent_server

from everest_ds.config.errors import UserError
from everest_ds.config.schema import DataConfig
from everest_ds.data import dataset as dataset_module
from everest_ds.data.dataset import ClipDataset
from everest_ds.data.loader import Batch, StepSampler, build_loader
from everest_ds.data.manifest import Entry


def make(entries: list[Entry], workers: int = 2, **data: Any) -> ClipDataset:
    config = DataConfig(workers=workers, stride=2, prefetch=2, **data)
    return ClipDataset(entries, config, frames=8, image_size=32, tokens=16, seed=3)


def same(one: Batch, other: Batch) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("clips", "noise", "labels", "index"))


def decoding_processes() -> list[psutil.Process]:
    """Not every child: the consoles of other tests are some, too."""
    return [child for child in psutil.Process().children() if child.name().startswith("pt_data_worker")]


@pytest.fixture
def with_a_hanging_one(videos: list[Entry]) -> Iterator[list[Entry]]:
    """Twelve videos, and one on a server that never answers. A pipe in place of a video is refused unopened."""
    with silent_server() as url:
        yield [*videos, Entry(url, 99)]
    assert not decoding_processes()


def test_a_video_that_hangs_is_set_aside_and_the_rest_goes_on(with_a_hanging_one, caplog):
    video = with_a_hanging_one[-1].path
    told: list[tuple[str, str]] = []
    sampler = StepSampler(13, seed=3, micro_batch=4, last_step=9)  # three epochs: it is met at least twice
    loader = build_loader(make(with_a_hanging_one, timeout_s=1.0), sampler, report=lambda *what: told.append(what))
    with caplog.at_level(logging.WARNING):
        batches = list(loader)
    reason = "no frames within data.timeout_s = 1 s"
    assert told == [(video, reason)]
    assert len(batches) == 9
    failures = {failure for batch in batches for failure in batch.bad}
    assert failures == {(video, reason)}
    assert sum(batch.lost for batch in batches) == 0
    assert 12 not in torch.cat([batch.index for batch in batches]).tolist()
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning == f"{video} is set aside: {reason}; new decoding processes continue"


def test_a_video_set_aside_before_is_not_opened(with_a_hanging_one):
    dataset = make(with_a_hanging_one, workers=0)
    dataset.set_aside({with_a_hanging_one[-1].path: "hung once"})
    (batch,) = list(build_loader(dataset, [[(0, 12), (0, 1)]]))
    assert batch.bad == [(with_a_hanging_one[-1].path, "hung once")]
    assert batch.lost == 0


def test_slow_videos_are_waited_for(videos, monkeypatch):
    """The limit is for one video: a batch of several slow ones may take longer."""
    real = dataset_module.decode
    monkeypatch.setattr(dataset_module, "decode", lambda *what: time.sleep(0.7) or real(*what))
    dataset = make(videos, workers=1, timeout_s=1.2)
    (batch,) = list(build_loader(dataset, [[(0, 0), (0, 1), (0, 2), (0, 3)]]))
    assert batch.bad == []


def test_without_a_limit_nothing_is_set_aside(videos, monkeypatch):
    real = dataset_module.decode
    monkeypatch.setattr(dataset_module, "decode", lambda *what: time.sleep(2.2) or real(*what))
    (batch,) = list(build_loader(make(videos, workers=1, timeout_s=0.0), [[(0, 0)]]))
    assert batch.bad == []


def test_killed_workers_are_replaced_and_nothing_changes(videos, caplog):
    # One epoch: in two of them, both workers may die over the same video at once.
    once = [entry for entry in videos for _ in range(4)]
    sampler = StepSampler(48, seed=3, micro_batch=4, last_step=12)
    expected = list(build_loader(make(once, workers=0), sampler))
    found = []
    for number, batch in enumerate(build_loader(make(once), sampler)):
        found.append(batch)
        if number in (2, 7):
            for worker in decoding_processes():
                worker.kill()
    assert len(found) == len(expected) == 12
    assert all(same(one, other) for one, other in zip(found, expected, strict=True))
    assert sum("a decoding process died (exit code -9)" in record.getMessage() for record in caplog.records) in (1, 2)
    assert not any("set aside" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("killing", [False, True])
def test_polling_waits_for_nothing_and_changes_nothing(videos, monkeypatch, killing):
    sampler = StepSampler(12, seed=3, micro_batch=4, last_step=6)
    expected = list(build_loader(make(videos, workers=0), sampler))
    real = dataset_module.decode
    monkeypatch.setattr(dataset_module, "decode", lambda *what: time.sleep(0.25) or real(*what))
    batches = iter(build_loader(make(videos), sampler))
    found, in_vain, longest_s = [next(batches)], 0, 0.0
    while len(found) < 6:
        if killing and len(found) == 3 and not in_vain:
            decoding_processes()[0].kill()
        start = time.monotonic()
        batch = batches.poll()
        longest_s = max(longest_s, time.monotonic() - start)
        if batch is None:
            in_vain += 1
            time.sleep(0.02)
        else:
            found.append(batch)
            in_vain = 0 if len(found) == 3 else in_vain
    assert all(same(one, other) for one, other in zip(found, expected, strict=True))
    assert in_vain > 1
    assert killing or longest_s < 0.5, "a batch takes a second"
    with pytest.raises(StopIteration):
        batches.poll()


def test_without_workers_nothing_is_ever_ready(videos):
    batches = iter(build_loader(make(videos, workers=0), [[(0, 0)], [(0, 1)]]))
    assert [int(next(batches).index), batches.poll(), int(next(batches).index)] == [0, None, 1]


def test_a_video_that_kills_its_worker_twice_is_set_aside(videos, monkeypatch, caplog):
    def deadly(path: str, *rest: Any) -> Any:
        if path == videos[7].path:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(path, *rest)

    real = dataset_module.decode
    monkeypatch.setattr(dataset_module, "decode", deadly)
    batches = list(build_loader(make(videos), [[(0, 6), (0, 7)], [(0, 8), (0, 9)]]))
    reason = "2 decoding processes died over it"
    assert [failure for batch in batches for failure in batch.bad] == [(videos[7].path, reason)]
    assert [record.getMessage() for record in caplog.records] == [
        f"a decoding process died (exit code -9) while it read {videos[7].path}; new decoding processes continue",
        f"{videos[7].path} is set aside: {reason}; new decoding processes continue",
    ]


def test_workers_that_all_die_end_the_run_in_one_line(videos, monkeypatch):
    monkeypatch.setattr(dataset_module, "decode", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match=r"^data.workers: .* times in a row; too little memory"):
        list(build_loader(make(videos, workers=1), [[(0, 7)]]))


def test_workers_end_with_the_process_that_asked(videos, tmp_path):
    """A killed rank leaves no decoding processes behind."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        loader = iter(build_loader(make(videos), StepSampler(12, seed=3, micro_batch=4)))
        next(loader)
        os.write(write, b" ".join(str(worker.pid).encode() for worker in psutil.Process().children()))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    workers = [int(number) for number in os.read(read, 100).split()]
    assert len(workers) == 2
    deadline = time.monotonic() + 10
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers))


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
