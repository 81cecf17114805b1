"""Bytes over time: peaks are the highest of lines in the batch, and items at the peak sum to it."""

import pytest

from everest_ds.memory.timeline import Timeline


@pytest.fixture
def curve():
    timeline = Timeline()
    timeline.born(100, "states")
    activation = timeline.born(0, "activations", per_clip=10)
    timeline.flash(30, "temporaries")
    timeline.gone(activation)
    timeline.born(100, "gradients")
    return timeline.freeze()


# States and activations, plus a temporary of 30, against states and gradients: they cross at 7 clips.
@pytest.mark.parametrize(("batch", "peak"), [(1, 200), (7, 200), (8, 210), (100, 1130)])
def test_peak_moves_from_the_optimizer_to_the_activations(curve, batch, peak):
    assert curve.peak(batch) == peak
    assert sum(curve.at_peak(batch).values()) == peak


def test_items_name_what_is_alive_at_the_peak(curve):
    assert curve.at_peak(1) == {"states": 100, "gradients": 100}
    assert curve.at_peak(8) == {"states": 100, "activations": 80, "temporaries": 30}


def test_the_allocator_rounds_each_block(curve):
    assert curve.peak(8, granule=64) == 128 + 128 + 64
