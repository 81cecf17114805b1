"""What is reconstructed: the pixels of the target tokens, standardised per token and channel."""

from __future__ import annotations

import torch
from torch import Tensor

from everest_ds.models.patches import GREY_LEVELS, take

_TARGET_EPS = 1e-6


def build_targets(patches: Tensor, target_idx: Tensor) -> Tensor:
    """Targets of the chosen tokens alone (official rule: unbiased variance, epsilon added to the deviation).

    Args:
        patches: (B, N, 3, P) uint8.
        target_idx: (B, R) int64.

    Returns:
        (B, R, P * 3) fp32, channel fastest, as the official heads predict them.
    """
    pixels = take(patches, target_idx).float().div_(GREY_LEVELS)
    variance, mean = torch.var_mean(pixels, dim=-1, keepdim=True)
    standardised = pixels.sub_(mean).div_(variance.sqrt_().add_(_TARGET_EPS))
    return standardised.transpose(-2, -1).flatten(-2)
