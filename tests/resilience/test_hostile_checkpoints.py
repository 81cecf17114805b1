"""What DeepSpeed saves comes back without running what a file may hold, although DeepSpeed asks for just that."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from everest_ds.training.weights_only import weights_only


class Calls:
    """Its pickle calls a function when it is read."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def test_code_does_not_run(tmp_path: Path) -> None:
    file, ran = tmp_path / "states.pt", tmp_path / "ran"
    torch.save({"step": 3, "module": Calls(os.system, f"touch {ran}")}, file)
    with weights_only(), pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=False)
    assert not ran.exists()
    # As DeepSpeed does: the test could fail.
    torch.load(file, weights_only=False)
    assert ran.exists()


@pytest.mark.parametrize("dynamic", [False, True])
def test_what_deepspeed_saves_is_read(tmp_path: Path, dynamic: bool) -> None:
    scale = {
        "init_scale": 8.0,
        "scale_window": 5,
        "min_scale": 1.0,
        "delayed_shift": 1,
        "consecutive_hysteresis": False,
    }
    scaler = CreateLossScaler(torch.float16, static_loss_scale=1.0, dynamic_scaling=dynamic, dynamic_loss_args=scale)
    saved = {
        "loss_scaler": scaler,
        "zero_stage": ZeroStageEnum.gradients,
        "param_slice_mappings": [{"head.bias": fragment_address(numel=3, start=4)}],
        "weights": torch.arange(3.0),
    }
    file = tmp_path / "states.pt"
    torch.save(saved, file)
    with weights_only():
        found = torch.load(file, weights_only=False)
    assert found["zero_stage"] is ZeroStageEnum.gradients
    assert found["param_slice_mappings"] == saved["param_slice_mappings"]
    assert found["loss_scaler"].loss_scale == scaler.loss_scale
    assert torch.equal(found["weights"], saved["weights"])


@pytest.mark.parametrize("before", [None, "0"])
def test_the_environment_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch, before: str | None) -> None:
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    monkeypatch.delenv(name, raising=False)
    if before is not None:
        monkeypatch.setenv(name, before)
    with contextlib.suppress(OSError), weights_only():
        assert os.environ[name] == "1"
        torch.load("nothing.pt")
    assert os.environ.get(name) == before
