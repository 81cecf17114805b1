"""What gathers between two logged steps."""

import pytest
import torch

from everest_ds.data.dataset import ReadingTime
from everest_ds.data.loader import Batch
from everest_ds.training import window as module
from everest_ds.training.window import Window


def batch(clips: int, decode: float, transform: float) -> Batch:
    empty = torch.empty(clips, 0)
    index = torch.zeros(clips, dtype=torch.int64)
    return Batch(empty, empty, index, index, bad=[], lost=0, seconds=ReadingTime(decode, transform))


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_reading_is_told_per_clip(clock):
    window = Window(torch.device("cpu"))
    window.read(batch(8, decode=2.0, transform=0.5))
    window.read(batch(2, decode=1.0, transform=1.5))
    window.add(torch.tensor(1.0))
    clock.now += 1.0
    sums = window.reduce([])
    assert (sums.decode_s, sums.transform_s) == (pytest.approx(0.3), pytest.approx(0.2))
    window.add(torch.tensor(1.0))
    clock.now += 1.0
    assert window.reduce([]).decode_s == 0.0  # the next window starts from nothing


def test_time_is_that_of_steps(clock):
    window = Window(torch.device("cpu"))
    for wait_s in (1.0, 2.0):
        with window.waiting_for_data():
            clock.now += wait_s
        clock.now += 3.0
        window.add(torch.tensor(4 * wait_s))
        with window.paused():
            clock.now += 50.0
    sums = window.reduce([7.0])
    assert sums.step_s == pytest.approx(4.5)
    assert sums.data_wait_share == pytest.approx(3 / 9)
    assert (sums.loss, sums.bad_in_a_row, sums.extra) == (6.0, 0, [7.0])
