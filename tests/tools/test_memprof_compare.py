"""memprof compare: every combination, OOM marked, mistakes answered with one line."""

import json

import pytest
from launching import DS_CONFIGS

from everest_ds.config.ds_config import load_ds_config
from everest_ds.config.errors import UserError
from everest_ds.config.load import load_recipe
from everest_ds.memory.compare import Question, compare
from everest_ds.memory.plan import plan

FIELDS = (
    "model method global_batch micro_batch zero checkpointing attention predicted_peak_bytes node_total_bytes fits"
).split()
MICRO = ("compare", "--models", "vit_micro", "--global-batches", "64,128", "model.image_size=64")


def question(**changes):
    settings = {
        "models": ("vit_micro",),
        "global_batches": (32, 64),
        "ds_configs": {name: load_ds_config(DS_CONFIGS / f"{name}.json") for name in ("zero0", "zero2")},
        "ranks": 8,
        "capacity_bytes": 80 * 10**9,
        "overrides": ("model.image_size=64",),
    }
    return Question(**(settings | changes))


@pytest.fixture(scope="module")
def rows():
    return compare(question(accumulation=2, attention=("fused", "eager")))


def test_every_combination_is_there_once(rows):
    keys = {(*row.configuration, row.global_batch) for row in rows}
    assert len(keys) == len(rows) == 2 * 2 * 2 * 2  # methods, DeepSpeed files, attention, batches
    assert {(row.global_batch, row.micro_batch) for row in rows} == {(32, 2), (64, 4)}
    assert all(row.node_total_bytes == 8 * row.predicted_peak_bytes for row in rows)


def test_a_row_is_the_plan_of_its_configuration(rows):
    row = next(r for r in rows if (r.method, r.attention, r.zero, r.micro_batch) == ("videomae", "eager", 2, 4))
    settings = ["model.size=vit_micro", "model.method=videomae", "model.attention=eager", "model.image_size=64"]
    recipe = load_recipe(None, [*settings, "train.global_batch=64"])
    ds_config = load_ds_config(DS_CONFIGS / "zero2.json") | {"gradient_accumulation_steps": 2}
    assert row.predicted_peak_bytes == plan(recipe, ds_config, ranks=8).predicted_peak_bytes


def test_fits_is_judged_against_the_capacity(rows):
    peaks = sorted(row.predicted_peak_bytes for row in rows)
    middle = peaks[len(peaks) // 2]
    again = compare(question(accumulation=2, attention=("fused", "eager"), capacity_bytes=middle))
    assert {row.fits for row in again} == {True, False}
    assert all(row.fits == (row.predicted_peak_bytes <= middle) for row in again)


def test_a_node_total_is_that_of_eight_gpus():
    (row,) = compare(question(ranks=32, global_batches=(64,), methods=("everest",), ds_configs={"zero0": {}}))
    assert row.node_total_bytes == 8 * row.predicted_peak_bytes


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"models": ("vit_lrage",)}, "did you mean 'vit_large'"),
        ({"methods": ("everst",)}, "did you mean 'everest'"),
        ({"models": ()}, "needs at least one"),
        ({"global_batches": (100,)}, "global batch 100: must be a positive multiple of 8 ranks"),
        ({"global_batches": (-64,)}, "global batch -64"),
        ({"ranks": 0}, "world size: must be positive"),
        ({"accumulation": -1}, "accumulation: must be positive"),
        ({"checkpointing": ("some",)}, "unknown checkpointing 'some'"),
    ],
)
def test_nonsense_is_refused(changes, told):
    with pytest.raises(UserError, match=told):
        question(**changes)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--models", "vit_lrage"), "did you mean 'vit_large'"),
        (("--global-batches=-128",), "global batch -128"),
        (("--global-batches", "many"), "expected whole numbers"),
        (("--capacity", "80 parsecs"), "neither a size such as 80GiB"),
        (("--ds_config", "README.md"), "expected .json files"),
        (("--zero", "7"), "neither a JSON file nor one of"),
        (("--ds_config", "{not_json}"), "not a JSON file"),
    ],
)
def test_the_command_answers_nonsense_with_one_line(arguments, told, tmp_path, capsys, memprof_main):
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(SystemExit) as ending:
        memprof_main([*MICRO, *(a.format(not_json=broken) for a in arguments)])
    printed = capsys.readouterr()
    assert (ending.value.code, printed.out) == (2, "")
    assert told in printed.err
    assert printed.err.count("\n") == 1


def test_json_is_alone_on_stdout_and_tables_mark_what_does_not_fit(tmp_path, capfd, memprof_main):
    assert memprof_main([*MICRO, "--json", "--report", str(tmp_path / "report")]) == 0
    found = json.loads(capfd.readouterr().out)["rows"]
    assert len(found) == 2 * 4 * 2  # methods, ZeRO stages, batches
    assert all(set(FIELDS) <= row.keys() for row in found)
    assert (tmp_path / "report" / "index.html").is_file()

    middle = sorted(row["predicted_peak_bytes"] for row in found)[len(found) // 2]
    assert memprof_main([*MICRO, "--capacity", f"{middle}B"]) == 0
    assert capfd.readouterr().out.count("OOM ") == sum(row["predicted_peak_bytes"] > middle for row in found) > 0
