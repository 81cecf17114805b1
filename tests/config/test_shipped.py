"""Every shipped recipe with every shipped ds_config resolves, and DeepSpeed itself accepts the result."""

from pathlib import Path

import pytest
from launching import DS_CONFIGS, ROOT

from everest_ds.config.ds_config import Facts, load_ds_config, resolve_ds_config
from everest_ds.config.finetuning import FinetuneRecipe
from everest_ds.config.load import load_as
from everest_ds.config.schema import Recipe
from everest_ds.tokens import TokenBudget
from everest_ds.training.engine import check_ds_config

RECIPES = sorted((ROOT / "run/recipes").glob("*.yaml"))
CONFIGS = sorted(DS_CONFIGS.glob("*.json"))
NODE = Facts(
    parameters=94_000_000, largest=2_400_000, width=768, ranks=8, on_cpu=False, bf16_supported=True, fp16_supported=True
)


def test_something_is_shipped():
    assert len(RECIPES) >= 15
    assert {path.stem for path in CONFIGS} >= {
        "zero0",
        "zero1",
        "zero2",
        "zero3",
        "zero2_offload",
        "zero3_offload",
        "zero3_hpz",
        "zero3_nvme",
    }


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_and_ds_config_go_together(recipe: Path, config: Path):
    finetuning = recipe.stem.endswith("_finetune")
    loaded = load_as(FinetuneRecipe if finetuning else Recipe, recipe)
    ds, batches = resolve_ds_config(load_ds_config(config), loaded, NODE)
    assert batches.total == loaded.train.global_batch
    count = TokenBudget.for_classification if finetuning else TokenBudget.for_pretraining
    assert count(loaded.model).kept > 0
    check_ds_config(ds)
