"""Tubelet embedding: every token embedded once, gradient through the selected ones alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everest_ds.models.patches import CHANNELS, normalise, take

# (B, N, D) embeddings without gradient -> visible and target indices, (B, V) and (B, R) int64, ascending.
Select = Callable[[Tensor], tuple[Tensor, Tensor]]
# (B, M, D) embeddings and (B, M, 3, P) patches of the candidate slots -> those of the slots taken, and which they are.
SelectFrames = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class VisibleTokens(NamedTuple):
    """The visible tokens, embedded or encoded, and what was chosen on the way.

    ``tokens`` (B, V, D); ``visible_idx`` (B, V) and ``target_idx`` (B, R) int64, ascending; ``patches`` (B, N, 3, P)
    uint8, of the whole clip that is trained on; ``slot_idx`` (B, slots) int64, ascending: the candidate slots that it
    is made of, None without frame selection.
    """

    tokens: Tensor
    visible_idx: Tensor
    target_idx: Tensor
    patches: Tensor
    slot_idx: Tensor | None


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

    def forward(  # type: ignore[override]
        self, patches: Tensor, select: Select, precise: bool = True, select_frames: SelectFrames | None = None
    ) -> VisibleTokens:
        """Embed all tokens, let ``select`` look at them, and return those that it makes visible, with gradient.

        Args:
            patches: (B, N, 3, P) uint8; with frame selection, of all candidate slots.
            select: chooses tokens from their embeddings.
            precise: embed in fp32 whatever the training precision, as importance needs.
            select_frames: chooses slots first; None: all of them.
        """
        slot_idx = None
        dtype = torch.float32 if precise else self.weight.dtype
        with torch.no_grad(), torch.autocast(patches.device.type, enabled=False):
            tokens = F.linear(normalise(patches, dtype), self.weight.to(dtype), self.bias.to(dtype))
            if select_frames is not None:
                tokens, patches, slot_idx = select_frames(tokens, patches)
            visible_idx, target_idx = select(tokens)
            visible, pixels = take(tokens, visible_idx), take(patches, visible_idx)
        visible = _SelectedTokens.apply(self.weight, self.bias, pixels, visible)
        return VisibleTokens(visible, visible_idx, target_idx, patches, slot_idx)
