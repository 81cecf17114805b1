"""The demo: motion videos written, EVEREST pre-trained on them by the real launcher, and what came out."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path

from deepspeed.accelerator import get_accelerator

from everest_ds.config.errors import UserError
from everest_ds.data.synthetic import write_set
from everest_ds.training import ranks
from everest_ds.training.pictures import draw_run
from everest_ds.training.run_dir import RunDir

ROOT = Path(__file__).parents[2]
RECIPE = Path("run/recipes/demo.yaml")
DS_CONFIG = Path("ds_configs/zero2.json")
CPU_RANKS = 2
MOST_RANKS = 16  # of the recipe's 32 clips per step, two from each video
TRAIN_VIDEOS, VAL_VIDEOS = 1000, 200


def run_demo(outputs: Path, overrides: list[str]) -> None:
    """Write videos, train, draw, and sum up.

    Args:
        outputs: folder for the videos (kept and used again) and for a new run directory.
        overrides: settings that override the demo recipe's.

    Raises:
        UserError: training failed; its own message stands above.
    """
    started = time.monotonic()
    videos = outputs / "demo-videos"
    write_set(videos, train=TRAIN_VIDEOS, val=VAL_VIDEOS, seed=0)
    run_dir = RunDir(next_free(outputs / "demo"))
    code = launch(count_ranks(), [f"data.train={videos / 'train.csv'}", f"train.output_dir={run_dir.path}", *overrides])
    if code:
        raise UserError(f"training ended with code {code}; its message stands above")
    picture = run_dir.path / "reconstruction.png"
    draw_run(run_dir.path, picture)
    print(summary(run_dir, picture, time.monotonic() - started))


def launch(count: int, overrides: list[str]) -> int:
    """Start pre-training under DeepSpeed's launcher and return its exit code."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "error"]
    command += ["--num_accelerators", str(count), "--master_port", str(ranks.free_port())]
    command += ["run/pretrain.py", "--ds_config", str(DS_CONFIG), "--recipe", str(RECIPE), *overrides]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def count_ranks() -> int:
    """One rank per device, as many as share the demo's batch evenly; on a machine without any, two CPU ranks."""
    if ranks.on_cpu():
        return CPU_RANKS
    return 2 ** int(math.log2(min(get_accelerator().device_count(), MOST_RANKS)))


def next_free(path: Path) -> Path:
    """Return ``path``, or ``path-2``, ``path-3``, ...: the first that isn't there."""
    candidates = (path if i == 1 else path.with_name(f"{path.name}-{i}") for i in range(1, sys.maxsize))
    return next(candidate for candidate in candidates if not candidate.exists())


def summary(run_dir: RunDir, picture: Path, seconds: float) -> str:
    """Say in a few lines what the run did and what to try next."""
    records = [json.loads(line) for line in run_dir.metrics.read_text(encoding="utf-8").splitlines()]
    first, last = records[0], records[-1]
    rates = sorted(record["clips_per_s"] for record in records)
    return "\n".join(
        [
            "",
            f"loss               {first['loss']:.3f} at step {first['step']}, "
            f"{last['loss']:.3f} at step {last['step']}",
            f"clips per second   {rates[len(rates) // 2]:.0f} (median)",
            f"peak memory        {last['peak_memory_bytes'] / 2**20:.0f} MiB on the rank that took most",
            f"time               {seconds:.0f} s, videos and start-up included",
            f"run directory      {run_dir.path}",
            f"reconstructions    {picture}",
            "next               the VideoMAE baseline in the same harness:",
            f"                   {Path(sys.executable).with_name('deepspeed')} --num_accelerators {count_ranks()} "
            f"run/pretrain.py --ds_config {DS_CONFIG} --recipe {RECIPE} model.method=videomae "
            f"data.train={run_dir.path.parent / 'demo-videos' / 'train.csv'} train.output_dir=outputs/demo-videomae",
        ]
    )
