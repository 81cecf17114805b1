"""What TensorBoard and DeepSpeed's CSV files hold of a run, also of one that was killed and goes on."""

import csv
import json
import re
from pathlib import Path

import pytest
import torch
from launching import DS_CONFIGS, Console, metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from everest_ds.config.load import load_recipe
from everest_ds.models import MaskedAutoencoder, forward_macs

SMALL = (
    "data.stride=1 data.workers=0 data.crop_scales=[0.75] data.crop=multiscale model.size=vit_micro "
    "model.image_size=48 train.global_batch=4 train.log_every_steps=2 optim.warmup_steps=0"
).split()
NAMES = "loss lr grad_norm clips_per_s mfu data_wait_share step_s peak_memory_bytes".split()
PEAK_FLOPS = 1e10
HALF_MATMUL = torch.ops.mkldnn._is_mkldnn_fp16_supported()


def with_monitors(folder: Path, **sections: dict) -> Path:
    file = folder / "monitors.json"
    ds = json.loads((DS_CONFIGS / "zero2.json").read_text())
    if HALF_MATMUL:
        ds["fp16"] = {"enabled": True, "initial_scale_power": 4}
    file.write_text(json.dumps(ds | {name: {"enabled": True, **section} for name, section in sections.items()}))
    return file


def drawn(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values by name, as TensorBoard reads them."""
    found = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def in_csv(folder: Path) -> dict[str, list[tuple[int, float]]]:
    files = {}
    for path in filter(Path.is_file, folder.glob("*.csv")):
        header, *rows = csv.reader(path.read_text().splitlines())
        assert header[0] == "step"
        files[path.stem] = [(int(step), float(value)) for step, value in rows]
    return files


def numbers(records: list[dict], key: str) -> list[tuple[int, float]]:
    return [(record["step"], record[key]) for record in records]


def assert_same(found: list[tuple[int, float]], logged: list[tuple[int, float]]) -> None:
    """The same steps; TensorBoard keeps values in fp32."""
    assert [step for step, _ in found] == [step for step, _ in logged]
    assert [value for _, value in found] == pytest.approx([value for _, value in logged], rel=1e-6)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, motion_videos: Path, two_ranks: Console) -> Path:
    """A run that got to step 6, was lost but for its checkpoint of step 3, and goes on from there to step 8."""
    folder = tmp_path_factory.mktemp("killed")
    ds = with_monitors(folder, tensorboard={}, csv_monitor={"output_path": "tables", "job_name": "mine"})
    place = (f"data.train={motion_videos}", f"train.output_dir={folder / 'run'}", "model.decoder_depth=1")
    command = ("run/pretrain.py", "--ds_config", ds, *SMALL, *place, f"train.peak_flops={PEAK_FLOPS:g}")
    done = two_ranks.succeed(*command, "train.max_steps=6", "train.save_every_steps=3")
    (folder / "first.txt").write_text(done.stderr)
    (folder / "first.json").write_text(json.dumps(metrics(folder / "run")))
    (folder / "run/checkpoints/latest").write_text("step-00000003")
    two_ranks.succeed(*command, "train.max_steps=8", "--resume", "auto")
    return folder


def test_monitors_have_what_is_logged_against_optimizer_steps(killed):
    """Of both starts: what was done twice is there twice, nothing begins at 0 again, and no other axis is there."""
    first, second = json.loads((killed / "first.json").read_text()), metrics(killed / "run")
    assert [record["step"] for record in first] == [1, 2, 4, 6]
    written = [*first, *(record for record in second if record["step"] > 3)]
    assert [record["step"] for record in written] == [1, 2, 4, 6, 4, 6, 8]
    pictures, tables = drawn(killed / "run/tensorboard/run"), in_csv(killed / "run/tables/mine")
    keys = first[0].keys() - {"step"}
    assert keys > {*NAMES, *(["loss_scale"] if HALF_MATMUL else [])}
    assert pictures.keys() == {f"train/{key}" for key in keys}
    assert tables.keys() == {f"train_{key}" for key in keys}
    for key in keys:
        assert_same(tables[f"train_{key}"], numbers(written, key))
        assert_same(sorted(pictures[f"train/{key}"]), sorted(numbers(written, key)))


def test_mfu_is_the_share_of_the_peak_that_was_stated(killed):
    macs = forward_macs(MaskedAutoencoder, load_recipe(killed / "run/config.yaml").model)
    for record in json.loads((killed / "first.json").read_text()):
        assert record["mfu"] * PEAK_FLOPS * 2 == pytest.approx(record["clips_per_s"] * 6 * macs)
    said = (killed / "first.txt").read_text()
    assert said.count("of 0.01 TFLOP/s per device (train.peak_flops)") == 1, said
    assert re.search(r"^step 6/6  loss .* clips/s  MFU \d+\.\d %  peak \d\.\d GiB  .*left 0:00:00$", said, re.M), said


def test_the_resolved_json_names_no_folder_of_this_run(killed):
    """It may be another run's --ds_config."""
    ds = json.loads((killed / "run/ds_config.json").read_text())
    assert ds["tensorboard"] == {"enabled": True}
    assert ds["csv_monitor"] == {"enabled": True, "output_path": "tables", "job_name": "mine"}


def test_validations_are_written_and_a_monitor_that_fails_stops_nothing(tmp_path, motion_videos, one_rank):
    """The table of losses can't be written: a folder has its name."""
    ds = with_monitors(tmp_path, tensorboard={"output_path": str(tmp_path / "boards")}, csv_monitor={})
    run_dir = tmp_path / "tuned"
    (run_dir / "csv_monitor/tuned/train_loss.csv").mkdir(parents=True)
    settings = [*SMALL, f"data.train={motion_videos}", f"data.val={motion_videos}", f"train.output_dir={run_dir}"]
    settings += ["train.max_steps=6", "train.validate_every_epochs=0.125"]
    done = one_rank.succeed("run/finetune.py", "--ds_config", ds, *settings)
    records = [json.loads(line) for line in (run_dir / "validation.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [2, 4, 6]
    pictures, tables = drawn(tmp_path / "boards/tuned"), in_csv(run_dir / "csv_monitor/tuned")
    for key in ("top1", "top5", "videos"):
        assert_same(pictures[f"val/{key}"], numbers(records, key))
        assert_same(tables[f"val_{key}"], numbers(records, key))
    assert_same(pictures["train/loss"], numbers(metrics(run_dir), "loss"))
    warnings = [line for line in done.stderr.splitlines() if "csvMonitor" in line]
    assert len(warnings) == 1, done.stderr
    assert "Is a directory" in warnings[0]
