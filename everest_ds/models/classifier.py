"""The classifier: the encoder over the most important tokens, mean pooling, a linear head."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from everest_ds.config.errors import UserError
from everest_ds.config.finetuning import ClassifierConfig
from everest_ds.models.backbone import Checkpoint, Encoder, norm, recompute
from everest_ds.models.embedding import TubeletEmbedding, VisibleTokens
from everest_ds.models.selection import RANKINGS
from everest_ds.tokens import TokenBudget

# Official initial weights (VideoMAE, modeling_finetune.py and its --init_scale): a head that says next to nothing.
_DEVIATION, _HEAD_SCALE = 0.02, 0.001


def _initialise(module: nn.Module) -> None:
    """Truncated normal matrices and zero biases; embeddings and norms keep torch's. Not an autoencoder's: narrower."""
    if isinstance(module, nn.Linear) and not isinstance(module, TubeletEmbedding):
        trunc_normal_(module.weight, std=_DEVIATION)
        nn.init.zeros_(module.bias)


class VideoClassifier(Encoder):
    """Classify clips from the ``keep_ratio`` share of their tokens that change most (EVEREST, section 4.3).

    No randomness but drop path in training: the same clip always gives the same logits. At a keep ratio of 1 every
    token enters.

    Args:
        config: the settings; ``classes`` must be a number.
        device_type: where it will run; decides what ``attention=auto`` means and in what precision tokens are scored.
        checkpoint: activation-checkpointing function; None means torch's.

    Raises:
        UserError: the number of classes is missing, or no token would be left.
    """

    def __init__(
        self, config: ClassifierConfig, *, device_type: str = "cpu", checkpoint: Checkpoint | None = None
    ) -> None:
        if config.classes is None:
            raise UserError("model.classes: a classifier needs the number of its classes")
        budget = TokenBudget.for_classification(config)
        super().__init__(
            config, budget, device_type=device_type, checkpoint=checkpoint or recompute, drop_path=config.drop_path
        )
        self.config, self.budget = config, budget
        self.fc_norm = norm(config.row.width)
        self.head = nn.Linear(config.row.width, config.classes)
        self.apply(_initialise)
        with torch.no_grad():
            self.head.weight.mul_(_HEAD_SCALE)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for layer-wise decay, in timm's form: embedding, each block; what no pattern names comes last."""
        return {"stem": r"^patch_embed", "blocks": r"^blocks" if coarse else r"^blocks\.(\d+)"}

    @property
    def drops_tokens(self) -> bool:
        """Whether some tokens don't enter, so that importance is read."""
        return self.budget.visible < self.budget.total

    def _encode(self, clips: Tensor) -> VisibleTokens:
        """Encode the kept tokens; there are no targets."""

        def select(scores: Tensor | None) -> tuple[Tensor, Tensor]:
            if scores is None:
                kept = torch.arange(self.budget.total, device=clips.device).expand(len(clips), -1)
            else:
                kept = RANKINGS[self.config.resolved_selector](scores, self.budget.visible).sort(dim=1).values
            return kept, kept[:, :0]

        return super().forward(clips, select, self.drops_tokens)

    def kept_indices(self, clips: Tensor) -> Tensor:
        """(B, V) int64, ascending: the tokens that a clip is classified from."""
        return self._encode(clips).visible_idx

    def features(self, clips: Tensor) -> Tensor:
        """(B, 3, T, H, W) uint8 to (B, D): mean of the kept tokens, normed."""
        return self.fc_norm(self._encode(clips).tokens.mean(dim=1))

    def forward(self, clips: Tensor) -> Tensor:  # type: ignore[override]
        """(B, 3, T, H, W) uint8 to (B, classes) logits."""
        return self.head(self.features(clips))
