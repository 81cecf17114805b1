"""A user's mistake: one line that says what, where and what to do; exit code 2; no trace."""

import json
import os
import pickle

import pytest
import torch
from launching import DS_CONFIGS, deepspeed, run
from safetensors.torch import save_file

from everest_ds.config.finetuning import ClassifierConfig
from everest_ds.config.load import to_tree
from everest_ds.models import VideoClassifier
from everest_ds.models.weights import CONFIG_KEY

SMALL = (
    "data.stride=1 data.workers=0 data.crop_scales=[0.75] model.size=vit_micro model.image_size=48 "
    "model.decoder_depth=1 train.global_batch=4 train.max_steps=2 optim.warmup_steps=0"
).split()
ZERO1 = DS_CONFIGS / "zero1.json"


@pytest.fixture
def pretrain(one_rank):
    """The command, in a process that it shares with others."""
    return lambda *arguments, ds=ZERO1: one_rank.run("run/pretrain.py", "--ds_config", ds, *arguments)


@pytest.fixture
def finetune(one_rank):
    return lambda *arguments, ds=ZERO1: one_rank.run("run/finetune.py", "--ds_config", ds, *arguments)


def assert_one_line(done, told: str, command: str = "pretrain") -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    reports = [line for line in done.stderr.splitlines() if line.startswith(f"{command}: error: ")]
    assert len(reports) == 1, done.stderr
    assert told in reports[0]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["data.train=/nowhere/train.csv"], "/nowhere/train.csv"),
        ([], "data.train: no training manifest"),
        (["--recipe", "run/recipes/nothing.yaml"], "run/recipes/nothing.yaml: No such file"),
        (["model.keep_ration=0.3"], "did you mean 'model.keep_ratio'"),
        (["data.train=x.csv", "optim.layer_decay=0.75"], "optim.layer_decay"),
        (["model.frames=many"], "model.frames: expected a whole number"),
        (["model.keep_ratio=0.05"], "must be above model.visible_ratio"),
        (["model.image_size=50"], "50 is not divisible by model.patch"),
    ],
)
def test_mistakes_in_settings(pretrain, arguments, told):
    assert_one_line(pretrain(*SMALL, *arguments), told)


def test_a_folder_for_nvme_that_is_not_there(pretrain, motion_videos):
    done = pretrain(*SMALL, f"data.train={motion_videos}", ds=DS_CONFIGS / "zero3_nvme.json")
    assert_one_line(done, "offload_optimizer.nvme_path: /local_nvme is not a folder")


def test_a_mistake_in_a_process_of_its_own():
    """What a user's shell sees: nothing but the line, and the exit code."""
    done = run("run/pretrain.py", "--ds_config", ZERO1, *SMALL, "model.keep_ration=0.3")
    assert_one_line(done, "did you mean 'model.keep_ratio'")
    assert (done.stdout, done.stderr.count("\n")) == ("", 1)


def test_mistakes_that_need_a_manifest(pretrain, motion_videos, tmp_path):
    good = [*SMALL, f"data.train={motion_videos}", f"train.output_dir={tmp_path / 'run'}"]
    assert_one_line(pretrain(*good, ds=tmp_path / "none.json"), "none.json: No such file")
    fp16 = tmp_path / "fp16.json"
    fp16.write_text(json.dumps({"fp16": {"enabled": True}, "bf16": {"enabled": True}}))
    assert_one_line(pretrain(*good, ds=fp16), "bf16 and fp16 are both enabled")
    refused = tmp_path / "refused.json"
    refused.write_text(json.dumps({"zero_optimization": {"stage": 7}}))
    assert_one_line(pretrain(*good, ds=refused), "stage: expected 0, 1, 2 or 3, got 7")
    assert_one_line(pretrain(*good, "train.global_batch=1000"), "64 videos are fewer than the 1000")
    assert_one_line(pretrain(*good, "--resume", str(tmp_path)), "not a run directory")
    below_a_file = tmp_path / "fp16.json" / "run"
    assert_one_line(pretrain(*good, f"train.output_dir={below_a_file}"), "cannot write to")
    fp16.write_text(json.dumps({"fp16": {"enabled": True}}))
    half = torch.ops.mkldnn._is_mkldnn_fp16_supported()
    told = "DeepSpeed 0.19 divides by the loss scale" if half else "this accelerator does not support it"
    assert_one_line(pretrain(*good, ds=fp16), f"fp16: {told}")
    lamb = tmp_path / "lamb.json"
    lamb.write_text(json.dumps({"optimizer": {"type": "AdamWW", "params": {}}}))
    assert_one_line(pretrain(*good, ds=lamb), "AdamWW")
    zero3 = DS_CONFIGS / "zero3.json"
    assert_one_line(pretrain(*good, "train.compile=true", ds=zero3), "train.compile: under ZeRO-3 every step")
    auto = (*good, "train.micro_batch=auto")
    assert_one_line(pretrain(*auto, "train.global_batch=null"), "train.micro_batch=auto: give train.global_batch")
    assert_one_line(pretrain(*auto, "train.capacity=A100"), "train.capacity: 'A100' is neither a size")
    assert_one_line(pretrain(*auto, ds=refused), "stage: expected 0, 1, 2 or 3, got 7")
    assert_one_line(pretrain(*auto, "train.capacity=9MiB"), "even one clip does not fit")


def test_a_batch_that_the_ranks_cannot_share(motion_videos, tmp_path):
    """Under the launcher: one line in all, from rank 0, and the launcher passes the exit code on."""
    done = deepspeed(
        2,
        "run/pretrain.py",
        *("--ds_config", ZERO1, *SMALL, f"data.train={motion_videos}"),
        *("train.global_batch=5", f"train.output_dir={tmp_path / 'run'}"),
    )
    assert_one_line(done, "global batch 5 is not micro-batch 2 x accumulation 1 x ranks 2 = 4")


def test_resuming(pretrain, motion_videos, tmp_path):
    """A finished run is not written over, is not continued as another model, and continues with --resume auto."""
    folder = tmp_path / "run"
    command = [*SMALL, f"data.train={motion_videos}", f"train.output_dir={folder}", "train.log_every_steps=1"]
    first = pretrain(*command)
    assert first.returncode == 0, first.stderr
    assert_one_line(pretrain(*command), "already holds a run; continue it with --resume auto")
    assert_one_line(
        pretrain(*command, "--resume", "auto", "model.decoder_depth=2"),
        "is a run of another model (model.decoder_depth is 1 there and 2 here)",
    )
    longer = pretrain(*command, "--resume", "auto", "train.max_steps=4")
    assert longer.returncode == 0, longer.stderr
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert (folder / "config.until-step-2.yaml").is_file()
    for part in (folder / "checkpoints").glob("*/part-*"):
        part.write_bytes(part.read_bytes()[:1000])
    spoilt = (*command, "--resume", "auto", "train.max_steps=6")
    assert_one_line(pretrain(*spoilt), "no whole checkpoint in ")
    # In a process of its own too, which has joined a process group by then and must leave it.
    assert_one_line(run("run/pretrain.py", "--ds_config", ZERO1, *spoilt), "no whole checkpoint in ")


def test_mistakes_in_finetuning(finetune, motion_videos, tmp_path):
    """Labels, classes and weights that don't go together; each ends before anything is written."""
    folder = tmp_path / "run"
    good = [*SMALL, f"data.train={motion_videos}", f"data.val={motion_videos}", f"train.output_dir={folder}"]

    def refused(told: str, *arguments, ds=ZERO1):
        assert_one_line(finetune(*good, *arguments, ds=ds), told, "finetune")
        assert not folder.exists()

    empty, unlabelled, beyond = (tmp_path / f"{name}.csv" for name in ("empty", "unlabelled", "beyond"))
    empty.write_text("path,label\n")
    unlabelled.write_text("a.mp4\nb.mp4\n")
    beyond.write_text("a.mp4,3\nb.mp4,8\n")
    refused("lists no video", f"data.val={empty}")
    refused("has no label", f"data.train={unlabelled}")
    refused("b.mp4 has label 8, but the classifier knows classes 0 ... 7", f"data.val={beyond}")
    refused("has label 2, but the classifier knows classes 0 ... 1", "model.classes=2")
    refused("no such file", "--from", tmp_path / "nothing.safetensors")
    refused("whole parameters to average under ZeRO-3", "train.ema_decay=0.9", ds=DS_CONFIGS / "zero3.json")
    refused("ranks tokens without noise: rero or least", "model.selector=tube")
    refused("fit --phase finetune --classes 8 --model vit_micro", "train.micro_batch=auto", "train.capacity=9MiB")

    other = VideoClassifier(ClassifierConfig(size="vit_micro", image_size=48, classes=5))
    weights = tmp_path / "other.safetensors"
    save_file(other.state_dict(), weights, metadata={CONFIG_KEY: json.dumps(to_tree(other.config))})
    refused("has a head of 5 classes, this run 8; with train.new_head=true", "--from", weights, "model.classes=8")
    refused("but the classifier knows classes 0 ... 4", "--from", weights)
    refused(
        "has model.size = vit_micro, this run vit_small", "--from", weights, "model.size=vit_small", "model.classes=8"
    )
    dangerous = tmp_path / "dangerous.pth"
    ran = tmp_path / "ran"
    dangerous.write_bytes(pickle.dumps({"model": RunsCode(f"touch {ran}")}))
    refused("nor a state dict", "--from", dangerous)
    assert not ran.exists()
    # In a process of its own, too.
    own = run("run/finetune.py", "--ds_config", ZERO1, *good, "--from", weights)
    assert_one_line(own, "but the classifier knows classes 0 ... 4", "finetune")


class RunsCode:
    """Its pickle runs a command when it is read."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)
