"""The learning benchmark: its bookkeeping. What it measures takes an hour."""

import json

import pytest

from everest_ds.benchmarks import learning
from everest_ds.benchmarks.learning import LEARNING, TUNING, Cell, Settings, Table, launch, slug
from everest_ds.benchmarks.learning_report import report
from everest_ds.config.errors import UserError
from everest_ds.config.finetuning import FinetuneRecipe
from everest_ds.config.load import load_as, load_recipe


@pytest.fixture
def settings(tmp_path) -> Settings:
    return Settings(table=LEARNING, folder=tmp_path, seeds=(1, 2), side_by_side=1)


@pytest.mark.parametrize("table", [LEARNING, TUNING], ids=["learning", "tuning"])
def test_every_row_resolves(table: Table):
    for name, row in table.pretrainings.items():
        load_recipe(learning.ROOT / learning.PRETRAIN, [*(row.overrides or ()), *row.shape])
        for finetuning in row.finetunings:
            asked = [*row.shape, *table.finetunings[finetuning]]
            recipe = load_as(FinetuneRecipe, learning.ROOT / learning.FINETUNE, asked)
            assert recipe.train.max_steps, name


def test_equal_compute_means_fewer_steps_for_videomae(settings):
    steps = load_recipe(learning.ROOT / learning.PRETRAIN).train.max_steps
    assert 0.4 * steps < learning.equal_compute_steps(settings) < 0.7 * steps


def test_the_table_has_every_cell_and_differences_the_right_way_round(settings):
    cells = [Cell(pretraining=p, finetuning=f, accuracy={1: 0.2, 2: 0.4}) for p, f in LEARNING.cells]
    better = Cell(pretraining="EVEREST", finetuning="most-changing 0.6", accuracy={1: 0.6, 2: 0.7})
    cells[LEARNING.cells.index(("EVEREST", "most-changing 0.6"))] = better
    for seed in settings.seeds:
        for name in LEARNING.pretrainings:
            run = learning.pretrained(settings, seed, name)
            run.mkdir(parents=True)
            (run / "metrics.jsonl").write_text(json.dumps({"loss": 0.5}) + "\n")
    text = "\n".join(report(cells, settings, command="c"))
    assert "| EVEREST | 0.500 0.500 | most-changing 0.6 | 0.650 ± 0.071 | 0.600 0.700 |" in text
    assert "| EVEREST pre-training against none | +0.350 | +0.400 +0.300 |" in text
    assert text.count("\n| ") == 1 + len(LEARNING.cells) + 1 + 6


def test_a_run_made_with_other_settings_is_not_taken_for_this_one(settings, tmp_path):
    output = tmp_path / "run"
    (tmp_path / "run.asked.json").write_text("{}")
    with pytest.raises(UserError, match="was made with other settings"):
        launch("pretrain", learning.PRETRAIN, output, [])


def test_a_run_that_fails_shows_the_end_of_its_log(settings, tmp_path):
    with pytest.raises(
        UserError, match=r"pretrain ended with code 2; the end of .*run\.log:(?s:.*)no such key|unknown key"
    ):
        launch("pretrain", learning.PRETRAIN, tmp_path / "run", ["model.nothing=1"])


def test_names_of_folders():
    assert slug("EVEREST, least-changing 0.6") == "everest-least-changing-0.6"
