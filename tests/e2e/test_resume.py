"""A run that ended continues where it was, under every ZeRO stage, in fp32, bf16 and fp16."""

import json
from pathlib import Path

import pytest
from launching import DS_CONFIGS, ROOT, deepspeed, losses, metrics

BASE = (
    "data.stride=1 data.workers=0 data.crop_scales=[0.75] model.size=vit_micro model.image_size=48 "
    "model.decoder_depth=1 train.global_batch=4 train.log_every_steps=1 optim.warmup_steps=2 optim.base_lr=0.03"
).split()
CASES = [(stage, "fp32") for stage in ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")]
CASES += [("zero0", "bf16"), ("zero2", "bf16"), ("zero3", "bf16"), ("zero2", "fp16")]
STEPS, STOP = 6, 3


def spec(folder: Path, manifest: Path, stage: str, precision: str, name: str, *settings: str) -> dict:
    ds = json.loads((DS_CONFIGS / f"{stage}.json").read_text()) | {"bf16": {"enabled": precision == "bf16"}}
    if precision == "fp16":
        ds["fp16"] = {"enabled": True, "initial_scale_power": 8}
    place = (f"data.train={manifest}", f"train.output_dir={folder / f'{stage}-{precision}-{name}'}")
    return {"overrides": [*BASE, *place, *settings], "ds": ds}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, motion_videos: Path) -> Path:
    """For each case a straight run, and one that stops early and continues in another launch."""
    folder = tmp_path_factory.mktemp("resume")
    first, second = [], []
    for stage, precision in CASES:
        common = (folder, motion_videos, stage, precision)
        # The schedule spans STEPS in both: a constant rate is the same for either length.
        flat = ("optim.warmup_steps=0", "optim.min_lr=0.03")
        first.append(spec(*common, "straight", f"train.max_steps={STEPS}", *flat))
        first.append(spec(*common, "stopped", f"train.max_steps={STOP}", *flat))
        second.append(spec(*common, "stopped", f"train.max_steps={STEPS}", "train.resume=auto", *flat))
    for name, specs in (("first", first), ("second", second)):
        file = folder / f"{name}.json"
        file.write_text(json.dumps(specs))
        done = deepspeed(2, ROOT / "tests/e2e/many_runs.py", file)
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_a_stopped_run_continues_as_if_it_had_not_stopped(runs, stage, precision):
    straight, stopped = (runs / f"{stage}-{precision}-{name}" for name in ("straight", "stopped"))
    assert [record["step"] for record in metrics(stopped)] == list(range(1, STEPS + 1))
    assert losses(stopped) == pytest.approx(losses(straight), rel=1e-6)


def test_fp16_reports_its_scale(runs):
    record = metrics(runs / "zero2-fp16-straight")[-1]
    assert record["loss_scale"] > 0
    assert record["skipped_steps"] >= 0
