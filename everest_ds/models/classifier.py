"""The classifier: the encoder over the most important tokens, mean pooling, a linear head."""

from __future__ import annotations

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from everest_ds.config.schema import ModelConfig
from everest_ds.models.backbone import Checkpoint, Encoder, initialise, norm, recompute
from everest_ds.models.selection import importance, most_important
from everest_ds.tokens import TokenBudget

_HEAD_DEVIATION = 0.02


class VideoClassifier(Encoder):
    """Classify clips from the ``keep_ratio`` share of their tokens that change most (EVEREST, section 4.3).

    No randomness: the same clip always gives the same logits. At a keep ratio of 1 every token enters.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        classes: int,
        device_type: str = "cpu",
        checkpoint: Checkpoint | None = None,
        drop_path: float = 0.0,
    ) -> None:
        budget = TokenBudget.for_classification(config)
        super().__init__(
            config, budget, device_type=device_type, checkpoint=checkpoint or recompute, drop_path=drop_path
        )
        self.config, self.budget = config, budget
        self.fc_norm = norm(config.row.width)
        self.head = nn.Linear(config.row.width, classes)
        self.apply(initialise)
        trunc_normal_(self.head.weight, std=_HEAD_DEVIATION)

    def select(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of the kept tokens, (B, V) ascending, and no targets."""
        if self.budget.visible == self.budget.total:
            kept = torch.arange(self.budget.total, device=tokens.device).expand(len(tokens), -1)
        else:
            kept = most_important(importance(tokens, self.budget.slots), self.budget.visible).sort(dim=1).values
        return kept, kept[:, :0]

    def kept_indices(self, clips: Tensor) -> Tensor:
        """(B, V) int64, ascending: the tokens that a clip is classified from."""
        return super().forward(clips, self.select, self.precise)[1]

    @property
    def precise(self) -> bool:
        """Whether tokens are embedded in fp32: only where importance is read."""
        return self.budget.visible < self.budget.total

    def features(self, clips: Tensor) -> Tensor:
        """(B, 3, T, H, W) uint8 to (B, D): mean of the kept tokens, normed."""
        tokens, *_ = super().forward(clips, self.select, self.precise)
        return self.fc_norm(tokens.mean(dim=1))

    def forward(self, clips: Tensor) -> Tensor:  # type: ignore[override]
        """(B, 3, T, H, W) uint8 to (B, classes) logits."""
        return self.head(self.features(clips))
