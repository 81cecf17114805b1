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
    mean, deviation = _statistics(pixels)
    return pixels.sub_(mean).div_(deviation).transpose(-2, -1).flatten(-2)


def restore_pixels(prediction: Tensor, patches: Tensor, target_idx: Tensor) -> Tensor:
    """Undo the standardisation with the true token's mean and deviation, as pictures of reconstructions do.

    Args:
        prediction: (B, R, P * 3), channel fastest.
        patches: (B, N, 3, P) uint8, the truth.
        target_idx: (B, R) int64.

    Returns:
        (B, R, 3, P) uint8.
    """
    mean, deviation = _statistics(take(patches, target_idx).float().div_(GREY_LEVELS))
    standardised = prediction.float().unflatten(-1, (-1, patches.shape[-2])).transpose(-2, -1)
    return ((standardised * deviation + mean) * GREY_LEVELS).round_().clamp_(0, GREY_LEVELS).to(torch.uint8)


def _statistics(pixels: Tensor) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(pixels, dim=-1, keepdim=True)
    return mean, variance.sqrt_().add_(_TARGET_EPS)
