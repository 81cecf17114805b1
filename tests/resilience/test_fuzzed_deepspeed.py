"""Shipped DeepSpeed JSONs with values replaced: DeepSpeed's reading and building of engines end in one line, too."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
from fuzzed_settings import DS_KEYS, refused, result_or_line
from launching import DS_CONFIGS, run

from everest_ds.config.ds_config import load_ds_config
from everest_ds.config.ds_values import RULES
from everest_ds.config.load import load_recipe, to_tree
from everest_ds.training.engine import resolve

VALUES = ["yes", "", [1], {"a": 1}, -1, 0, 10**18, 0.5, None, True, [[[["x"]]]], "x" * 5000, {"enabled": True}]
RECIPE = load_recipe(
    None, ["model.size=vit_micro", "model.image_size=16", "model.decoder_depth=1", "train.global_batch=4"]
)


def replaced(raw: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    raw = copy.deepcopy(raw)
    *groups, last = key.split(".")
    inside = raw
    for group in groups:
        inside[group] = inside.get(group) if isinstance(inside.get(group), dict) else {}
        inside = inside[group]
    inside[last] = value
    return raw


@pytest.mark.parametrize("shipped", ["zero0", "zero2_offload", "zero3_offload"])
def test_any_value_at_any_key(shipped: str) -> None:
    raw = load_ds_config(DS_CONFIGS / f"{shipped}.json")
    taken = 0
    for key in DS_KEYS:
        for value in VALUES:
            found = result_or_line(lambda key=key, value=value: resolve(replaced(raw, key, value), RECIPE))
            taken += not isinstance(found, str)
    assert 0 < taken < len(DS_KEYS) * len(VALUES) / 2


@pytest.mark.parametrize("stage", [-1, 4, "auto", "two", None, [2], 2.0, True])
def test_stages_that_are_none(stage: Any) -> None:
    refused(lambda: resolve({"zero_optimization": {"stage": stage}}, RECIPE), "ds_config")


@pytest.mark.parametrize("section", [[], "yes", 3, [[1]]])
def test_sections_that_are_none(section: Any) -> None:
    refused(lambda: resolve({"zero_optimization": section}, RECIPE), "ds_config zero_optimization")


# What keys may well have, by chance at the right one.
PLAUSIBLE = [
    True,
    False,
    0,
    1,
    2,
    3,
    64,
    1000,
    10**18,
    0.5,
    1e-320,
    1e300,
    "bf16",
    "fp32",
    "fp16",
    "cpu",
    "none",
    "info",
]
PLAUSIBLE += ["auto", ["norm"], ["torch.nn.Linear"], [], {}, {"enabled": True}, "0/x", "\0", "Lion", "SGD", "AdamW"]
BUILT = {"zero0": 40, "zero1": 40, "zero2": 40, "zero2_offload": 6, "zero3": 10, "zero3_offload": 4}
# Of DeepSpeed's, slow or for good: they build ops, write lines beyond number, or reach for a network.
LEFT_ALONE = ("wandb", "comet", "dump_state", "log_level", "memory_breakdown")


def test_what_is_taken_builds_an_engine_or_ends_in_one_line(tmp_path: Path) -> None:
    """A step of training each, in one process: no trace, no hang."""
    configs = [ds for shipped, count in BUILT.items() for ds in taken(shipped, count)]
    (tmp_path / "jobs.json").write_text(json.dumps({"recipe": to_tree(RECIPE), "ds_configs": configs}))
    done = run("tests/resilience/build_engines.py", tmp_path / "jobs.json", tmp_path / "found.json", timeout_s=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    for ds, (how, said) in zip(configs, found, strict=True):
        assert how in ("built", "refused"), f"{ds}: {said}"
        assert len(said) < 600, said
        assert "\n" not in said
    assert sum(how == "built" for how, _ in found) > len(found) / 2


def taken(shipped: str, count: int) -> list[dict[str, Any]]:
    """Return variants of a shipped JSON that :func:`resolve` takes: one or two values are others."""
    draw, found = random.Random(shipped), []
    raw = load_ds_config(DS_CONFIGS / f"{shipped}.json")
    keys = [key for key in sorted({*DS_KEYS, *RULES}) if not key.startswith(LEFT_ALONE)]
    while len(found) < count:
        ds = raw | {"bf16": {"enabled": draw.random() < 0.5}}
        for _ in range(draw.choice((1, 2, 2))):
            ds = replaced(ds, draw.choice(keys), draw.choice(VALUES + PLAUSIBLE))
        if not isinstance(result_or_line(lambda ds=ds: resolve(ds, RECIPE)), str):
            found.append(ds)
    return found
