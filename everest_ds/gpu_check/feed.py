"""How many cores of this machine feed a GPU at the speeds that were measured."""

from __future__ import annotations

import math
from collections.abc import Iterator

from everest_ds.benchmarks.footage import write_footage
from everest_ds.config.load import load_recipe
from everest_ds.data.rate import training_rate
from everest_ds.data.synthetic import write_set
from everest_ds.gpu_check.cases import Asked, Case, RowsFile, Values
from everest_ds.training.doctor.host import usable_cores

_VIDEOS = 2
_LIMIT_S = 6.0


def cases(asked: Asked) -> Iterator[Case]:
    """Read; divide."""
    rate: dict[str, float] = {}
    yield Case(name="reading", run=lambda: _read(asked, rate))
    if rate:
        yield Case(name="cores", run=lambda: _cores(asked, rate["clips_per_s"]), always=True)


def _read(asked: Asked, found: dict[str, float]) -> Values:
    """Clips per second of a core: of footage, or of motion videos where everything is tiny."""
    folder = asked.folder / "footage"
    if asked.tiny:
        write_set(folder, train=8, val=8, seed=0)
        keys = [f"data.train={folder}/train.csv", "model.image_size=48", "data.stride=1"]
    else:
        write_footage(folder, _VIDEOS)
        keys = [f"data.train={folder}/videos.csv", "data.clips_per_video=4"]
    rate = training_rate(load_recipe(None, keys), limit_s=1.0 if asked.tiny else _LIMIT_S)
    found["clips_per_s"] = rate.clips_per_s
    return {
        "clips_per_s_per_core": rate.clips_per_s,
        "decode_s": rate.seconds.decode,
        "transform_s": rate.seconds.transform,
        "cores_here": usable_cores(),
    }


def _cores(asked: Asked, clips_per_s: float) -> Values:
    """Cores like these that keep one device as busy as it was with clips made in memory."""
    rows = RowsFile(asked.folder / "speed.jsonl").read().rows
    speeds = {row.case: row.values["clips_per_s"] for row in rows if "clips_per_s" in row.values}
    return {case: math.ceil(speed / clips_per_s) for case, speed in speeds.items()}
