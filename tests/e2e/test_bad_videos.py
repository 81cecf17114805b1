"""Unreadable files among good ones: the run finishes, names and counts them; nothing readable: exit code 2."""

from pathlib import Path

import pytest
from launching import DS_CONFIGS, Console, metrics
from video_files import moving_frames, write_bad_files, write_video

SETTINGS = (
    "data.stride=1 data.workers=1 model.size=vit_micro model.image_size=48 model.decoder_depth=1 "
    "train.global_batch=4 train.log_every_steps=1 optim.warmup_steps=0"
).split()


@pytest.fixture
def bad_files(tmp_path: Path) -> dict[str, Path]:
    return write_bad_files(tmp_path, write_video(tmp_path / "whole.mp4", moving_frames(40)))


def pretrain(two_ranks: Console, manifest: Path, run_dir: Path, *settings: str):
    return two_ranks.run(
        "run/pretrain.py",
        *("--ds_config", DS_CONFIGS / "zero1.json", f"data.train={manifest}", f"train.output_dir={run_dir}"),
        *SETTINGS,
        *settings,
    )


def test_a_run_survives_its_bad_videos(two_ranks, motion_videos, bad_files, tmp_path):
    one_frame = write_video(tmp_path / "one_frame.mp4", moving_frames(1))
    manifest = tmp_path / "train.csv"
    good = [str(motion_videos.parent / line.split(",")[0]) for line in motion_videos.read_text().split()[1:]]
    manifest.write_text("\n".join([*good, str(one_frame), *map(str, bad_files.values())]) + "\n")
    # Two epochs, so that every video is asked for at least once.
    steps = 2 * (len(good) + 1 + len(bad_files)) // 4
    done = pretrain(two_ranks, manifest, tmp_path / "run", f"train.max_steps={steps}", "data.max_bad_share=0.5")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    named = [line for line in done.stderr.splitlines() if "unreadable video" in line]
    for path in bad_files.values():
        assert sum(str(path) in line for line in named) == 1, path
    assert str(one_frame) not in "".join(named)
    last = metrics(tmp_path / "run")[-1]
    assert last["step"] == steps
    assert last["bad_samples"] >= len(bad_files)


def test_nothing_readable_ends_the_run_with_the_reasons(two_ranks, bad_files, tmp_path):
    manifest = tmp_path / "train.csv"
    manifest.write_text("\n".join(str(path) for path in bad_files.values()) + "\n")
    done = pretrain(two_ranks, manifest, tmp_path / "run", "train.max_steps=2")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (report,) = [line for line in done.stderr.splitlines() if line.startswith("pretrain: error: ")]
    assert "no readable video was found" in report
    assert "empty file" in report
