"""``train.micro_batch=auto``: how much room there is, and what is said; tests/e2e/test_micro_batch.py really trains."""

import re

import pytest
import torch
from launching import DS_CONFIGS

from everest_ds.config.ds_config import load_ds_config
from everest_ds.config.errors import UserError
from everest_ds.config.load import load_recipe
from everest_ds.memory import meters
from everest_ds.memory.gpus import GIB, parse_capacity
from everest_ds.memory.plan import plan
from everest_ds.training import micro_batch, ranks
from everest_ds.training.engine import resolve
from everest_ds.training.micro_batch import fill_micro_batch
from everest_ds.training.out_of_memory import explained
from everest_ds.training.room import Room, smallest_room

MIB = 2**20
DS = load_ds_config(DS_CONFIGS / "zero2.json")
KEYS = ("model.size=vit_micro", "model.image_size=64", "train.micro_batch=auto", "train.global_batch=12")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No process group."""
    monkeypatch.setattr(ranks, "start", lambda: None)


def needed(*keys, micro):
    recipe = load_recipe(None, [*KEYS, *keys, f"train.micro_batch={micro}"])
    return plan(recipe, DS, ranks=1, device_type="cpu").needed_bytes(micro)


def test_the_choice_is_said_in_a_line(monkeypatch):
    room = Room(needed(micro=4) + 1, "tested")
    monkeypatch.setattr(micro_batch, "smallest_room", lambda *_: room)
    recipe, lines, used = fill_micro_batch(load_recipe(None, KEYS), DS)
    assert used == room
    assert (recipe.train.micro_batch, recipe.train.global_batch) == (4, 12)
    assert lines == [
        "train.micro_batch=auto: micro-batch 4 x accumulation 3 x ranks 1; predicted peak "
        f"{(room.size_bytes - 1) / GIB:.2f} GiB per rank of {room.size_bytes / GIB:.2f} GiB (tested)"
    ]


def test_numbers_are_left_as_they_are():
    recipe = load_recipe(None, [*KEYS, "train.micro_batch=3"])
    assert fill_micro_batch(recipe, DS) == (recipe, [], None)


@pytest.mark.parametrize("fits", [True, False])
def test_where_nothing_fits_what_would_is_named(monkeypatch, fits):
    keys = ("model.frame_selection.alpha=1.5", "model.image_size=128")
    full = needed(*keys, "model.checkpointing=full", micro=1)
    room = Room(full if fits else MIB, "tested")
    assert room.size_bytes < needed(*keys, micro=1)
    monkeypatch.setattr(micro_batch, "smallest_room", lambda *_: room)
    with pytest.raises(UserError) as refused:
        fill_micro_batch(load_recipe(None, [*KEYS, *keys]), DS)
    told = (
        r"what fits, with \d+\.\d MiB: the same command with model\.checkpointing=full"
        if fits
        else r"nothing that was tried fits \(model\.checkpointing=full( --ds_config ds_configs/\w+\.json)? needs "
        r"least, \d+\.\d MiB\): take a smaller model, more ranks or more memory; what a rank can hold: python "
        r"tools/memprof fit --method everest --model vit_micro --world-size 1 --capacity 1MiB --device cpu "
        r"model\.image_size=128 model\.frame_selection\.alpha=1\.5"
    )
    even = r"train\.micro_batch=auto: even one clip does not fit: 0\.\d\d GiB per rank, of 0\.\d\d GiB \(tested\); "
    assert re.fullmatch(even + told, str(refused.value))


def test_the_rank_with_least_room_counts(monkeypatch):
    smaller = Room(5, "another rank's")
    monkeypatch.setattr(ranks, "gather", lambda value: [value, smaller])
    assert smallest_room(None) == smaller


def test_room_on_a_cpu(monkeypatch):
    libraries, held = 128 * MIB, 300 * MIB
    monkeypatch.setattr(meters, "available_bytes", lambda device: 4 * GIB)
    monkeypatch.setattr(meters, "resident_bytes", lambda: held)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    free = 2 * GIB - libraries
    assert smallest_room(None) == (free, "one part in 2 of the free memory", 0.05)
    stated = smallest_room(parse_capacity("1GiB"))
    assert stated.size_bytes == GIB - held - libraries
    assert stated.origin == "train.capacity 1GiB less 0.42 GiB for process and libraries"
    assert smallest_room(parse_capacity("100MiB")).size_bytes == 0
    # Never more than there is.
    assert smallest_room(parse_capacity("80GiB")) == (free, "one part in 2 of the free memory", 0)


def test_room_on_a_gpu(monkeypatch):
    """The plan counts the context, which is there already when the device is asked what is free."""
    monkeypatch.setattr(ranks, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(meters, "available_bytes", lambda device: 78 * GIB)
    free = 78 * GIB + 500 * MIB
    room = smallest_room(None)
    assert (room, room.planned_bytes) == ((free, "free on the device", 0.05), int(0.95 * free))
    assert str(room) == "74.56 GiB (free on the device, less 5%)"
    assert smallest_room(parse_capacity("A100-80")) == (80 * 10**9, "train.capacity A100-80", 0)
    assert smallest_room(parse_capacity("80GiB")) == (free, "free on the device", 0)


def test_a_control_group_leaves_less(tmp_path):
    for name, text in {"max": "1000", "current": "700", "stat": "anon 600\ninactive_file 80\nactive_file 9\n"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert list(meters._left_in_control_groups(tmp_path)) == [1000 - 700 + 80 + 9]
    (tmp_path / "memory.max").write_text("max\n")
    assert list(meters._left_in_control_groups(tmp_path)) == []


@pytest.mark.parametrize(
    ("keys", "was_auto", "advice"),
    [
        ((), False, "try train.micro_batch=auto with train.global_batch=12, model.checkpointing=full, "),
        ((), True, "try train.capacity=SIZE, less than was free, model.checkpointing=full, "),
        (("train.capacity=1GiB", "model.checkpointing=full"), True, "try a smaller train.capacity, a ds_config with "),
    ],
)
def test_out_of_memory_advises_what_was_not_tried(keys, was_auto, advice):
    recipe = load_recipe(None, [*KEYS, *keys, "train.micro_batch=4"])
    ds_config, batches = resolve(DS, recipe)
    assert advice in str(explained(recipe, ds_config, batches, was_auto=was_auto))
