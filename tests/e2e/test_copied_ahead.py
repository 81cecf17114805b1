"""Runs whose clips are copied a batch ahead, as on a GPU: the same samples, losses and counts, also when continued."""

from pathlib import Path

from launching import DS_CONFIGS, Console, metrics

STEPS, STOP = 5, 3
SETTINGS = (
    "data.stride=1 data.workers=1 data.crop_scales=[0.75] data.max_bad_share=0.9 model.size=vit_micro "
    "model.image_size=48 model.decoder_depth=1 train.micro_batch=2 train.global_batch=8 train.log_every_steps=1 "
    "optim.warmup_steps=0 optim.min_lr=0.03 optim.base_lr=0.03"
).split()


def train(console: Console, manifest: Path, folder: Path, steps: int, *before: str) -> list[dict[str, float]]:
    place = (f"data.train={manifest}", f"train.output_dir={folder}", f"train.max_steps={steps}")
    command = ("run/pretrain.py", "--ds_config", DS_CONFIGS / "zero2.json", *SETTINGS, *place, "--resume", "auto")
    console.succeed(*before, *command)
    return [{key: record[key] for key in ("step", "loss", "grad_norm", "bad_samples")} for record in metrics(folder)]


def test_nothing_changes(motion_videos: Path, two_ranks: Console, tmp_path: Path) -> None:
    header, *good = motion_videos.read_text().splitlines()
    good = [f"{motion_videos.parent}/{line}" for line in good[:20]]
    bad = [f"{tmp_path}/none-{number}.mp4,0" for number in range(20)]
    manifest = tmp_path / "some-bad.csv"
    manifest.write_text("\n".join([header, *good, *bad]))
    expected = train(two_ranks, manifest, tmp_path / "plain", STEPS)
    assert expected[-1]["bad_samples"] > expected[0]["bad_samples"] > 0
    assert train(two_ranks, manifest, tmp_path / "ahead", STEPS, "tests/host_copy.py") == expected
    train(two_ranks, manifest, tmp_path / "stopped", STOP, "tests/host_copy.py")
    assert train(two_ranks, manifest, tmp_path / "stopped", STEPS, "tests/host_copy.py") == expected
