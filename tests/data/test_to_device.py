"""Clips copied ahead: which batches come and when; with pretended streams, what a device may do in between."""

from __future__ import annotations

import contextlib
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from host_copy import HostCopy

from everest_ds.config.errors import RankError
from everest_ds.data import to_device
from everest_ds.data.loader import Batch
from everest_ds.data.to_device import DeviceBatches, SideStream

DEVICE = torch.device("cuda")


def batch(number: int, clips: int = 2) -> Batch:
    pixels = torch.full((clips, 3, 2, 4, 4), number, dtype=torch.uint8)
    return Batch(pixels, torch.rand(clips, 5), torch.arange(clips), torch.full((clips,), number), [], 0)


class Listed:
    """Batches 0, 1, 2 ... ``ready`` says how many have been read; the one after the last is an error or the end."""

    def __init__(self, count: int, ready: int = 1000, error: Exception | None = None) -> None:
        self.count, self.ready, self.error = count, ready, error
        self.given = 0
        self.closed = False

    def __next__(self) -> Batch:
        if self.given == self.count:
            raise self.error or StopIteration
        self.given += 1
        return batch(self.given - 1)

    def poll(self) -> Batch | None:
        return next(self) if self.given < self.ready else None

    def close(self) -> None:
        self.closed = True


def take(batches: DeviceBatches, *, prefetching: bool = True) -> Iterator[tuple[int, int]]:
    """Yield the number that each batch's clips show, and that of its videos, after the next one was prefetched."""
    for found in batches:
        if prefetching:
            batches.prefetch()
        yield int(found.clips.unique()), int(found.index.unique())


@pytest.mark.parametrize("ready", [0, 3, 1000])
@pytest.mark.parametrize("prefetching", [False, True])
def test_the_same_batches_in_the_same_order(ready: int, prefetching: bool) -> None:
    batches = DeviceBatches(Listed(7, ready), HostCopy())
    assert list(take(batches, prefetching=prefetching)) == [(number, number) for number in range(7)]


def test_one_batch_ahead_and_never_two() -> None:
    source = Listed(7)
    batches = DeviceBatches(source, HostCopy())
    next(batches)
    assert source.given == 1
    batches.prefetch()
    batches.prefetch()
    assert source.given == 2
    next(batches)
    assert source.given == 2


def test_what_is_not_ready_is_not_waited_for() -> None:
    source = Listed(7, ready=1)
    batches = DeviceBatches(source, HostCopy())
    next(batches)
    batches.prefetch()
    assert source.given == 1
    assert next(batches).index[0] == 1


def test_on_a_cpu_batches_are_left_alone() -> None:
    source = Listed(2)
    batches = DeviceBatches.on(torch.device("cpu"), source)
    first = next(batches)
    batches.prefetch()
    assert source.given == 1
    assert first.clips.data_ptr() != next(batches).clips.data_ptr()
    batches.close()
    assert source.closed


def test_an_error_comes_with_the_batch_that_it_is_of() -> None:
    batches = DeviceBatches(Listed(2, error=RankError("no batch came")), HostCopy())
    for number in range(2):
        assert next(batches).index[0] == number
        batches.prefetch()
    for _ in range(2):
        with pytest.raises(RankError, match="no batch came"):
            next(batches)
        batches.prefetch()


def test_the_end_comes_after_the_last_batch() -> None:
    batches = DeviceBatches(Listed(1), HostCopy())
    next(batches)
    batches.prefetch()
    with pytest.raises(StopIteration):
        next(batches)


@dataclass
class Stream:
    """Work that a device does in order, after what it has to wait for: (stream, number of its tasks done)."""

    tasks: deque[tuple[Callable[[], None], list[tuple[Stream, int]]]] = field(default_factory=deque)
    asked: int = 0
    done: int = 0
    waits: list[tuple[Stream, int]] = field(default_factory=list)

    def ask(self, work: Callable[[], None]) -> None:
        self.tasks.append((work, self.waits))
        self.waits = []
        self.asked += 1

    def wait_stream(self, other: Stream) -> None:
        self.waits = [*self.waits, (other, other.asked)]
        self.ask(lambda: None)  # as torch does it: whatever waits for this stream waits for that one, too

    @property
    def can_go_on(self) -> bool:
        return bool(self.tasks) and all(other.done >= count for other, count in self.tasks[0][1])

    def go_on(self) -> None:
        self.tasks.popleft()[0]()
        self.done += 1


class Backend:
    """Stands for ``torch.cuda``: what the device is asked for is done later, in any order that the streams allow."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.computing = self.current = Stream()
        self.streams = [self.computing]

    def Stream(self, device: torch.device) -> Stream:  # noqa: N802 - torch's name
        self.streams.append(Stream())
        return self.streams[-1]

    def current_stream(self, device: torch.device) -> Stream:
        return self.current

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self.current = stream
        yield
        self.current = self.computing

    def do_some(self, at_most: int = 3) -> None:
        for _ in range(self.chance.randint(0, at_most)):
            able = [stream for stream in self.streams if stream.can_go_on]
            if able:
                self.chance.choice(able).go_on()

    def do_all(self) -> None:
        while any(stream.tasks for stream in self.streams):
            self.do_some()


class Buffer:
    """Stands for clips on the device: a copy is asked for and done later."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.number = -1
        self.used_on: list[Stream] = []

    def __getitem__(self, _: slice) -> Buffer:
        return self

    def record_stream(self, stream: Stream) -> None:
        self.used_on.append(stream)

    def copy_(self, clips: torch.Tensor, *, non_blocking: bool) -> None:
        assert non_blocking
        self.backend.current.ask(lambda: setattr(self, "number", int(clips[0, 0, 0, 0, 0])))


@pytest.mark.parametrize("seed", range(50))
def test_a_pass_reads_its_own_clips_in_forward_and_backward_however_late_the_device_is(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    backend, made, seen = Backend(seed), list[Buffer](), list[tuple[int, int]]()

    def empty(*_: Any, **__: Any) -> Buffer:
        made.append(Buffer(backend))
        return made[-1]

    monkeypatch.setattr(to_device.torch, "empty", empty)
    passes = 12
    batches = DeviceBatches(Listed(passes, ready=backend.chance.choice([0, 5, 100])), SideStream(DEVICE, backend))
    for number, found in enumerate(batches):
        clips: Any = found.clips
        for _ in range(2):  # forward, backward
            backend.computing.ask(lambda clips=clips, number=number: seen.append((number, clips.number)))
            backend.do_some()
        batches.prefetch()
        backend.do_some()
    backend.do_all()
    assert seen == [(number, number) for number in range(passes) for _ in range(2)]
    assert len(made) == 2
    assert all(buffer.used_on == [backend.streams[1]] for buffer in made)


def test_the_copy_does_not_wait_for_the_pass_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Backend(0)
    monkeypatch.setattr(to_device.torch, "empty", lambda *_, **__: Buffer(backend))
    batches = DeviceBatches(Listed(9), SideStream(DEVICE, backend))
    for _ in range(3):
        next(batches)
        backend.do_all()
        backend.computing.ask(lambda: None)  # the pass
        batches.prefetch()
        side = backend.streams[1]
        while side.can_go_on:
            side.go_on()
        assert not side.tasks  # the next clips are there
        assert backend.computing.tasks  # and the pass hasn't begun
