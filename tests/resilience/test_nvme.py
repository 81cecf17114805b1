"""The optimizer on NVMe: the same training, saved and continued, files of its own, and memory as predicted.

Slow where DeepSpeed's async_io isn't built yet: two libraries, minutes.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from killing import pretraining
from launching import DS_CONFIGS, losses, new_console, run
from safetensors.torch import load_file

from everest_ds.training.ops import op_obstacle

pytestmark = pytest.mark.slow
OBSTACLE = op_obstacle("AsyncIOBuilder", build=False)
STEPS, HALF = 6, 3
SETTINGS = ("train.log_every_steps=1", f"train.save_every_steps={HALF}")


@pytest.fixture(scope="module")
def ds_configs(tmp_path_factory) -> dict[str, Path]:
    """The shipped files, the folder for NVMe made, and of this small model only half worth a file."""
    if OBSTACLE:
        pytest.skip(f"async_io: {OBSTACLE}")
    folder = tmp_path_factory.mktemp("ds_configs")
    (folder / "nvme").mkdir()
    files = {}
    for name in ("zero3", "zero3_nvme"):
        ds = json.loads((DS_CONFIGS / f"{name}.json").read_text())
        ds["zero_optimization"]["stage3_param_persistence_threshold"] = 100
        if name == "zero3_nvme":
            ds["zero_optimization"]["offload_optimizer"]["nvme_path"] = str(folder / "nvme")
        files[name] = folder / f"{name}.json"
        files[name].write_text(json.dumps(ds))
    return files


def tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    parts = sorted((run_dir / f"checkpoints/step-{STEPS:08}").glob("*.safetensors"))
    return {key: value for part in parts for key, value in load_file(part).items()}


def test_nvme_changes_nothing_and_continues(motion_videos, tmp_path, ds_configs):
    """Losses and every tensor of the checkpoint, bit for bit; half the steps on NVMe and half without, both ways."""
    cases = {name: pretraining(motion_videos, STEPS, file) for name, file in ds_configs.items()}
    nvme = ds_configs["zero3_nvme"].parent / "nvme"
    with new_console(2, tmp_path / "console") as console:
        for name, case in cases.items():
            console.succeed(*case.command(tmp_path / name, *SETTINGS), timeout_s=600)
        assert list(nvme.glob("everest-rank*/zero_stage_3/optimizer/rank*/exp_avg-*.swp"))
        for before, after in (("zero3_nvme", "zero3_nvme"), ("zero3", "zero3_nvme"), ("zero3_nvme", "zero3")):
            moved = tmp_path / f"{before}-{after}"
            shutil.copytree(tmp_path / before, moved)
            shutil.rmtree(moved / f"checkpoints/step-{STEPS:08}")
            (moved / "checkpoints/latest").write_text(f"step-{HALF:08}")
            done = console.succeed(*cases[after].command(moved, *SETTINGS))
            assert "continuing" in done.stderr
    expected = tensors(tmp_path / "zero3")
    for name in ("zero3_nvme", "zero3_nvme-zero3_nvme", "zero3-zero3_nvme", "zero3_nvme-zero3"):
        assert losses(tmp_path / name) == losses(tmp_path / "zero3"), name
        found = tensors(tmp_path / name)
        assert expected.keys() == found.keys()
        assert [key for key in expected if not torch.equal(expected[key], found[key])] == [], name
    assert list(nvme.iterdir()) == []  # the processes have ended


def test_memory_is_as_predicted(ds_configs):
    done = run("tools/memprof", "measure", "--model", "vit_small", "--micro-batch", "2", "--ranks", "2", "--json",
               "--precision", "bf16", "--ds_config", ds_configs["zero3_nvme"], "model.image_size=48")  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["nvme"]["Adam moments"] > result["host"].get("Adam moments", 0)
    assert result["predicted_states_bytes"] == pytest.approx(result["states_bytes"], rel=0.01)
    assert result["compared_bytes"] == pytest.approx(result["measured_peak_bytes"], rel=0.05)
