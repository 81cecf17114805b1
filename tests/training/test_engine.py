"""What an engine is given before DeepSpeed sees it."""

from pathlib import Path
from typing import Any

import deepspeed
import pytest

from everest_ds.config.errors import UserError
from everest_ds.config.load import load_recipe
from everest_ds.training import engine
from everest_ds.training.obstacle import Obstacle


def on_nvme(folder: Path) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": str(folder)}}}


def test_runs_on_one_nvme_have_folders_of_their_own(monkeypatch, tmp_path):
    monkeypatch.setattr(engine, "op_obstacle", lambda name, *, build: None)
    configs = [on_nvme(tmp_path) for _ in range(2)]
    folders = [engine._own_swap_folders(ds)[0] for ds in configs]
    assert sorted(folders) == sorted(map(str, tmp_path.iterdir()))
    assert len(set(folders)) == 2
    assert [ds["zero_optimization"]["offload_optimizer"]["nvme_path"] for ds in configs] == folders
    assert engine._own_swap_folders({"zero_optimization": {"stage": 3}}) == []


@pytest.mark.parametrize(
    ("asked", "runs"),
    [
        ({}, False),
        ({"wall_clock_breakdown": True}, False),
        ({"timers": None}, False),
        ({"timers": {"throughput": {"enabled": False}}}, False),
        ({"timers": {"throughput": {"enabled": True}}, "steps_per_print": 10}, True),
        ({"timers": {"throughput": {"synchronized": False}}, "steps_per_print": 10}, True),
    ],
)
def test_deepspeeds_throughput_timer_runs_where_the_json_asks_for_it(asked, runs):
    """By default it would: the host waits for the device twice in every pass."""
    recipe = load_recipe(None, ["model.size=vit_micro", "model.image_size=16", "train.micro_batch=2"])
    ds, _ = engine.resolve(asked, recipe)
    assert deepspeed.DeepSpeedConfig(ds).timers_config.enabled is runs


def test_nvme_without_libaio_says_what_to_install(monkeypatch, tmp_path):
    missing = Obstacle("no libaio with its headers", "apt-get install libaio-dev")
    monkeypatch.setattr(engine, "op_obstacle", lambda name, *, build: None if build else missing)
    with pytest.raises(UserError, match=r"offload_optimizer: NVMe needs DeepSpeed's async_io, but no libaio.*apt-get"):
        engine._own_swap_folders(on_nvme(tmp_path))
    assert list(tmp_path.iterdir()) == []
