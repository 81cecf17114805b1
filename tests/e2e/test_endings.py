"""How a run ends other than by finishing: out of time (75, saved), numbers gone wrong (3, not saved)."""

import json

from launching import DS_CONFIGS, check_memory_record, run

SETTINGS = (
    "data.stride=1 data.workers=0 data.crop_scales=[0.75] model.size=vit_micro model.image_size=48 "
    "model.decoder_depth=1 train.global_batch=4 train.max_steps=8 train.log_every_steps=1 optim.warmup_steps=0"
).split()


def command(manifest, run_dir, *settings):
    place = (f"data.train={manifest}", f"train.output_dir={run_dir}")
    return ("run/pretrain.py", "--ds_config", DS_CONFIGS / "zero2.json", *SETTINGS, *place, *settings)


def test_out_of_time_saves_and_asks_to_be_restarted(motion_videos, tmp_path, one_rank):
    """In a process of its own, where the exit code is one that a scheduler sees."""
    folder = tmp_path / "run"
    done = run(*command(motion_videos, folder, "train.max_minutes=0.00001"))
    assert done.returncode == 75, done.stderr
    assert "continue with --resume auto" in done.stderr
    assert (folder / "checkpoints/latest").read_text() == "step-00000001"
    one_rank.succeed(*command(motion_videos, folder, "--resume", "auto"))
    assert (folder / "checkpoints/latest").read_text() == "step-00000008"
    assert (folder / "model.safetensors").is_file()


def test_a_loss_that_is_not_finite_stops_the_run_unsaved(motion_videos, tmp_path, one_rank):
    folder = tmp_path / "run"
    done = one_rank.run(*command(motion_videos, folder, "optim.base_lr=9e15", "train.max_bad_steps=2"))
    assert done.returncode == 3, done.stderr
    assert "not finite" in done.stderr
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["loss"] for record in records[-2:]] == [None, None]
    assert check_memory_record(folder)["steps"] == [0, len(records)]
    assert not (folder / "checkpoints").exists()


def test_numbers_that_go_wrong_between_logged_steps_are_not_saved(motion_videos, tmp_path, one_rank):
    folder = tmp_path / "run"
    rarely = ("train.log_every_steps=100", "train.save_every_steps=3", "train.max_bad_steps=5")
    done = one_rank.run(*command(motion_videos, folder, "optim.base_lr=9e15", *rarely))
    assert done.returncode == 3, done.stderr
    assert not (folder / "checkpoints").exists()
    assert not (folder / "model.safetensors").exists()


def test_a_run_continues_in_another_folder(motion_videos, tmp_path, one_rank):
    first, second = tmp_path / "first", tmp_path / "second"
    one_rank.succeed(*command(motion_videos, first, "train.max_steps=2"))
    before = (first / "metrics.jsonl").read_bytes()
    one_rank.succeed(*command(motion_videos, second, "--resume", str(first), "train.max_steps=3"))
    assert (first / "metrics.jsonl").read_bytes() == before
    assert json.loads((second / "metrics.jsonl").read_text())["step"] == 3
