"""A run that changes its number of ranks and its ZeRO stage in the middle."""

import json
from pathlib import Path

import pytest
from killing import pretraining
from launching import DS_CONFIGS, losses, new_console

THIRD, STEPS = 6, 18
SETTINGS = ("train.log_every_steps=1", "optim.warmup_steps=0", "optim.min_lr=0.01", "optim.base_lr=0.01")


def in_pairs(folder: Path) -> Path:
    """ZeRO-3 with a second copy of the parameters in each pair of ranks, as if a node had two."""
    ds = json.loads((DS_CONFIGS / "zero3_hpz.json").read_text())
    ds["zero_optimization"] |= {"zero_hpz_partition_size": 2, "stage3_param_persistence_threshold": 100}
    file = folder / "hpz.json"
    file.write_text(json.dumps(ds))
    return file


def test_two_ranks_then_one_then_four(motion_videos, tmp_path, one_rank, two_ranks):
    """ZeRO-2 on 2 ranks, stage 0 on 1, ZeRO-3 with hpZ on 4: the same samples in the same order, the same losses."""
    files = {"zero3": in_pairs(tmp_path)} | {name: DS_CONFIGS / f"{name}.json" for name in ("zero2", "zero0")}
    stages = {name: pretraining(motion_videos, STEPS, file) for name, file in files.items()}
    two_ranks.succeed(*stages["zero2"].command(tmp_path / "straight", *SETTINGS))
    moved = tmp_path / "moved"
    two_ranks.succeed(*stages["zero2"].command(moved, *SETTINGS, f"train.max_steps={THIRD}"))
    second = one_rank.succeed(*stages["zero0"].command(moved, *SETTINGS, f"train.max_steps={2 * THIRD}"))
    with new_console(4, tmp_path / "four") as four_ranks:
        third = four_ranks.succeed(*stages["zero3"].command(moved, *SETTINGS))
    told = "step {} ({}, global batch 4); from here on {}, global batch 4"
    two, one, four = "2 ranks, ZeRO-2, fp32", "1 rank, ZeRO-0, fp32", "4 ranks, ZeRO-3, fp32"
    assert told.format(THIRD, two, one) in second.stderr
    assert told.format(2 * THIRD, one, four) in third.stderr
    assert losses(moved) == pytest.approx(losses(tmp_path / "straight"), rel=1e-4)


def test_the_global_batch_stays_where_the_micro_batch_is_what_was_said(motion_videos, tmp_path, one_rank, two_ranks):
    """2 ranks of 3 clips; then 1 rank, whose micro-batch of 4 doesn't divide 6 and becomes 3, in two passes."""
    case = pretraining(motion_videos, 4)
    said = ("train.global_batch=null", "train.max_steps=2")
    two_ranks.succeed(*case.command(tmp_path / "run", *said, "train.micro_batch=3"))
    done = one_rank.succeed(*case.command(tmp_path / "run", *said, "train.max_steps=4", "train.micro_batch=4"))
    assert "global batch 6 = micro-batch 3 x accumulation 2 x ranks 1; steps 2 to 4" in done.stderr


def test_an_automatic_micro_batch_goes_along(motion_videos, tmp_path, one_rank, two_ranks):
    """Each number of ranks has its own, and the global batch is the run's, said again or not."""
    case = pretraining(motion_videos, 2)
    said = ("train.micro_batch=auto", "data.clips_per_video=2")
    first = two_ranks.succeed(*case.command(tmp_path / "run", *said, "train.global_batch=8", "train.max_steps=1"))
    second = one_rank.succeed(*case.command(tmp_path / "run", *said, "train.global_batch=null"))
    assert first.stderr.count("train.micro_batch=auto: micro-batch 4 x accumulation 1 x ranks 2; predicted peak") == 1
    assert "train.micro_batch=auto: micro-batch 8 x accumulation 1 x ranks 1; predicted peak" in second.stderr
    assert "less 5%" in second.stderr
    assert "global batch 8 = micro-batch 8 x accumulation 1 x ranks 1; steps 1 to 2" in second.stderr
