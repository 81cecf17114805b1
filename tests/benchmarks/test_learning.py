"""The learning benchmark: its bookkeeping. What it measures takes an hour."""

import json
import signal
import sys
import threading

import pytest

from everest_ds.benchmarks import learning
from everest_ds.benchmarks.learning import LEARNING, TUNING, Cell, Settings, Table, launch, slug
from everest_ds.benchmarks.learning_report import report
from everest_ds.config.errors import UserError
from everest_ds.config.load import load_recipe
from everest_ds.models import MaskedAutoencoder, forward_backward_macs
from everest_ds.models.weights import WEIGHTS_FILE


@pytest.fixture
def settings(tmp_path) -> Settings:
    return Settings(table=LEARNING, folder=tmp_path, seeds=(1, 2), side_by_side=1)


@pytest.mark.parametrize("table", [LEARNING, TUNING], ids=["learning", "tuning"])
def test_every_row_resolves(table: Table, tmp_path):
    learning.resolve(Settings(table=table, folder=tmp_path, seeds=(1,), side_by_side=1))


@pytest.mark.parametrize("phase", ["pretrain", "finetune"])
def test_a_mistake_is_told_before_anything_runs(phase: str, tmp_path):
    settings = Settings(table=LEARNING, folder=tmp_path, seeds=(1,), side_by_side=1, **{phase: ("optim.nothing=1",)})
    with pytest.raises(UserError, match=r"optim\.nothing"):
        learning.run(settings, lambda line: None)
    assert not any(tmp_path.iterdir())


def test_seeds_are_each_their_own(tmp_path):
    with pytest.raises(UserError, match="--seeds: each once"):
        Settings(table=LEARNING, folder=tmp_path, seeds=(1, 1), side_by_side=1)


def test_equal_compute_means_fewer_steps_for_videomae(settings):
    steps = load_recipe(learning.ROOT / learning.PRETRAIN).train.max_steps
    ours, theirs = (
        forward_backward_macs(
            MaskedAutoencoder, load_recipe(learning.ROOT / learning.PRETRAIN, [f"model.method={method}"]).model
        )
        for method in ("everest", "videomae")
    )
    fewer = learning.equal_compute_steps(settings)
    assert abs(fewer * theirs / (steps * ours) - 1) < 1 / fewer
    assert 0.3 * steps < fewer < 0.6 * steps


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
        launch("pretrain", learning.PRETRAIN, output, [], threading.Event())


def test_a_run_that_fails_shows_the_end_of_its_log(settings, tmp_path):
    with pytest.raises(
        UserError, match=r"pretrain ended with code 2; the end of .*run\.log:(?s:.*)(?:no such key|unknown key)"
    ):
        launch("pretrain", learning.PRETRAIN, tmp_path / "run", ["model.nothing=1"], threading.Event())


def test_only_a_run_that_has_ended_is_not_repeated(tmp_path, monkeypatch):
    """Weights are written before the last validation: they don't say that a run has ended."""
    started = []
    monkeypatch.setattr(learning, "wait", lambda command, *_, **__: started.append(command) or 0)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / WEIGHTS_FILE).touch()
    for _ in range(2):
        launch("finetune", learning.FINETUNE, tmp_path / "run", [], threading.Event())
    assert len(started) == 1


def test_a_stopped_benchmark_ends_its_commands():
    stop = threading.Event()
    threading.Timer(0.5, stop.set).start()
    assert learning.wait([sys.executable, "-c", "import time; time.sleep(60)"], stop) == -signal.SIGTERM
    assert learning.wait(["no such command"], stop) == 0


def test_names_of_folders():
    assert slug("EVEREST, least-changing 0.6") == "everest-least-changing-0.6"
