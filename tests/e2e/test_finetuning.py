"""Fine-tuning under every ZeRO stage, resumed, with averaged weights; and the way from videos to accuracy."""

import csv
import json
from pathlib import Path

import pytest
import torch
from launching import DS_CONFIGS, Console, check_memory_record, deepspeed, losses, metrics
from safetensors.torch import load_file

import everest_ds
from everest_ds.data.synthetic import write_motion_videos
from everest_ds.models import VideoClassifier

CLIP = "data.stride=1 data.workers=0 data.crop_scales=[0.75] data.crop=multiscale data.flip=false".split()
BASE = [
    *CLIP,
    *"train.global_batch=8 train.max_steps=6 train.log_every_steps=1 optim.warmup_steps=2 optim.base_lr=0.03".split(),
    *"data.clips_per_video=2 train.validate_every_epochs=0.125".split(),
]
STAGES = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")


def validations(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "validation.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def few_videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """17 videos, which no number of ranks divides."""
    return write_motion_videos(tmp_path_factory.mktemp("few"), 17, seed=8, size=64)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, motion_videos: Path, few_videos: Path, two_ranks: Console) -> Path:
    """Two ranks pre-train, then fine-tune from it in many ways."""
    folder, log = tmp_path_factory.mktemp("finetuning"), []

    def ds(stage: str) -> Path:
        config = json.loads((DS_CONFIGS / f"{stage}.json").read_text())
        if stage.startswith("zero3"):  # small tensors must be partitioned too
            config["zero_optimization"]["stage3_param_persistence_threshold"] = 100
        file = folder / f"{stage}.json"
        file.write_text(json.dumps(config))
        return file

    def tune(name: str, stage: str, *settings: str, code: int = 0) -> None:
        place = [f"data.train={motion_videos}", f"data.val={few_videos}", f"train.output_dir={folder / name}"]
        source = ["--ds_config", ds(stage), "--from", folder / "pretrained"]
        done = two_ranks.run("run/finetune.py", *source, *BASE, *place, *settings)
        assert done.returncode == code, done.stderr[-3000:]
        log.append(done.stderr)

    small = "model.size=vit_micro model.image_size=48 model.decoder_depth=1 model.positions=separable".split()
    pretrained = [*CLIP, *small, f"data.train={motion_videos}", f"train.output_dir={folder / 'pretrained'}"]
    length = ["train.global_batch=8", "train.max_steps=2"]
    two_ranks.succeed("run/pretrain.py", "--ds_config", ds("zero2"), *pretrained, *length)
    for stage in STAGES:
        tune(stage, stage)
    tune("checkpointed", "zero2", "model.checkpointing=encoder")
    tune("averaged", "zero2", "train.ema_decay=0.9")
    tune("averaged-unvalidated", "zero2", "train.ema_decay=0.9", "train.validate_every_epochs=0")
    tune("zero3-unvalidated", "zero3", "train.validate_every_epochs=0")
    tune("stopped", "zero2", "train.ema_decay=0.9", "train.max_minutes=1e-9", code=75)
    tune("stopped", "zero2", "train.ema_decay=0.9", "--resume", "auto")
    tune("plain", "zero1", "augment.mixup=0", "augment.cutmix=0", "augment.rand_augment_ops=0")
    (folder / "log.txt").write_text("".join(log))
    return folder


@pytest.mark.parametrize("name", [*STAGES[1:], "checkpointed"])
def test_stages_offload_and_checkpointing_train_alike(runs, name):
    assert losses(runs / name) == pytest.approx(losses(runs / "zero0"), rel=1e-4)
    assert [v["top1"] for v in validations(runs / name)] == [v["top1"] for v in validations(runs / "zero0")]


def test_every_video_is_validated_once(runs):
    """Eight times in a pass over the videos, of 16 steps here, and at the end; also where a run was stopped."""
    for name in ("zero0", "stopped"):
        found = validations(runs / name)
        assert [(v["step"], v["videos"]) for v in found] == [(2, 17), (4, 17), (6, 17)]
    for record in found:
        assert (17 * record["top1"]) == pytest.approx(round(17 * record["top1"]))


@pytest.mark.parametrize("name", ["zero3", "averaged"])
def test_validating_changes_nothing(runs, name):
    """Not the losses after it, not the weights: the averaged ones are in place for that long only."""
    assert losses(runs / f"{name}-unvalidated") == losses(runs / name)
    assert [v["step"] for v in validations(runs / f"{name}-unvalidated")] == [6]
    ours, theirs = (load_file(runs / n / "model.safetensors") for n in (name, f"{name}-unvalidated"))
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_layers_learn_at_their_own_rates(runs):
    """The first block moves by about 0.75 ** 4 of what the head moves: Adam's steps are as long as the rate."""
    before = load_file(runs / "pretrained/model.safetensors")
    after = load_file(runs / "zero0/model.safetensors")
    moved = {i: (after[f"blocks.{i}.mlp.fc1.weight"] - before[f"encoder.blocks.{i}.mlp.fc1.weight"]) for i in (0, 3)}
    ratio = moved[0].abs().mean() / moved[3].abs().mean()
    assert ratio == pytest.approx(0.75**3, rel=0.25)


def test_a_stopped_run_continues_with_its_average(runs):
    assert losses(runs / "stopped") == pytest.approx(losses(runs / "averaged"), rel=1e-6)
    straight, stopped = (load_file(runs / name / "model.safetensors") for name in ("averaged", "stopped"))
    last = load_file(runs / "zero2/model.safetensors")
    for name, value in straight.items():
        torch.testing.assert_close(stopped[name], value, rtol=1e-6, atol=1e-7)
    assert not torch.equal(straight["head.weight"], last["head.weight"])


def test_the_run_says_what_of_the_weights_matched(runs):
    log = (runs / "log.txt").read_text()
    assert "50 tensors loaded, 4 new (fc_norm.weight, fc_norm.bias, head.weight, head.bias)" in log
    assert "vit_micro classifier" in log
    assert log.count("not used (decoder.blocks: 12") == len(STAGES) + 7


@pytest.mark.parametrize("name", [*STAGES, "checkpointed", "averaged", "stopped", "plain"])
def test_tensors_held_are_those_predicted(runs, name):
    record = check_memory_record(runs / name)
    assert [rank["rank"] for rank in record["per_rank"]] == [0, 1]
    assert ("averaged weights" in record["measured"]["held"]["device"]) == (name in ("averaged", "stopped"))


def test_a_continued_run_keeps_what_it_took_before(runs):
    """Stopped after a step, which is exit code 75."""
    found = [json.loads((runs / "stopped" / name).read_text()) for name in ("memory.until-step-1.json", "memory.json")]
    assert [record["steps"] for record in found] == [[0, 1], [1, 6]]


def test_a_finished_run_loads_as_a_classifier(runs):
    model = everest_ds.load_pretrained(runs / "plain")
    assert isinstance(model, VideoClassifier)
    assert model.config.classes == 8
    assert model(torch.zeros(1, 3, 16, 48, 48, dtype=torch.uint8)).shape == (1, 8)
    assert [record["step"] for record in metrics(runs / "plain")] == [1, 2, 3, 4, 5, 6]


def test_from_videos_to_accuracy(tmp_path, motion_videos, few_videos, two_ranks):
    """The three commands of the README on two ranks: pre-train, fine-tune (in a launch of its own), evaluate."""
    pretrained, tuned = tmp_path / "pretrained", tmp_path / "tuned"
    zero2 = ("--ds_config", DS_CONFIGS / "zero2.json")
    videos = (*CLIP, f"data.train={motion_videos}", "train.global_batch=8", "train.max_steps=4")
    small = ("model.size=vit_micro", "model.image_size=48", "model.decoder_depth=1")
    two_ranks.succeed("run/pretrain.py", *zero2, *videos, *small, f"train.output_dir={pretrained}")
    second = deepspeed(
        2,
        *("run/finetune.py", *zero2, "--from", pretrained, *videos),
        *(f"data.val={few_videos}", f"train.output_dir={tuned}"),
    )
    assert second.returncode == 0, second.stderr[-3000:]
    two_ranks.succeed("run/evaluate.py", "--from", tuned, "--split", "val", "test.clips=1", "test.crops=1")
    scores = json.loads((tuned / "evaluation/scores.json").read_text())
    assert scores["top1"] == pytest.approx(validations(tuned)[-1]["top1"])
    with (tuned / "evaluation/predictions.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 17


def test_labels_that_look_wrong_are_told_once(tmp_path, few_videos, two_ranks):
    """Counted from 1 to train on and from 0 to validate on, the same videos, one of them with two labels."""
    listed = [line.split(",") for line in few_videos.read_text().splitlines()[1:]]
    train = [(few_videos.parent / name, int(label) + 1) for name, label in listed]
    lines = [f"{path},{label}" for path, label in [*train, (train[0][0], train[0][1] + 1)]]
    (tmp_path / "train.csv").write_text("\n".join(lines))
    place = (f"data.train={tmp_path / 'train.csv'}", f"data.val={few_videos}", f"train.output_dir={tmp_path / 'run'}")
    small = ("model.size=vit_micro", "model.image_size=48", "train.global_batch=4", "train.max_steps=1")
    done = two_ranks.succeed("run/finetune.py", "--ds_config", DS_CONFIGS / "zero1.json", *CLIP, *small, *place)
    first, label = train[0]
    for told in (
        "of 9 classes, counted from 0, data.train has no video of 0, data.val has none of 8",
        f"data.train: 1 video has more than one label, such as {first} ({label} and {label + 1})",
        f"data.val: 17 of 17 videos are in data.train, too (17 with another label), such as {first}: accuracy on",
    ):
        assert sum(f"WARNING: {told}" in line for line in done.stderr.splitlines()) == 1, done.stderr
