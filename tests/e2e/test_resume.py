"""A run that ended continues where it was, under every ZeRO stage, in fp32, bf16 and fp16."""

import json
from pathlib import Path

import pytest
import torch
from launching import DS_CONFIGS, Console, losses, metrics, new_console
from safetensors.torch import load_file

BASE = (
    "data.stride=1 data.workers=0 data.crop_scales=[0.75] model.size=vit_micro model.image_size=48 "
    "model.decoder_depth=1 train.global_batch=4 train.log_every_steps=1 optim.warmup_steps=2 optim.base_lr=0.03"
).split()
CASES = [(stage, "fp32") for stage in ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")]
CASES += [("zero0", "bf16"), ("zero2", "bf16"), ("zero3", "bf16")]
HALF_MATMUL = torch.ops.mkldnn._is_mkldnn_fp16_supported()
CASES += [(stage, "fp16") for stage in ("zero1", "zero2", "zero3") if HALF_MATMUL]
FP16 = {"enabled": True, "initial_scale_power": 26, "hysteresis": 1}  # a scale that must overflow
STEPS, STOP = 6, 3


def command(folder: Path, manifest: Path, stage: str, precision: str, name: str, *settings: str) -> list[str | Path]:
    ds = json.loads((DS_CONFIGS / f"{stage}.json").read_text()) | {"bf16": {"enabled": precision == "bf16"}}
    if precision == "fp16":
        ds["fp16"] = FP16
    file = folder / f"{stage}-{precision}.json"
    file.write_text(json.dumps(ds))
    # The schedule spans STEPS in all: a constant rate is the same for either length.
    flat = ("optim.warmup_steps=0", "optim.min_lr=0.03")
    place = (f"data.train={manifest}", f"train.output_dir={folder / f'{stage}-{precision}-{name}'}")
    return ["run/pretrain.py", "--ds_config", file, *BASE, *place, *flat, *settings]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, motion_videos: Path, two_ranks: Console) -> Path:
    """For each case a straight run, and one that stops early and continues in processes that know nothing of it."""
    folder = tmp_path_factory.mktemp("resume")
    for case in CASES:
        two_ranks.succeed(*command(folder, motion_videos, *case, "straight", f"train.max_steps={STEPS}"))
        two_ranks.succeed(*command(folder, motion_videos, *case, "stopped", f"train.max_steps={STOP}"))
    with new_console(2, folder / "afresh") as afresh:
        for case in CASES:
            afresh.succeed(
                *command(folder, motion_videos, *case, "stopped", f"train.max_steps={STEPS}"), "--resume", "auto"
            )
    return folder


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_a_stopped_run_continues_as_if_it_had_not_stopped(runs, stage, precision):
    straight, stopped = (runs / f"{stage}-{precision}-{name}" for name in ("straight", "stopped"))
    assert [record["step"] for record in metrics(stopped)] == list(range(1, STEPS + 1))
    assert losses(stopped) == pytest.approx(losses(straight), rel=1e-6)


@pytest.mark.skipif(not HALF_MATMUL, reason="this CPU has no fp16 matrix product")
@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3"])
def test_fp16_shows_its_scale_and_counts_skipped_steps(runs, stage):
    last = metrics(runs / f"{stage}-fp16-straight")[-1]
    assert last["skipped_steps"] > 0
    assert last["loss_scale"] == 2 ** (FP16["initial_scale_power"] - last["skipped_steps"])


@pytest.mark.parametrize("stage", ["zero0", "zero2", "zero3"])
def test_exported_weights_are_the_fp32_masters(runs, stage):
    exported = load_file(runs / f"{stage}-bf16-straight/model.safetensors")
    weight = exported["decoder.head.weight"]
    assert weight.dtype == torch.float32
    assert not torch.equal(weight, weight.bfloat16().float())
    # Stages round sums of bf16 gradients differently, and Adam magnifies that where a gradient is next to nothing.
    alike = load_file(runs / "zero2-bf16-straight/model.safetensors")["decoder.head.weight"]
    assert (weight - alike).abs().mean() < 5e-5


def test_half_precision_trains_alike_under_every_stage(runs):
    """At stage 0 too, where DeepSpeed's own set-up would make the first steps shorter."""
    reference = losses(runs / "zero0-fp32-straight")
    for stage in ("zero0", "zero2", "zero3"):
        assert losses(runs / f"{stage}-bf16-straight") == pytest.approx(reference, rel=3e-3), stage
