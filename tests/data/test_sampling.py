from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from everest_ds.data.sampling import draw_start, even_start, frame_ids, start_count

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
    assert [even_start(163, 16, 4, view, 5) for view in range(5)] == [10, 30, 50, 70, 90]  # of 0 ... 99
    assert [even_start(9, 16, 4, view, 3) for view in range(3)] == [0, 0, 0]
