"""The weights of a run as one file that needs neither DeepSpeed nor trust: model.safetensors, fp32."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from safetensors.torch import save_file
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

from everest_ds.config.load import to_tree
from everest_ds.config.schema import ModelConfig
from everest_ds.models.weights import CONFIG_KEY
from everest_ds.training.average import Average


def export_weights(
    engine: Any, checkpoints: Path, config: ModelConfig, path: Path, average: Average | None = None
) -> None:
    """Write the full-precision weights into one file, replaced in one move.

    Args:
        engine: the engine that has just saved into ``checkpoints``.
        checkpoints: a run's ``checkpoints`` folder.
        config: the model settings, stored in the file's header.
        path: the file to write.
        average: written in place of the last weights, which stay in the checkpoint.
    """
    if average is not None:
        state = average.state
    elif engine.zero_optimization():
        # Every rank holds a part: put together from the checkpoint. Silenced: it narrates its progress.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            state = get_fp32_state_dict_from_zero_checkpoint(str(checkpoints))
    else:
        state = _undivided_state(engine)
    tensors: dict[str, Tensor] = {name: tensor.detach().float().cpu().contiguous() for name, tensor in state.items()}
    unfinished = path.with_suffix(".unfinished")
    save_file(tensors, unfinished, metadata={CONFIG_KEY: json.dumps(to_tree(config))})
    unfinished.replace(path)


def _undivided_state(engine: Any) -> dict[str, Tensor]:
    """Return the weights of a stage-0 engine: in half precision the optimizer's fp32 masters, not their rounding."""
    state = dict(engine.module.named_parameters())
    optimizer = engine.optimizer
    names = {id(parameter): name for name, parameter in state.items()}
    if hasattr(optimizer, "fp32_groups_flat"):
        for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True):
            for half, master in zip(group, _unflatten_dense_tensors(flat, group), strict=True):
                state[names[id(half)]] = master
    elif hasattr(optimizer, "fp32_groups"):
        for group, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            state |= {names[id(half)]: master for half, master in zip(group, masters, strict=True)}
    return state
