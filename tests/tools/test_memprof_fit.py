"""memprof fit: the largest micro-batch that fits, which is fastest, and the DeepSpeed file that it suggests."""

import dataclasses
import json

import pytest
from launching import DS_CONFIGS

from everest_ds.config.ds_config import load_ds_config
from everest_ds.config.errors import UserError
from everest_ds.config.finetuning import FinetuneRecipe
from everest_ds.config.load import load_as, load_recipe
from everest_ds.config.schema import ModelConfig
from everest_ds.memory.arithmetic import step_macs
from everest_ds.memory.fit import fastest, fit, suggested_ds_config
from everest_ds.memory.gpus import GB, GIB, GPUS, parse_capacity
from everest_ds.memory.plan import plan

MICRO = ["model.size=vit_micro", "model.image_size=64"]
FILES = {name: load_ds_config(DS_CONFIGS / f"{name}.json") for name in ("zero0", "zero2", "zero2_offload")}


@pytest.fixture(scope="module")
def rows():
    return fit(load_recipe(None, MICRO), FILES, ranks=8, capacity=parse_capacity("A100-80"))


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("80GiB", 80 * 2**30),
        ("80GB", 80 * 10**9),
        ("79.5 gib", int(79.5 * 2**30)),
        ("81920MiB", 80 * 2**30),
        ("A100-80", 80 * 10**9),
        ("rtx 4090", 24 * 10**9),
        ("H200", 141 * 10**9),
    ],
)
def test_capacities_are_sizes_or_gpus(text, size_bytes):
    assert parse_capacity(text).size_bytes == size_bytes


def test_a_capacity_says_which_unit_it_means():
    assert parse_capacity("80GiB").unit == ("GiB", GIB)
    assert parse_capacity("A100-40").unit == ("GB", GB)
    assert "80.0 GB = 74.5 GiB, data sheet" in str(parse_capacity("A100-80"))


@pytest.mark.parametrize("text", ["", "80", "eighty GB", "0GB", "-3GiB", "80 parsecs", "1e400GB", "9" * 400 + "GB"])
def test_other_capacities_are_refused(text):
    with pytest.raises(UserError, match="capacity"):
        parse_capacity(text)


def test_every_gpu_has_a_source_and_tensor_rates_above_fp32():
    assert {"A100-40", "A100-80", "H100", "H200", "A6000", "RTX3090", "RTX4090", "L40S", "V100-32"} == set(GPUS)
    for gpu in GPUS.values():
        assert gpu.source
        assert all(rate > gpu.rates["fp32"] for name, rate in gpu.rates.items() if name != "fp32")
    assert "bf16" not in GPUS["V100-32"].rates


def test_the_largest_micro_batch_fits_and_one_more_does_not(rows):
    assert len(rows) == len(FILES) * 4
    for row in rows:
        recipe = load_recipe(None, [*MICRO, f"model.checkpointing={row.checkpointing}", "train.micro_batch=2"])
        direct = plan(recipe, FILES[row.ds_config], ranks=8)
        assert direct.peak(row.max_micro_batch) == row.predicted_peak_bytes <= 80 * GB
        assert direct.peak(row.max_micro_batch + 1) > 80 * GB
        assert row.max_global_batch == 8 * row.max_micro_batch


def test_checkpointing_trades_arithmetic_for_memory(rows):
    by_mode = {row.checkpointing: row for row in rows if row.ds_config == "zero2"}
    assert by_mode["full"].max_micro_batch > by_mode["encoder"].max_micro_batch > by_mode["none"].max_micro_batch
    assert by_mode["none"].arithmetic == 1
    again = {mode: row.recomputed_macs for mode, row in by_mode.items()}
    assert again["full"] == again["encoder"] + again["decoder"]
    assert all(row.step_macs == 3 * row.forward_macs + row.recomputed_macs for row in rows)
    bounds = {mode: row.upper_bound_clips_per_s for mode, row in by_mode.items()}
    assert bounds["none"] == pytest.approx(312e12 / (2 * by_mode["none"].step_macs), abs=0.1)
    assert bounds["full"] < bounds["encoder"]


def test_recomputed_arithmetic_is_that_of_the_blocks():
    # A block's products per token: 4 D^2 (q, k, v, projection) + 8 D^2 (MLP at ratio 4), and 2 K D of attention.
    config = ModelConfig(size="vit_small", checkpointing="encoder")
    tokens, width, depth = 156, 384, 12
    assert step_macs(config).recomputed == depth * (12 * tokens * width**2 + 2 * tokens**2 * width)


def test_the_fastest_recomputes_nothing_unless_it_must(rows):
    best = fastest(rows)
    assert (best.checkpointing, best.offload) == ("none", "none")
    assert best.max_micro_batch == max(
        r.max_micro_batch for r in rows if (r.checkpointing, r.offload) == ("none", "none")
    )
    need = max(row.max_micro_batch for row in rows if row.checkpointing == "none") + 1
    pressed = fastest(rows, least_micro_batch=need)
    assert pressed.max_micro_batch >= need
    assert pressed.recomputed_macs > 0
    assert pressed.step_macs == min(row.step_macs for row in rows if row.max_micro_batch >= need)
    assert fastest(rows, least_micro_batch=10**9) is None


def test_what_does_not_fit_says_so():
    tight = fit(load_recipe(None, MICRO), {"zero0": FILES["zero0"]}, ranks=8, capacity=parse_capacity("100MB"))
    assert {row.max_micro_batch for row in tight} == {0}
    assert all(row.predicted_peak_bytes > 10**8 for row in tight)
    assert fastest(tight) is None


def test_a_suggestion_keeps_the_rest_of_the_file(rows):
    row = dataclasses.replace(fastest(rows), max_micro_batch=7)
    raw = FILES[row.ds_config] | {"train_micro_batch_size_per_gpu": 3}
    suggested = suggested_ds_config(raw, row)
    assert suggested["train_micro_batch_size_per_gpu"] == 7
    assert suggested["zero_optimization"] == raw["zero_optimization"]
    assert plan(load_recipe(None, MICRO), suggested, ranks=8).batches.micro == 7


def test_a_classifier_has_no_decoder_to_checkpoint():
    keys = ["model.size=vit_micro", "model.image_size=64", "model.classes=10"]
    recipe = load_as(FinetuneRecipe, None, keys)
    rows = fit(recipe, {"zero2": FILES["zero2"]}, ranks=8, capacity=parse_capacity("A100-80"))
    assert [(row.phase, row.checkpointing) for row in rows] == [("finetune", "none"), ("finetune", "encoder")]
    assert rows[0].max_micro_batch < rows[1].max_micro_batch
    # Every token costs a block's products; the patches' embedding and the head are a small part.
    assert 1.2 < rows[1].arithmetic < 1 + 1 / 3


COMMAND = ("fit", "--model", "vit_micro", "--capacity", "A100-80", "model.image_size=64", "--checkpointing", "none")


def test_the_command_writes_a_file_once(tmp_path, capsys, memprof_main):
    path = tmp_path / "suggested.json"
    command = (*COMMAND, "--json", "--write", str(path))
    assert memprof_main(command) == 0
    result = json.loads(capsys.readouterr().out)
    shipped = ["zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]
    assert [row["ds_config"] for row in result["rows"]] == shipped
    assert all(row["max_micro_batch"] > 0 for row in result["rows"])
    written = path.read_text()
    assert json.loads(written)["train_micro_batch_size_per_gpu"] == result["fastest"]["max_micro_batch"]

    with pytest.raises(SystemExit) as ending:
        memprof_main(command)
    assert (ending.value.code, path.read_text()) == (2, written)
    told = f"memprof: error: --write {path}: exists already; give another path, or --force to replace it\n"
    assert capsys.readouterr() == ("", told)


def test_the_table_names_an_upper_bound_as_such(capsys, memprof_main):
    assert memprof_main([*COMMAND, "--ds_config", str(DS_CONFIGS / "zero0.json")]) == 0
    shown = capsys.readouterr().out
    assert "upper bound clips/s/GPU*" in shown
    assert "no run reaches it" in shown
    assert "80.0 GB = 74.5 GiB" in shown


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--model", "vit_gaint"), "did you mean 'vit_giant'"),
        (("--world-size", "0"), "world size: must be positive, got 0"),
        (("--accumulation", "-2"), "accumulation: must be positive, got -2"),
        (("--capacity", "A100"), "did you mean A100-40 or A100-80?"),
        (("--checkpointing", "most"), "unknown checkpointing 'most'"),
        (("--ds_config", "nowhere.json"), "No such file"),
    ],
)
def test_nonsense_gets_one_line(arguments, told, capsys, memprof_main):
    with pytest.raises(SystemExit) as ending:
        memprof_main([*COMMAND, *arguments])
    printed = capsys.readouterr()
    assert (ending.value.code, printed.out, printed.err.count("\n")) == (2, "", 1)
    assert told in printed.err


ELASTIC = (*COMMAND, "--global-batch", "48", "--ds_config", str(DS_CONFIGS / "zero2.json"))


def test_a_global_batch_on_several_numbers_of_ranks(capsys, memprof_main):
    assert memprof_main([*ELASTIC, "--world-sizes", "1,3,16", "--capacity", "700MiB", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["capacity_bytes"] == 700 * 2**20
    assert [row["ranks"] for row in result["rows"]] == [1, 3, 16]
    for row in result["rows"]:
        assert row["micro_batch"] * row["accumulation"] * row["ranks"] == row["global_batch"] == 48
        assert row["fits"] == (row["predicted_peak_bytes"] <= 700 * 2**20)
    assert memprof_main([*ELASTIC, "--world-sizes", "16", "--capacity", "1MiB"]) == 0
    assert "OOM 1 x 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--world-sizes", "8,5"), "global batch 48 is not a multiple of ranks 5"),
        (("--world-sizes", "0"), "--world-sizes: must be positive, got 0"),
        (("--world-sizes", "many"), "--world-sizes: expected whole numbers"),
        (("--accumulation", "2"), "--accumulation: not with --global-batch"),
        (("--global-batch", "-1"), "--global-batch: must be positive, got -1"),
    ],
)
def test_global_batches_that_cannot_be_get_one_line(arguments, told, capsys, memprof_main):
    with pytest.raises(SystemExit) as ending:
        memprof_main([*ELASTIC, *arguments])
    printed = capsys.readouterr()
    assert (ending.value.code, printed.out, printed.err.count("\n")) == (2, "", 1)
    assert told in printed.err
