"""Parameter groups of the optimizer: who has weight decay, and how fast each layer learns."""

from __future__ import annotations

from typing import Any

from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

# Exempt from weight decay besides vectors (official skip list).
_NO_DECAY = ("mask_token",)


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Groups for an optimizer: matrices with weight decay; vectors and the mask token without (official rule).

    Args:
        model: one with timm's ``group_matcher``, if layers are to learn at different rates.
        weight_decay: of the matrices.
        layer_decay: factor of the learning rate per layer from the top; 1 makes two groups, another number two per
            layer, each with its ``lr_scale`` (paper, Table 8; BEiT).
    """
    if layer_decay == 1:
        return param_groups_weight_decay(model, weight_decay, no_weight_decay_list=_NO_DECAY)
    return param_groups_layer_decay(model, weight_decay, no_weight_decay_list=_NO_DECAY, layer_decay=layer_decay)
