"""How many tokens of a clip are seen, reconstructed and dropped: the integers that everything agrees on.

No torch here. The model takes its shapes and the memory accounting takes its bytes from the same
:class:`TokenBudget`, so they cannot drift apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from everest_ds.config.errors import UserError
from everest_ds.config.schema import IMPORTANCE_SELECTORS, ModelConfig

# Ratios are decimals that people type. Reading a float back as the nearest fraction with a small denominator
# undoes its rounding: 1 - 0.9 is a tenth again, and a tenth of 160 is 16, not 15.999999999999996.
_LARGEST_DENOMINATOR = 10**6


def share(ratio: float, count: int) -> int:
    """Return ``floor(ratio * count)``, immune to float rounding (the official counts are ``int(ratio * count)``)."""
    return math.floor(Fraction(ratio).limit_denominator(_LARGEST_DENOMINATOR) * count)


@dataclass(frozen=True, kw_only=True)
class TokenBudget:
    """Token counts of one clip.

    ``slots x rows x columns`` is the grid (time, height, width). ``visible`` tokens enter the encoder,
    ``reconstructed`` ones are the targets, ``dropped`` ones are neither; ``kept = visible + reconstructed``.

    Frame selection takes ``slots`` of ``candidate_slots`` slots by where the ``candidate_kept`` most important tokens
    of all candidates are (0: as without it, ``slots`` and ``kept``).
    """

    slots: int
    rows: int
    columns: int
    visible: int
    reconstructed: int
    candidate_slots: int = 0
    candidate_kept: int = 0

    def __post_init__(self) -> None:
        # Without frame selection the clip is its own only candidate.
        for key, default in (("candidate_slots", self.slots), ("candidate_kept", self.kept)):
            object.__setattr__(self, key, getattr(self, key) or default)

    @property
    def per_slot(self) -> int:
        """Tokens of one slot (the paper's J)."""
        return self.rows * self.columns

    @property
    def total(self) -> int:
        """All tokens of the clip (tau x J)."""
        return self.slots * self.per_slot

    @property
    def candidate_total(self) -> int:
        """All tokens of the candidate slots."""
        return self.candidate_slots * self.per_slot

    @property
    def kept(self) -> int:
        """Tokens that the decoder sees."""
        return self.visible + self.reconstructed

    @property
    def dropped(self) -> int:
        """Tokens that are neither encoded nor reconstructed."""
        return self.total - self.kept

    @property
    def selects_frames(self) -> bool:
        """Whether some slots that are read are not trained on (paper, section 4.2)."""
        return self.candidate_slots > self.slots

    @property
    def slot_noise(self) -> int:
        """Uniform numbers of a clip that decide which slots are taken."""
        return self.candidate_slots if self.selects_frames else 0

    @property
    def clip_noise(self) -> int:
        """Uniform numbers that travel with a clip: enough for any token selection, and for frame selection."""
        return self.total + self.slot_noise

    @classmethod
    def for_pretraining(cls, model: ModelConfig) -> TokenBudget:
        """Count for a pre-training step (paper, section 4.1).

        At 1568 tokens: ReRo at 0.3/0.1 keeps 470 = 156 visible + 314 reconstructed; the tube mask at 0.1 shows 160
        (20 places in each of 8 slots) and reconstructs 1408.

        Raises:
            UserError: a ratio leaves no token to see or none to reconstruct.
        """
        side = model.image_size // model.patch_pixels
        per_slot, total = side * side, model.slots * side * side
        keep_ratio = model.keep_ratio if model.resolved_selector in IMPORTANCE_SELECTORS else 1.0
        kept = share(keep_ratio, total)
        if model.resolved_selector == "tube":
            # VideoMAE rounds the masked places down, so the visible ones up.
            visible = model.slots * (per_slot - share(1 - model.visible_ratio, per_slot))
        else:
            visible = share(model.visible_ratio, total)
        if visible < 1 or kept <= visible:
            raise UserError(
                f"model.visible_ratio: of {total} tokens {visible} would be visible and {kept - visible} "
                "reconstructed; each needs at least one"
            )
        return cls(
            slots=model.slots,
            rows=side,
            columns=side,
            visible=visible,
            reconstructed=kept - visible,
            candidate_slots=model.candidate_slots,
            candidate_kept=share(keep_ratio, model.candidate_slots * per_slot),
        )

    @classmethod
    def for_classification(cls, model: ModelConfig) -> TokenBudget:
        """Count for a classifier (paper, section 4.3): the kept tokens all enter, none is reconstructed.

        Raises:
            UserError: the ratio leaves no token.
        """
        side = model.image_size // model.patch_pixels
        total = model.slots * side * side
        visible = share(model.keep_ratio, total)
        if visible < 1:
            raise UserError(f"model.keep_ratio: {model.keep_ratio} of {total} tokens leaves none")
        return cls(slots=model.slots, rows=side, columns=side, visible=visible, reconstructed=0)
