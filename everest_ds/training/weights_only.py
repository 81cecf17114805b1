"""Loading what DeepSpeed saved, without running code that a file may hold.

DeepSpeed reads its checkpoints with ``torch.load(weights_only=False)``: whoever gives away a run directory could run
anything where it is continued. What it saves beside tensors and plain values is a handful of its own classes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.runtime.fp16 import loss_scaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
# None of them does anything but hold values when it is made.
_SAVED: list[Any] = [loss_scaler.LossScaler, loss_scaler.DynamicLossScaler, fragment_address, ZeroStageEnum]


@contextlib.contextmanager
def weights_only() -> Iterator[None]:
    """Make every ``torch.load`` inside refuse pickles that call anything else, whatever it was told."""
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals(_SAVED):
            yield
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before
