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
from everest_ds.training import preflight, ranks
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
    there = f"there is {size(2 * NEEDED)} per rank (tested)\n"
    assert capsys.readouterr().err == f"memory: predicted peak {size(NEEDED)} per rank at micro-batch 4; {there}"
    assert caplog.records == []


def test_ranks_of_one_cpu_are_counted_together(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    check(Room(2 * NEEDED, "tested"))
    assert f" at micro-batch 4, {size(2 * NEEDED)} for the 2 ranks of this machine; " in capsys.readouterr().err


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
        f"memory: a rank needs {size(NEEDED)}, and there is {size(NEEDED - 1)} per rank (tested); what fits, with "
        f"{size(half)}: the same command with train.micro_batch=2 train.global_batch=4; --no-preflight trains all the "
        "same"
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
    monkeypatch.setattr(ranks, "gather", lambda value: [(None, None), value])
    assert check(Room(0, "tested")) is None


def test_what_the_plan_is_not_of_is_said_and_never_refused(capsys):
    recipe = dataclasses.replace(RECIPE, train=dataclasses.replace(RECIPE.train, compile=True))
    ds_config, _ = resolve(DS, RECIPE)
    assert check_memory(recipe, recipe, DS, ds_config, Room(1, "tested")) is not None
    assert "; planned without train.compile, which takes less or more" in capsys.readouterr().err


def test_a_run_goes_on_without_a_plan(monkeypatch, caplog):
    """A mistake of the planner's costs what it would have said."""

    def fail(*_, **__):
        raise RuntimeError("the step has a dynamic shape")

    monkeypatch.setattr(preflight, "plan", fail)
    assert check(Room(1, "tested")) is None
    assert "memory: not predicted, please report it: RuntimeError: the step has a dynamic shape" in caplog.text


def test_what_is_offloaded_beyond_the_host_is_a_warning(monkeypatch, caplog):
    offload = load_ds_config(DS_CONFIGS / "zero2_offload.json")
    planned = plan(RECIPE, offload, ranks=1, device_type="cuda")
    for there in (sum(planned.host.values()), sum(planned.host.values()) - 1, None):
        caplog.clear()
        monkeypatch.setattr(preflight, "host_room_bytes", lambda there=there: there)
        preflight._warn_of_host(planned)
        assert ("offloads" in caplog.text) == (there == sum(planned.host.values()) - 1)
