from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from everest_ds.config.schema import DataConfig
from everest_ds.data.sampling import SAMPLINGS, Dense, Segments, draw_start, even_start, frame_ids, start_count

FIXTURE = json.loads((Path(__file__).parents[1] / "golden" / "sampling.json").read_text())


def official_draw(length: int) -> tuple[int, list[int]]:
    """Return the 1-based start and the ids, drawing from NumPy's global generator as the official code does."""
    count = start_count(length, 16, 4)
    start = int(np.random.randint(count, size=1)[0]) if length >= 64 else 0
    return start + 1, frame_ids(length, start, 16, 4).tolist()


@pytest.mark.parametrize("case", FIXTURE["cases"] + FIXTURE["more_lengths"], ids=lambda c: str(c["video_length"]))
def test_official_ids(case: dict[str, Any]) -> None:
    np.random.seed(case["numpy_seed"])
    assert official_draw(case["video_length"]) == (case["start_1based"], case["frame_ids"])


def test_official_ids_of_one_stream() -> None:
    stream = FIXTURE["one_stream"]
    assert len(stream["calls"]) > 10
    np.random.seed(stream["numpy_seed"])
    for call in stream["calls"]:
        assert official_draw(call["video_length"]) == (call["start_1based"], call["frame_ids"])


@pytest.mark.parametrize(("length", "count"), [(1, 1), (10, 1), (63, 1), (64, 1), (65, 2), (300, 237)])
def test_starts_cover_their_range_and_no_more(length: int, count: int) -> None:
    assert start_count(length, 16, 4) == count
    rng = np.random.default_rng(0)
    drawn = {draw_start(length, 16, 4, rng) for _ in range(40 * count)}
    assert drawn == set(range(count))


@pytest.mark.parametrize("frames", [1, 8, 16])
@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 3, 15, 16, 17, 31, 33, 64, 100])
def test_ids_stay_in_the_video_and_advance_by_the_stride(length: int, frames: int, stride: int) -> None:
    for start in range(start_count(length, frames, stride)):
        ids = frame_ids(length, start, frames, stride)
        assert ids.shape == (frames,)
        assert ids.dtype == np.int64
        assert ids[0] == start
        assert ids.max() < length
        steps = np.diff(ids)
        moving = int((steps == stride).sum())
        assert (steps[:moving] == stride).all()
        assert (steps[moving:] == 0).all()


def test_a_start_outside_of_the_video_is_refused() -> None:
    with pytest.raises(ValueError, match="start 5 is not a frame of a video of 5"):
        frame_ids(5, 5, 16, 4)


def test_even_starts() -> None:
    assert even_start(20, 16, 1, view=0, views=1) == 2  # of 0 ... 4
    assert [even_start(163, 16, 4, view, 2) for view in range(2)] == [0, 99]  # of 0 ... 99
    assert [even_start(163, 16, 4, view, 5) for view in range(5)] == [0, 24, 49, 74, 99]
    assert [even_start(9, 16, 4, view, 3) for view in range(3)] == [0, 0, 0]


@pytest.mark.parametrize("views", [2, 5, 10])
@pytest.mark.parametrize("length", [64, 65, 66, 67, 100, 250, 299, 300, 301, 1000])
def test_even_starts_are_less_than_a_stride_from_the_official_ones(length: int, views: int) -> None:
    read = list(range(0, length, 4))  # the official test reads every 4th frame, then cuts clips out of these
    for view in range(views):
        official = read[int(view * max((len(read) - 16) / (views - 1), 0))]
        assert abs(even_start(length, 16, 4, view, views) - official) < 4


class TestDense:
    def test_a_drawn_clip_is_the_official_one_of_its_start(self) -> None:
        drawn = Dense(16, 4).draw(300, np.random.default_rng(5))
        start = draw_start(300, 16, 4, np.random.default_rng(5))
        assert drawn.tolist() == frame_ids(300, start, 16, 4).tolist()

    def test_spread_clips(self) -> None:
        dense = Dense(4, 2)
        assert dense.spread(30, 0, 1).tolist() == [11, 13, 15, 17]
        assert [dense.spread(30, view, 3).tolist() for view in range(3)] == [
            [0, 2, 4, 6],
            [11, 13, 15, 17],
            [22, 24, 26, 28],
        ]


class TestSegments:
    @pytest.mark.parametrize("length", [1, 3, 15, 16, 17, 31, 100, 300, 12345])
    def test_drawn_frames_are_those_of_the_formula(self, length: int) -> None:
        tick = length / 16
        for seed in range(50):
            uniform = np.random.default_rng(seed).random(16)
            expected = [int(tick * i + tick * u) for i, u in enumerate(uniform)]
            assert Segments(16).draw(length, np.random.default_rng(seed)).tolist() == expected

    @pytest.mark.parametrize("length", [10, 37])
    def test_every_frame_of_a_segment_is_as_likely_as_its_share_of_it(self, length: int) -> None:
        rng, draws, tick = np.random.default_rng(0), 4000, length / 8
        drawn = np.stack([Segments(8).draw(length, rng) for _ in range(draws)])
        for segment in range(8):
            found = np.bincount(drawn[:, segment], minlength=length) / draws
            first, last = segment * tick, (segment + 1) * tick
            overlap = [max(0.0, min(frame + 1, last) - max(frame, first)) for frame in range(length)]
            assert np.abs(found - np.array(overlap) / tick).max() < 0.04
            assert not found[np.array(overlap) == 0].any()

    @pytest.mark.parametrize("views", [1, 2, 3, 5])
    @pytest.mark.parametrize("length", [1, 2, 7, 15, 16, 17, 33, 96, 300])
    def test_spread_frames_are_those_of_the_formula(self, length: int, views: int) -> None:
        for view in range(views):
            place = Fraction(2 * view + 1, 2 * views)
            expected = [math.floor((i + place) * Fraction(length, 16)) for i in range(16)]
            assert Segments(16).spread(length, view, views).tolist() == expected

    def test_one_view_takes_the_middles(self) -> None:
        assert Segments(4).spread(40, 0, 1).tolist() == [5, 15, 25, 35]
        assert [Segments(4).spread(40, view, 2).tolist() for view in range(2)] == [[2, 12, 22, 32], [7, 17, 27, 37]]

    @pytest.mark.parametrize("length", [1, 2, 5, 15, 16, 17, 31, 300])
    def test_frames_ascend_from_part_to_part_of_the_whole_video(self, length: int) -> None:
        rng, segments = np.random.default_rng(0), Segments(16)
        drawn = [segments.draw(length, rng) for _ in range(100)]
        spread = [segments.spread(length, view, 3) for view in range(3)]
        for ids in drawn + spread:
            assert ids.shape == (16,)
            assert ids.dtype == np.int64
            assert ids[0] >= 0
            assert ids[-1] < length
            assert (np.diff(ids) >= 0).all()
            parts = np.arange(16) * length // 16
            assert (ids >= parts).all()
            assert (ids <= parts + math.ceil(length / 16)).all()

    def test_every_frame_of_a_video_is_drawn(self) -> None:
        rng = np.random.default_rng(0)
        assert {int(i) for _ in range(500) for i in Segments(16).draw(45, rng)} == set(range(45))

    def test_the_largest_draw_stays_in_the_video(self) -> None:
        class Largest:
            def random(self, size: int) -> np.ndarray:
                return np.full(size, np.nextafter(1, 0))

        for length in (1, 7, 16, 1000, 123457):
            assert Segments(16).draw(length, Largest())[-1] == length - 1


def test_the_configuration_names_the_sampling() -> None:
    data = DataConfig(stride=3)
    assert SAMPLINGS[data.sampling](data, 8) == Dense(8, 3)
    data = DataConfig(sampling="segments")
    assert SAMPLINGS[data.sampling](data, 8) == Segments(8)
