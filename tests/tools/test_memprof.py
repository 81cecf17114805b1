"""The memprof command: what it prints, how it ends on mistakes, and that what it predicts is what happens."""

import itertools
import json
import math
import re
import statistics
import sys

import pytest
import torch
from launching import DS_CONFIGS, ROOT, run

sys.path.insert(0, str(ROOT))

from everest_ds.config.ds_config import load_ds_config
from everest_ds.config.errors import UserError
from everest_ds.config.finetuning import FinetuneRecipe
from everest_ds.config.load import load_as
from everest_ds.config.schema import Recipe
from everest_ds.memory import meters
from everest_ds.memory.plan import plan
from everest_ds.memory.processes import LAUNCHER_BYTES, RANK_BYTES
from tools.memprof import asking, matrix
from tools.memprof.__main__ import main

MIB = 2**20
MICRO = ["model.size=vit_micro", "model.image_size=48"]
HALF_MATMUL = torch.ops.mkldnn._is_mkldnn_fp16_supported()  # fp16 is refused where the CPU has none


def memprof(*arguments: str, **options):
    return run("tools/memprof", *arguments, **options)


def test_plan_prints_one_json_object():
    done = memprof("plan", "--model", "vit_micro", "--micro-batch", "4", "--world-size", "8", "--json", "--ds_config",
                   DS_CONFIGS / "zero3_offload.json", "model.image_size=48")  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert {"predicted_peak_bytes", "device", "host", "config"} <= result.keys()
    assert sum(result["device"].values()) == result["predicted_peak_bytes"] > 0
    assert result["host"]["Adam moments"] > 0
    assert result["config"]["batches"]["total"] == 32


def test_a_plan_of_fine_tuning_is_that_of_its_recipe(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    command = ["plan", "--phase", "finetune", "--model", "vit_micro", "--micro-batch", "4", "--json", "--device", "cpu"]
    assert main([*command, "--classes", "10", "model.image_size=48", "train.ema_decay=0.99"]) == 0
    result = json.loads(capsys.readouterr().out)
    keys = ["model.size=vit_micro", "model.image_size=48", "model.classes=10", "train.micro_batch=4"]
    recipe = load_as(FinetuneRecipe, None, [*keys, "train.ema_decay=0.99"])
    assert result["config"]["model"]["classes"] == 10
    assert result["device"]["averaged weights"] == 4 * result["config"]["parameters"]
    planned = plan(recipe, load_ds_config(DS_CONFIGS / "zero2.json"), ranks=1, device_type="cpu")
    assert result["predicted_peak_bytes"] == planned.predicted_peak_bytes


def test_plan_prints_a_table_with_sources(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["plan", "--model", "vit_micro", "--micro-batch", "4", "--sources", "model.image_size=48"]) == 0
    shown = capsys.readouterr().out
    assert "saved activations: encoder blocks" in shown
    assert "formula" in shown
    assert "p x 8" in shown


def test_what_does_not_fit_this_machine_is_not_started(capsys, monkeypatch):
    """Ranks on the CPU share one memory, with what their processes take besides tensors."""
    monkeypatch.chdir(ROOT)
    command = ["--model", "vit_micro", "--micro-batch", "4", "model.image_size=48"]
    assert main(["plan", "--device", "cpu", "--world-size", "3", *command, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    together = 3 * (planned["predicted_peak_bytes"] + sum(planned["host"].values()) + RANK_BYTES) + LAUNCHER_BYTES
    assert planned["together_bytes"] == together
    monkeypatch.setattr(meters, "available_bytes", lambda device: together)
    with pytest.raises(SystemExit) as ended:
        main(["measure", "--ranks", "3", *command])
    said = capsys.readouterr()
    assert (ended.value.code, said.out) == (2, "")
    line = r"memprof: error: measure: .*: the processes of 3 ranks need .* is free, of which 5% .*; try fewer .*\n"
    assert re.fullmatch(line, said.err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "--model", "vit_gaint", "--micro-batch", "4"], "did you mean 'vit_giant'?"),
        (["plan", "--micro-batch", "-4"], "train.micro_batch: must be positive, got -4"),
        (["plan", "--global-batch", "30", "--world-size", "8"], "global batch 30 is not"),
        (["plan", "--micro-batch", "4", "--world-size", "0"], "world size: must be positive"),
        (["plan", "--micro-batch", "4", "--ds_config", "pyproject.toml"], "not a JSON file"),
        (["plan", "--micro-batch", "4", "--ds_config", "nowhere.json"], "No such file"),
        (["plan"], "give --micro-batch or --global-batch"),
        (["plan", "--micro-batch", "4", "--classes", "10"], "add --phase finetune"),
        (["plan", "--micro-batch", "4", "--phase", "finetune", "--classes", "1"], "model.classes: must be at least 2"),
        (["plan", "--micro-batch", "4", "--phase", "finetune", "--method", "videomae"], "model.keep_ratio=1.0"),
        (["measure", "--micro-batch", "4", "--ranks", "0"], "--ranks: must be positive"),
        (["measure", "--matrix", "README.md"], "README.md: something else than the page 'Predicted against measured"),
        (["scaling", "--report", "docs/large-models.md"], "something else than the page 'Scaling: what many GPUs"),
        (
            ["nodes", "--report", "docs"],
            "docs: Is a directory; give another path for the page 'Large models on one node'",
        ),
        (["nodes", "--report", "README.md/page.md"], "README.md/page.md: something else than the page"),
        (["measure", "--micro-batch", "4", "--feed"], "data.train: no training manifest"),
        (["measure", "--micro-batch", "4", "--feed", "--gpus", "8xABC"], "--gpus: expected"),
    ],
)
def test_mistakes_end_with_one_line_and_code_2(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert said.out == ""
    assert said.err.startswith("memprof: error: ")
    assert said.err.count("\n") == 1
    assert message in said.err


def test_a_page_replaces_one_of_its_title_alone(tmp_path, monkeypatch):
    page, title = tmp_path / "new" / "page.md", "# Ours"
    asking.check_page(page, title)
    assert not page.parent.exists()  # a mistake that is met later leaves nothing behind
    for text in ("", f"{title}\n\nold"):
        asking.write_page(page, text)
        asking.check_page(page, title)
    for text in ("\nprecious", "# Others"):
        asking.write_page(page, text)
        with pytest.raises(UserError, match="something else than the page 'Ours' is there"):
            asking.check_page(page, title)
    monkeypatch.setattr(asking.os, "access", lambda *_: False)
    with pytest.raises(UserError, match="can't be written to"):
        asking.check_page(tmp_path / "other.md", title)


def test_a_mistake_in_a_process_of_its_own():
    done = memprof("plan", "--model", "vit_huge", "--micro-batch", "0")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "memprof: error: train.micro_batch: must be positive, got 0\n"


def cell(ds_name: str, precision: str, batch: int, *overrides: str, kind: type[Recipe] = Recipe) -> matrix.Cell:
    return matrix.Cell(load_as(kind, None, [*MICRO, *overrides, f"train.micro_batch={batch}"]), ds_name, precision)


def classifier(ds_name: str, precision: str, batch: int, *overrides: str) -> matrix.Cell:
    return cell(ds_name, precision, batch, "model.classes=400", *overrides, kind=FinetuneRecipe)


def check(rows: list[matrix.Row]) -> None:
    """What every measured configuration must show (issue: memprof, "It must show")."""
    for row in rows:
        states = abs(row.states_predicted - row.states_measured)
        assert states <= min(0.01 * row.states_measured, MIB), row.cell.name
        assert abs(row.error) < 0.05, row.cell.name
        assert row.messages == pytest.approx(row.messages_predicted, rel=0.01), row.cell.name
    assert statistics.median(abs(row.error) for row in rows) < 0.02


def test_prediction_is_what_two_ranks_hold():
    """One launch: every stage and both offloads, in small batches, where DeepSpeed's own buffers make the peak."""
    names = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
    cells = [cell(name, "bf16", 2) for name in names]
    cells += [cell("zero2", "fp16", 1, "model.checkpointing=full") for _ in range(HALF_MATMUL)]
    cells += [cell("zero2", "fp32", 2, "model.method=videomae", "train.global_batch=8")]  # accumulation
    # Fine-tuning: twelve groups of parameters rather than two, mixing, drop path.
    cells += [classifier(name, "fp32", 2) for name in ("zero0", "zero2", "zero3")]
    cells += [classifier("zero0", "bf16", 2, "train.ema_decay=0.99", "model.keep_ratio=1.0")]
    cells += [classifier("zero1", "bf16", 4, "train.global_batch=16", "model.checkpointing=encoder")]
    # Many passes: what each leaves behind until the step ends would show.
    cells += [cell("zero0", "fp32", 4, "model.method=videomae", "model.decoder_depth=2", "train.global_batch=64")]
    rows = matrix.measure_cells(cells, ranks=2, resident=False)
    check(rows)
    assert abs(rows[-1].error) < 0.01


@pytest.mark.slow
def test_states_in_every_precision():
    names = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
    precisions = ("fp32", "bf16", *["fp16"] * HALF_MATMUL)
    cells = [make(name, p, 2) for make, name, p in itertools.product((cell, classifier), names, precisions)]
    check(matrix.measure_cells(cells, ranks=2, resident=False))


@pytest.mark.slow
def test_the_whole_matrix():
    rows = matrix.measure_cells(list(matrix.cells()), ranks=2)
    check(rows)
    assert max(abs(row.rss_error) for row in rows) < 0.10


@pytest.mark.slow
def test_measure_prints_one_json_object(motion_videos, tmp_path):
    ds = json.loads((DS_CONFIGS / "zero2.json").read_text())
    tables = {"enabled": True, "output_path": str(tmp_path / "tables")}
    (tmp_path / "ds.json").write_text(json.dumps(ds | {"csv_monitor": tables}))
    done = memprof("measure", "--model", "vit_micro", "--micro-batch", "4", "--ranks", "2", "--json", "--ds_config",
                   tmp_path / "ds.json", "--feed", "--gpus", "2xH100", "model.image_size=48", "data.stride=1",
                   f"data.train={motion_videos}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    for field in ("rss_growth_bytes", "step_s", "clips_per_s", "flops_per_s", "matmul_flops_per_s"):
        assert result[field] > 0
    assert result["measured_by"] == "tensor storages"
    assert result["residual_bytes"] == result["measured_peak_bytes"] - result["compared_bytes"]
    assert abs(result["residual_bytes"]) < 0.02 * result["measured_peak_bytes"]
    assert not (tmp_path / "tables").exists()  # no monitor hears of it
    fed = result["feed"]
    assert fed["gpu"] == "H100"
    assert fed["cores"] == math.ceil(fed["wanted_clips_per_s"] / fed["clips_per_s_per_core"])
