"""Read every video of a manifest as training does, in a process of its own: what crashes here crashes no test.

``python tests/read_videos.py MANIFEST RESULT`` writes which videos were used, by index, and which were bad, by path.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from everest_ds.config.errors import one_line_errors
from everest_ds.config.schema import DataConfig
from everest_ds.data.dataset import ClipDataset
from everest_ds.data.loader import StepSampler, build_loader
from everest_ds.data.manifest import read_manifest

WORKERS = 2
MICRO_BATCH = 4


def main(manifest: str, result: str) -> None:
    """Read one epoch."""
    entries = read_manifest(manifest)
    config = DataConfig(workers=WORKERS, prefetch=2, stride=1, timeout_s=30)
    dataset = ClipDataset(entries, config, frames=8, image_size=32, tokens=16, seed=0)
    steps = StepSampler(len(entries), seed=0, micro_batch=MICRO_BATCH).steps_per_epoch
    batches = StepSampler(len(entries), seed=0, micro_batch=MICRO_BATCH, last_step=steps)
    used: set[int] = set()
    bad: dict[str, str] = {}
    for batch in build_loader(dataset, batches):
        assert batch.clips.shape == (MICRO_BATCH, 3, 8, 32, 32)
        used.update(batch.index.tolist())
        bad.update(batch.bad)
    Path(result).write_text(json.dumps({"used": sorted(used), "bad": bad}))


if __name__ == "__main__":
    with one_line_errors("read_videos"):
        main(*sys.argv[1:])
