"""Shipped DeepSpeed JSONs with one value replaced: DeepSpeed's own reading ends in one line, too."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from fuzzed_settings import DS_KEYS, refused, result_or_line
from launching import DS_CONFIGS

from everest_ds.config.ds_config import load_ds_config
from everest_ds.config.load import load_recipe
from everest_ds.models import MaskedAutoencoder
from everest_ds.training.engine import build_model, resolve

VALUES = ["yes", "", [1], {"a": 1}, -1, 0, 10**18, 0.5, None, True, [[[["x"]]]], "x" * 5000, {"enabled": True}]
RECIPE = load_recipe(
    None, ["model.size=vit_micro", "model.image_size=16", "model.decoder_depth=1", "train.global_batch=4"]
)


@pytest.fixture(scope="module")
def model() -> MaskedAutoencoder:
    return build_model(RECIPE)


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
def test_any_value_at_any_key(model: MaskedAutoencoder, shipped: str) -> None:
    raw = load_ds_config(DS_CONFIGS / f"{shipped}.json")
    taken = 0
    for key in DS_KEYS:
        for value in VALUES:
            found = result_or_line(lambda key=key, value=value: resolve(replaced(raw, key, value), RECIPE, model))
            taken += not isinstance(found, str)
    assert 0 < taken < len(DS_KEYS) * len(VALUES) / 2


@pytest.mark.parametrize("stage", [-1, 4, "auto", "two", None, [2], 2.0, True])
def test_stages_that_are_none(model: MaskedAutoencoder, stage: Any) -> None:
    refused(lambda: resolve({"zero_optimization": {"stage": stage}}, RECIPE, model), "ds_config")


@pytest.mark.parametrize("section", [[], "yes", 3, [[1]]])
def test_sections_that_are_none(model: MaskedAutoencoder, section: Any) -> None:
    refused(lambda: resolve({"zero_optimization": section}, RECIPE, model), "ds_config zero_optimization")
