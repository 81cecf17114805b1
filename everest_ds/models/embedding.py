"""Tubelet embedding: every token embedded once, gradient through the selected ones alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everest_ds.models.patches import CHANNELS, normalise, take

# (B, N, D) embeddings without gradient -> visible and target indices, (B, V) and (B, R) int64, ascending.
Select = Callable[[Tensor], tuple[Tensor, Tensor]]


class _SelectedTokens(torch.autograd.Function):
    """Give tokens that were embedded without gradient the gradient of a linear layer.

    The forward product exists already (importance needs every token), so it isn't computed twice; the backward
    pass needs the selected patches alone, which are kept as uint8: a quarter of the bytes of float32.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor, patches: Tensor, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(patches)
        ctx.dtypes = weight.dtype, bias.dtype
        return tokens.view_as(tokens)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (patches,) = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        grad = grads[0].flatten(0, 1).to(weight_dtype)
        pixels = normalise(patches.flatten(0, 1), weight_dtype)
        return grad.t() @ pixels, grad.sum(0).to(bias_dtype), None, None


class TubeletEmbedding(nn.Linear):
    """The patch embedding (a Conv3d with kernel = stride in the official code) as a linear layer over pixels.

    ``weight`` is (D, 3 * tubelet * patch * patch), the convolution's kernel flattened.
    """

    def __init__(self, tubelet: int, patch: int, width: int) -> None:
        super().__init__(CHANNELS * tubelet * patch * patch, width)

    def forward(self, patches: Tensor, select: Select, precise: bool = True) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """Embed all tokens, let ``select`` look at them, and return those that it makes visible.

        Args:
            patches: (B, N, 3, P) uint8.
            select: chooses tokens from their embeddings.
            precise: embed in fp32 whatever the training precision, as importance needs.

        Returns:
            (B, V, D) visible tokens with gradient, (B, V) visible and (B, R) target indices.
        """
        dtype = torch.float32 if precise else self.weight.dtype
        with torch.no_grad(), torch.autocast(patches.device.type, enabled=False):
            tokens = F.linear(normalise(patches, dtype), self.weight.to(dtype), self.bias.to(dtype))
            visible_idx, target_idx = select(tokens)
            visible, pixels = take(tokens, visible_idx), take(patches, visible_idx)
        return _SelectedTokens.apply(self.weight, self.bias, pixels, visible), visible_idx, target_idx
