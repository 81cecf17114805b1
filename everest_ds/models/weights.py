"""Weights that come from elsewhere: what the official checkpoints call our parameters.

The official attention holds ``q_bias`` and ``v_bias`` and no bias for k; timm's ``qkv.bias`` is the three in a row,
with zeros for k. A k bias shifts all logits of a query alike, which softmax ignores, so nothing is lost.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

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
