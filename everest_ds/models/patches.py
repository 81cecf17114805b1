"""Clips cut into tubelets, and back; and the normalisation that pixels get on the device.

One uint8 cut serves every reader: importance, the encoder's input and the targets.
"""

from __future__ import annotations

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

CHANNELS = 3
GREY_LEVELS = 255


def patchify(clips: Tensor, tubelet: int, patch: int) -> Tensor:
    """Cut clips into tokens.

    Args:
        clips: (B, 3, T, H, W), any dtype.
        tubelet: frames per token.
        patch: token side, pixels.

    Returns:
        (B, N, 3, tubelet * patch * patch), tokens ordered slot, row, column; pixels ordered frame, row, column.
    """
    batch, channels, frames, height, width = clips.shape
    slots, rows, columns = frames // tubelet, height // patch, width // patch
    cut = clips.reshape(batch, channels, slots, tubelet, rows, patch, columns, patch)
    cut = cut.permute(0, 2, 4, 6, 1, 3, 5, 7)
    return cut.reshape(batch, slots * rows * columns, channels, tubelet * patch * patch)


def unpatchify(patches: Tensor, grid: tuple[int, int, int], tubelet: int, patch: int) -> Tensor:
    """Undo :func:`patchify`: (B, N, 3, P) to (B, 3, T, H, W), for a grid of (slots, rows, columns)."""
    slots, rows, columns = grid
    batch, _, channels, _ = patches.shape
    cut = patches.reshape(batch, slots, rows, columns, channels, tubelet, patch, patch)
    cut = cut.permute(0, 4, 1, 5, 2, 6, 3, 7)
    return cut.reshape(batch, channels, slots * tubelet, rows * patch, columns * patch)


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """Gather tokens: (B, N, ...) at (B, K) int64 to (B, K, ...)."""
    spread = index.reshape(*index.shape, *(1,) * (tokens.ndim - 2))
    return tokens.gather(1, spread.expand(*index.shape, *tokens.shape[2:]))


def normalise(patches: Tensor, dtype: torch.dtype) -> Tensor:
    """Standardise uint8 pixels by the ImageNet mean and deviation of their channel, in fp32, then cast.

    (Arithmetic in bf16 would merge grey levels: 256 become 244.)

    Args:
        patches: (..., 3, P) uint8.
        dtype: floating type of the result.

    Returns:
        (..., 3 * P), ready for the embedding.
    """
    mean, deviation = _filled(IMAGENET_DEFAULT_MEAN, patches.device), deviations(patches.device)
    scaled = patches.float().mul_((1 / (GREY_LEVELS * deviation)).unsqueeze(-1))
    return scaled.sub_((mean / deviation).unsqueeze(-1)).flatten(-2).to(dtype)


def deviations(device: torch.device) -> Tensor:
    """Return the (3,) deviations that :func:`normalise` divides by, in units of the brightest grey level."""
    return _filled(IMAGENET_DEFAULT_STD, device)


def _filled(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return a vector that kernels fill: a copy from the host would make it wait for the device."""
    return torch.stack([torch.full((), value, device=device) for value in values])
