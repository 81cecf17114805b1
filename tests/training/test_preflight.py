"""What is said before the model is built: what a rank needs, that it is tight, that it is too much."""

import dataclasses
import logging

import pytest
from launching import DS_CONFIGS

from everest_ds.config.ds_config import load_ds_config
from everest_ds.config.errors import UserError
from everest_ds.config.load import load_recipe
from everest_ds.memory.gpus import size
from everest_ds.memory.plan import plan
from everest_ds.training import ranks
from everest_ds.training.engine import resolve
from everest_ds.training.preflight import check_memory
from everest_ds.training.room import Room

DS = load_ds_config(DS_CONFIGS / "zero2.json")
RECIPE = load_recipe(None, ["model.size=vit_micro", "model.image_size=64", "train.micro_batch=4"])
NEEDED = plan(RECIPE, DS, ranks=1, device_type="cpu").needed_bytes(4)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No process group."""
    monkeypatch.setattr(ranks, "start", lambda: None)


def check(room, recipe=RECIPE):
    ds_config, _ = resolve(DS, recipe)
    return check_memory(recipe, recipe, DS, ds_config, room)


def test_what_fits_is_said_in_a_line(capsys, caplog):
    room = Room(2 * NEEDED, "tested", 0.05)
    planned = check(room)
    assert planned.needed_bytes(4) == NEEDED
    assert capsys.readouterr().err == f"memory: predicted peak {size(NEEDED)} per rank; there is {room}\n"
    assert caplog.records == []


def test_ranks_of_one_cpu_are_counted_together(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    check(Room(2 * NEEDED, "tested"))
    assert f" per rank, {size(2 * NEEDED)} for the 2 ranks of this machine; " in capsys.readouterr().err


def test_within_the_reserve_it_is_tight_and_goes_on(caplog):
    with caplog.at_level(logging.WARNING):
        assert check(Room(NEEDED, "tested", 0.05)) is not None
    assert "memory: tight: " in caplog.text


def test_more_than_there_is_is_refused_with_what_fits():
    """A smaller micro-batch does, whose prediction leaves the reserve alone."""
    with pytest.raises(UserError) as refused:
        check(Room(NEEDED - 1, "tested", 0.05))
    way = dataclasses.replace(RECIPE.train, micro_batch=2, global_batch=4)
    half = plan(dataclasses.replace(RECIPE, train=way), DS, ranks=1, device_type="cpu").needed_bytes(2)
    assert half < 0.95 * (NEEDED - 1)
    assert str(refused.value) == (
        f"memory: a rank needs {size(NEEDED)}, and there is {size(NEEDED - 1)} (tested); what fits, with {size(half)}: "
        "the same command with train.micro_batch=2 train.global_batch=4; --no-preflight trains all the same"
    )


def test_not_judged_it_is_said_all_the_same(capsys):
    assert check(None) is not None
    assert "; not held against what is free (--no-preflight)" in capsys.readouterr().err


def test_other_ranks_end_with_what_rank_0_met(monkeypatch):
    """They plan nothing, and hold no plan."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(ranks, "gather", lambda value: [(None, "of rank 0"), value])
    with pytest.raises(UserError, match="of rank 0"):
        check(Room(NEEDED, "tested"))
    monkeypatch.setattr(ranks, "gather", lambda value: [(None, ""), value])
    assert check(Room(0, "tested")) is None
