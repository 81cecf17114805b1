"""The weights of a run as one file that needs neither DeepSpeed nor trust: model.safetensors, fp32."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from safetensors.torch import save_file
from torch import Tensor

from everest_ds.config.load import to_tree
from everest_ds.config.schema import ModelConfig
from everest_ds.models.weights import CONFIG_KEY

_MODEL_STATES = "mp_rank_00_model_states.pt"


def export_weights(checkpoints: Path, config: ModelConfig, path: Path) -> None:
    """Gather the latest checkpoint's full-precision weights into one file, replaced in one move.

    Args:
        checkpoints: a run's ``checkpoints`` folder.
        config: the model settings, stored in the file's header.
        path: the file to write.
    """
    tag = checkpoints / (checkpoints / "latest").read_text(encoding="utf-8").strip()
    if any(tag.glob("*_optim_states.pt")):
        # Silenced: it narrates its progress.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            state = get_fp32_state_dict_from_zero_checkpoint(str(checkpoints))
    else:
        # Our own file of a moment ago; it holds optimizer settings besides tensors.
        state = torch.load(tag / _MODEL_STATES, map_location="cpu", weights_only=False)["module"]
    tensors: dict[str, Tensor] = {name: tensor.float().contiguous() for name, tensor in state.items()}
    unfinished = path.with_suffix(".unfinished")
    save_file(tensors, unfinished, metadata={CONFIG_KEY: json.dumps(to_tree(config))})
    unfinished.replace(path)
