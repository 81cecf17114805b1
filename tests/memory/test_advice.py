"""What is advised to a run that doesn't fit has been planned: its words, put into the command, fit."""

import dataclasses
import shlex

import pytest
from launching import DS_CONFIGS

from everest_ds.config.batches import ACCUMULATION, AUTO, GLOBAL, Batches
from everest_ds.config.batches import MICRO as CLIPS
from everest_ds.config.ds_config import load_ds_config
from everest_ds.config.finetuning import FinetuneRecipe
from everest_ds.config.load import load_as, load_recipe
from everest_ds.memory.advice import _ORDER, Stuck
from everest_ds.memory.plan import plan

MICRO = ("model.size=vit_micro", "model.image_size=64", "model.attention=eager")
FILES = {name: load_ds_config(DS_CONFIGS / f"{name}.json") for name in ("zero0", "zero2", "zero3_offload")}
RANKS = 2
BATCH = 16


def needed(*keys, ds=FILES["zero2"], kind=None, device="cpu"):
    """What a rank needs by the planner, with a command's words."""
    words, ds = [*MICRO, *keys], dict(ds)
    if "--ds_config" in words:
        ds = load_ds_config(words.pop(words.index("--ds_config") + 1))
        words.remove("--ds_config")
    recipe = load_recipe(None, words) if kind is None else load_as(kind, None, words)
    planned = plan(recipe, ds, ranks=RANKS, device_type=device)
    assert planned.batches.total == BATCH
    return planned.needed_bytes(planned.batches.micro)


def stuck(*keys, capacity_bytes, ds=FILES["zero2"], kind=None, device="cpu"):
    recipe = load_recipe(None, [*MICRO, *keys]) if kind is None else load_as(kind, None, [*MICRO, *keys])
    chosen = Batches(micro=1, accumulation=8, ranks=RANKS)
    batches = chosen if recipe.train.micro_batch == AUTO else Batches.resolve(recipe.train, ds, RANKS)
    return Stuck(recipe=recipe, ds_config=ds, batches=batches, capacity_bytes=capacity_bytes, device_type=device)


def check(way, *keys, **how):
    """The words, after those of the command, need what was said."""
    assert way.fits
    assert needed(*keys, *shlex.split(way.words), **how) == way.needed_bytes


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (("train.global_batch=16",), "train.micro_batch=2"),
        (("train.micro_batch=8",), "train.micro_batch=2 train.global_batch=16"),
        (("train.global_batch=16", "data.clips_per_video=2"), "train.micro_batch=2"),
    ],
)
def test_first_a_smaller_micro_batch_of_the_same_global_batch(keys, words):
    capacity = needed("train.global_batch=16", "train.micro_batch=2")
    way = stuck(*keys, capacity_bytes=capacity).best_way()
    assert way.words == words
    check(way, *keys)


def test_then_checkpointing_with_the_largest_micro_batch():
    keys = ("train.global_batch=16",)
    capacity = needed(*keys, "train.micro_batch=2", "model.checkpointing=full")
    assert capacity < needed(*keys, "train.micro_batch=1")
    way = stuck(*keys, capacity_bytes=capacity).best_way()
    assert way.words == "train.micro_batch=2 model.checkpointing=full"
    check(way, *keys)


def test_what_the_json_says_of_the_batch_stays():
    """No word of the command changes it, but for another JSON, with which all has to be said."""
    fixed = FILES["zero0"] | {"gradient_accumulation_steps": 1}
    keys = ("train.micro_batch=8",)
    capacity = needed(*keys, "model.checkpointing=full", ds=fixed)
    way = stuck(*keys, ds=fixed, capacity_bytes=capacity).best_way()
    assert way.words == "model.checkpointing=full"
    check(way, *keys, ds=fixed)
    ways = stuck(*keys, ds=fixed, capacity_bytes=1).ways()
    assert [next(ways).words for _ in range(2)] == [
        "model.checkpointing=full",
        "train.micro_batch=1 train.global_batch=16 --ds_config ds_configs/zero1.json",
    ]


def test_then_other_files_which_keep_the_precision_that_is_stated():
    """With one clip and checkpointing the states decide."""
    keys = ("train.global_batch=16", "train.micro_batch=1", "model.checkpointing=full", "model.decoder_width=768")
    capacity = needed(*keys, "--ds_config", str(DS_CONFIGS / "zero1.json"))
    way = stuck(*keys, ds=FILES["zero0"], capacity_bytes=capacity).best_way()
    assert way.words.endswith("--ds_config ds_configs/zero1.json")
    check(way, *keys)
    half = FILES["zero0"] | {"bf16": {"enabled": True}}
    assert stuck(*keys, ds=half, capacity_bytes=1).best_way() is None  # on a CPU the shipped files are fp32
    on_gpu = next(stuck(*keys, ds=half, capacity_bytes=1, device="cuda").ways())
    assert on_gpu.words == "--ds_config ds_configs/zero1.json"


def test_auto_is_left_to_choose():
    keys = ("train.global_batch=16", "train.micro_batch=auto")
    capacity = needed("train.global_batch=16", "train.micro_batch=1", "model.checkpointing=full")
    assert stuck(*keys, capacity_bytes=capacity).best_way().words == "model.checkpointing=full"


def test_a_classifier_checkpoints_its_encoder_and_averages_no_parts():
    keys = ("model.classes=4", "train.global_batch=16", "train.ema_decay=0.9")
    capacity = needed(*keys, "train.micro_batch=1", "model.checkpointing=encoder", kind=FinetuneRecipe)
    way = stuck(*keys, capacity_bytes=capacity, kind=FinetuneRecipe).best_way()
    assert way.words.endswith(" model.checkpointing=encoder")
    check(way, *keys, kind=FinetuneRecipe)
    tried = [way.words for way in stuck(*keys, capacity_bytes=1, kind=FinetuneRecipe).ways()]
    assert any("zero2_offload" in words for words in tried)
    assert not any("zero3" in words for words in tried)


def test_where_nothing_fits_the_least_is_found():
    keys = ("train.global_batch=16",)
    asked = stuck(*keys, capacity_bytes=1)
    way = asked.best_way()
    assert not way.fits
    assert way.needed_bytes == min(other.needed_bytes for other in asked.ways())
    assert needed(*keys, *shlex.split(way.words)) == way.needed_bytes


def test_the_shipped_files_leave_the_batch_open():
    for name in _ORDER:
        ds = load_ds_config(DS_CONFIGS / f"{name}.json")
        assert {ds.get(key, AUTO) for key in (GLOBAL, CLIPS, ACCUMULATION)} == {AUTO}


def test_offload_is_for_hosts_that_have_room():
    """With one clip and checkpointing the states decide."""
    keys = ("train.global_batch=16", "train.micro_batch=1", "model.checkpointing=full", "model.decoder_width=768")
    offload = str(DS_CONFIGS / "zero2_offload.json")
    capacity = needed(*keys, "--ds_config", offload, device="cuda")
    asked = stuck(*keys, ds=FILES["zero0"], capacity_bytes=capacity, device="cuda")
    assert asked.best_way().words.endswith("zero2_offload.json")
    assert not dataclasses.replace(asked, host_bytes=1).best_way().fits


def test_a_precision_that_nobody_stated_stays_too():
    """Without a word of it DeepSpeed trains in fp32, and the shipped files would choose bf16 on a GPU."""
    plain = {"zero_optimization": {"stage": 0}}
    assert stuck(
        "train.micro_batch=8", "model.checkpointing=full", ds=plain, capacity_bytes=1, device="cuda"
    )._files().keys() == {""}
