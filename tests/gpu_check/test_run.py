"""Two runs compared: the one that was killed and continued, and the one that went straight through."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from everest_ds.gpu_check.cases import WrongError
from everest_ds.gpu_check.run import compare
from everest_ds.training.run_dir import RunDir


def run_dir(path: Path, losses: list[float]) -> RunDir:
    path.mkdir()
    made = RunDir(path)
    made.metrics.write_text("".join(json.dumps({"loss": loss}) + "\n" for loss in losses))
    save_file({"weight": torch.ones(2)}, made.weights)
    return made


def test_equal_runs(tmp_path):
    straight, killed = (run_dir(tmp_path / name, [1.25, 0.5]) for name in ("straight", "killed"))
    assert compare(straight, killed) == {"steps": 2, "losses_apart": 0.0, "same_bits": True}


@pytest.mark.parametrize("last", [0.502, math.nan])
def test_a_loss_that_differs_is_wrong(tmp_path, last):
    """At the last step, too, and if it is no number there alone."""
    straight, killed = run_dir(tmp_path / "straight", [1.25, 0.5]), run_dir(tmp_path / "killed", [1.25, last])
    with pytest.raises(WrongError, match="losses differ by"):
        compare(straight, killed)
