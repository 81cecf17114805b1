"""Weights in files: our own, and what the official checkpoints call our parameters.

The official attention holds ``q_bias`` and ``v_bias`` and no bias for k; timm's ``qkv.bias`` is the three in a row,
with zeros for k. A k bias shifts all logits of a query alike, which softmax ignores, so nothing is lost.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from everest_ds.config.errors import UserError
from everest_ds.config.load import build
from everest_ds.config.schema import ModelConfig
from everest_ds.models.autoencoder import MaskedAutoencoder

WEIGHTS_FILE = "model.safetensors"
# The header entry that holds the model settings, as JSON.
CONFIG_KEY = "everest_ds.model"

_CONV_EMBED = re.compile(r"(^|\.)patch_embed\.proj\.")
_FIXED_TABLES = ("pos_embed",)


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename and reshape an official EVEREST or VideoMAE state dict (pre-training or classifier) to ours."""
    ours: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.endswith(_FIXED_TABLES) or key.endswith(".q_bias"):
            continue
        if key.endswith(".v_bias"):
            q_bias = state[key.removesuffix("v_bias") + "q_bias"]
            ours[key.removesuffix("v_bias") + "qkv.bias"] = torch.cat([q_bias, torch.zeros_like(value), value])
        else:
            new_key = _CONV_EMBED.sub(r"\1patch_embed.", key)
            ours[new_key] = value.flatten(1) if value.ndim == 5 else value
    return ours


def load_pretrained(path: str | Path, *, device_type: str = "cpu") -> MaskedAutoencoder:
    """Return the autoencoder of a finished run, with its weights.

    Args:
        path: a run directory, or the ``model.safetensors`` that a run writes at its end.
        device_type: where it will run; decides what ``attention="auto"`` means.

    Raises:
        UserError: there is no such file, or it isn't one of ours.
    """
    file = Path(path) / WEIGHTS_FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(f"{path}: no {WEIGHTS_FILE} here; a run writes it when it ends")
    try:
        with safe_open(file, framework="pt") as opened:
            settings = json.loads((opened.metadata() or {})[CONFIG_KEY])
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise UserError(f"{file}: not weights that everest_ds wrote ({error})") from error
    model = MaskedAutoencoder(build(ModelConfig, settings, "model."), device_type=device_type)
    model.load_state_dict(state)
    return model
