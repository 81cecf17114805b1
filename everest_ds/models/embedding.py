"""Tubelet embedding: all tokens scored, the visible ones embedded."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from everest_ds.models.frames import take_slots
from everest_ds.models.importance import importance, scoring_dtype
from everest_ds.models.patches import CHANNELS, normalise, take
from everest_ds.tokens import TokenBudget

# (B, N) importance, or None where it isn't read -> visible and target indices, (B, V) and (B, R) int64, ascending.
Select = Callable[[Tensor | None], tuple[Tensor, Tensor]]
# (B, M) importance of the candidate slots' tokens -> (B, slots) int64, ascending: the slots taken.
SelectFrames = Callable[[Tensor], Tensor]


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


class TubeletEmbedding(nn.Linear):
    """The patch embedding (a Conv3d with kernel = stride in the official code) as a linear layer over pixels.

    ``weight`` is (D, 3 * tubelet * patch * patch), the convolution's kernel flattened. Scoring is a part of this
    module's forward pass because it reads the weight, which ZeRO-3 gathers for no longer than that.
    """

    def __init__(self, tubelet: int, patch: int, width: int, *, budget: TokenBudget, device_type: str) -> None:
        super().__init__(CHANNELS * tubelet * patch * patch, width)
        self.budget, self.device_type = budget, device_type

    def forward(  # type: ignore[override]
        self, patches: Tensor, select: Select, scored: bool, select_frames: SelectFrames | None = None
    ) -> VisibleTokens:
        """Score the tokens, let ``select`` choose by the scores, and embed those that it makes visible.

        Args:
            patches: (B, N, 3, P) uint8; with frame selection, of all candidate slots.
            select: chooses tokens.
            scored: whether ``select`` reads importance.
            select_frames: chooses slots first, from their importance; None: all of them.
        """
        budget, slot_idx = self.budget, None
        score = partial(importance, weight=self.weight, dtype=scoring_dtype(self.weight.dtype, self.device_type))
        with torch.no_grad(), torch.autocast(patches.device.type, enabled=False):
            if select_frames is not None:
                slot_idx = select_frames(score(patches, slots=budget.candidate_slots))
                patches = take_slots(patches, slot_idx, budget.candidate_slots)
            visible_idx, target_idx = select(score(patches, slots=budget.slots) if scored else None)
            pixels = normalise(take(patches, visible_idx), self.weight.dtype)
        return VisibleTokens(super().forward(pixels), visible_idx, target_idx, patches, slot_idx)
