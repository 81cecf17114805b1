"""Redundancy-robust (ReRo) importance: how far each token's embedding moved since the slot before.

The distance needs no embeddings. The embedding is linear, so its bias and the channels' means cancel, and what is left
is the product of the weights with differences of uint8 pixels: whole numbers from -255 to 255. fp16 holds those
exactly. So a GPU scores at the speed of its tensor cores, which sum in fp32 (so do kernels that split a sum, once
:func:`everest_ds.training.ranks.start` has told them), and closer to exact arithmetic than
embeddings in half precision that are subtracted afterwards (``tools/benchmark.py scoring`` counts both).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from everest_ds.models.patches import CHANNELS, GREY_LEVELS, deviations

# The largest sum that weights and pixels can make is scaled to half of what fp16 holds: rounding may go upwards.
_LARGEST_PRODUCT = torch.finfo(torch.float16).max / 2


def scoring_dtype(weight_dtype: torch.dtype, device_type: str) -> torch.dtype:
    """Return what differences are multiplied in: fp16 where a GPU computes in half precision, else fp32.

    In half precision are weights, or products by autocast. fp16 for bf16 as well: both hold the differences, and it
    keeps three more bits of the weights.
    """
    in_half = weight_dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(device_type)
    return torch.float16 if in_half and device_type != "cpu" else torch.float32


def importance(patches: Tensor, weight: Tensor, slots: int, dtype: torch.dtype) -> Tensor:
    """Score every token by how much it changed.

    L2 distance between embeddings at the same place in neighbouring slots, before positions are added (EVEREST,
    section 3.1, equation 2). Slot 0 has no predecessor and takes slot 1's values (official code).

    Args:
        patches: (B, N, 3, P) uint8.
        weight: (D, 3 * P), the embedding's.
        slots: tubelets in time, at least 2.
        dtype: of the products, see :func:`scoring_dtype`.

    Returns:
        (B, N) distances, fp32.
    """
    by_slot = patches.flatten(2).unflatten(1, (slots, -1))
    moved = by_slot.to(dtype).diff(dim=1)
    scaled, unit = scaled_weight(weight, dtype)
    distances = lengths(F.linear(moved, scaled)) * unit
    return torch.cat([distances[:, :1], distances], dim=1).flatten(1)


def scaled_weight(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return what to multiply differences of grey levels with, (D, 3 * P), and what that makes of a distance of 1.

    In fp16 the weights are scaled: by themselves many would be so small that fp16 rounds them coarsely, and large ones
    could make a sum overflow.
    """
    per_level = weight.float().unflatten(1, (CHANNELS, -1)) / (GREY_LEVELS * deviations(weight.device)).unsqueeze(-1)
    per_level = per_level.flatten(1)
    if dtype != torch.float16:
        return per_level.to(dtype), per_level.new_ones(())
    largest = GREY_LEVELS * per_level.abs().sum(dim=1).max()
    unit = (largest / _LARGEST_PRODUCT).clamp_min(torch.finfo(torch.float32).tiny)
    return (per_level / unit).to(dtype), unit


def lengths(vectors: Tensor) -> Tensor:
    """(..., D) to their L2 norms (...), summed and returned in fp32 or, given fp64, in that."""
    dtype = torch.promote_types(vectors.dtype, torch.float32)
    return torch.linalg.vector_norm(vectors, dim=-1, dtype=dtype)
