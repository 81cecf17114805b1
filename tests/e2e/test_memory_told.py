"""Before two ranks build their model they hear what it will take; at the end ``memory.json`` says what it took."""

import json

import pytest
from launching import DS_CONFIGS, check_memory_record

from everest_ds.memory.gpus import size

CLIP = "data.stride=1 data.workers=0 data.crop_scales=[0.75] optim.warmup_steps=0 train.max_steps=3".split()
SMALL = "model.size=vit_micro model.image_size=48 model.decoder_depth=1 train.global_batch=8".split()
# A clip takes 1.4 GiB, so that 4096 of them fit no machine.
HUGE = "model.size=vit_micro model.method=videomae model.attention=eager train.global_batch=4096".split()


@pytest.fixture
def many_videos(motion_videos, tmp_path):
    """Enough for that batch: the same again and again."""
    _, *videos = motion_videos.read_text().splitlines()
    listed = tmp_path / "many.csv"
    listed.write_text("\n".join(f"{motion_videos.parent / video}" for video in videos * 64))
    return listed


@pytest.mark.parametrize("stage", range(4))
def test_tensors_held_in_bf16_are_those_predicted(two_ranks, motion_videos, tmp_path, stage):
    ds_config, run_dir = tmp_path / "bf16.json", tmp_path / "run"
    zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 100} if stage == 3 else {})
    ds_config.write_text(json.dumps({"bf16": {"enabled": True}, "zero_optimization": zero}))
    place = (f"data.train={motion_videos}", f"train.output_dir={run_dir}")
    done = two_ranks.succeed("run/pretrain.py", "--ds_config", ds_config, *CLIP, *SMALL, *place)
    record = check_memory_record(run_dir)
    assert "fp32 master parameters" in record["measured"]["held"]["device"]
    first, last = (line for line in done.stderr.splitlines() if line.startswith("memory: "))
    # Not the plan's own peak, in which DeepSpeed's buckets are as large as it makes them, though nothing is in them.
    peak = record["difference"]["peak"]
    predicted = peak["predicted_bytes"]
    assert predicted < peak["measured_bytes"]
    assert first.startswith(
        f"memory: predicted peak {size(predicted)} per rank at micro-batch 4, {size(2 * predicted)} for the 2 ranks of "
        "this machine; "
    )
    assert last.endswith(f"; {run_dir / 'memory.json'}")


def test_what_fits_no_machine_is_refused_in_one_line(two_ranks, many_videos, tmp_path):
    """On every rank, of which the first speaks; nothing is written."""
    run_dir = tmp_path / "run"
    place = (f"data.train={many_videos}", f"train.output_dir={run_dir}")
    done = two_ranks.run("run/pretrain.py", "--ds_config", DS_CONFIGS / "zero2.json", *CLIP, *HUGE, *place)
    assert done.returncode == 2, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    (line,) = (line for line in done.stderr.splitlines() if "error: " in line)
    assert "(one part in 2 of the free memory); what fits, with " in line
    assert "the same command with train.micro_batch=" in line
    assert not run_dir.exists()
