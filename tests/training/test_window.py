"""What gathers between two logged steps."""

import json
import math

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
    assert (sums.loss, sums.extra) == (6.0, [7.0])


def test_one_rank_has_the_most_itself(clock):
    window = Window(torch.device("cpu"))
    window.add(torch.tensor(1.0))
    clock.now += 1.0
    sums = window.reduce([7.0], [3.0, 9.0])
    assert (sums.extra, sums.most) == ([7.0], [3.0, 9.0])


def test_what_the_device_has_yet_to_do_is_in_the_window(clock):
    """Reading waits for it, and the next window begins after that."""

    class Busy(torch.Tensor):
        def item(self) -> float:
            clock.now += 6.0
            return super().item()

    window = Window(torch.device("cpu"))
    window._loss = window._loss.as_subclass(Busy)
    window.add(torch.tensor(1.0))
    clock.now += 2.0
    assert window.reduce([]).step_s == pytest.approx(8.0)
    window.add(torch.tensor(1.0))
    clock.now += 2.0
    assert window.reduce([]).step_s == pytest.approx(2.0)


def test_the_loss_is_the_mean_of_the_finite_ones(clock):
    window = Window(torch.device("cpu"))
    for loss in (1.0, math.nan, 5.0, math.inf):
        window.add(torch.tensor(loss))
        clock.now += 1.0
    sums = window.reduce([])
    assert (sums.loss, sums.step_s) == (3.0, 1.0)
    window.add(torch.tensor(math.nan))
    clock.now += 1.0
    assert math.isnan(window.reduce([]).loss)


def test_a_window_that_is_continued_has_the_mean_of_all_its_steps(clock):
    before, whole = Window(torch.device("cpu")), Window(torch.device("cpu"))
    losses = torch.rand(7, generator=torch.Generator().manual_seed(0)).unbind()
    for loss in losses[:4]:
        before.add(loss)
    after = Window(torch.device("cpu"))
    after.restore(json.loads(json.dumps(before.sums())))
    for loss in losses[4:]:
        after.add(loss)
        clock.now += 2.0
    for loss in losses:
        whole.add(loss)
    clock.now += 1.0
    resumed, straight = after.reduce([]), whole.reduce([])
    assert resumed.loss == straight.loss  # to the last bit
    assert resumed.step_s == pytest.approx(7 / 3)  # of its own steps alone
