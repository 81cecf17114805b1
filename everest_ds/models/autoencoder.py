"""The masked autoencoder. EVEREST and VideoMAE differ by their selector alone."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from everest_ds.config.errors import UserError
from everest_ds.config.schema import ModelConfig
from everest_ds.models.backbone import Checkpoint, Encoder, Trunk, initialise, norm, recompute, use_fused_attention
from everest_ds.models.embedding import Select, SelectFrames, VisibleTokens
from everest_ds.models.frames import select_frames, take_slots
from everest_ds.models.patches import CHANNELS, patchify
from everest_ds.models.positions import Positions
from everest_ds.models.selection import SELECTORS
from everest_ds.models.targets import build_targets
from everest_ds.tokens import TokenBudget

_MASK_TOKEN_DEVIATION = 0.02
DECODER_MLP_RATIO = 4.0


class Reconstruction(NamedTuple):
    """A step's result.

    ``loss`` is a scalar, fp32; ``prediction`` is (B, R, P * 3) for the targets in ascending order of token index,
    pixels standardised per token, ordered frame, row, column, channel; ``visible_idx`` (B, V) and ``target_idx`` (B, R)
    int64, ascending, within the clip that was trained on; ``slot_idx`` (B, slots) int64, ascending: the candidate slots
    that this clip is made of, None without frame selection.
    """

    loss: Tensor
    prediction: Tensor
    visible_idx: Tensor
    target_idx: Tensor
    slot_idx: Tensor | None


class PretrainEncoder(Encoder):
    """The encoder with its final norm."""

    def __init__(self, config: ModelConfig, budget: TokenBudget, **options: object) -> None:
        super().__init__(config, budget, **options)  # type: ignore[arg-type]
        self.norm = norm(config.row.width)

    def forward(
        self, clips: Tensor, select: Select, scored: bool, select_frames: SelectFrames | None = None
    ) -> VisibleTokens:
        """As :meth:`Encoder.forward`, normed."""
        encoded = super().forward(clips, select, scored, select_frames)
        return encoded._replace(tokens=self.norm(encoded.tokens))


class Decoder(nn.Module):
    """Reconstructs the targets from the visible tokens and mask tokens."""

    def __init__(
        self, config: ModelConfig, budget: TokenBudget, *, device_type: str, checkpoint: Checkpoint | None
    ) -> None:
        super().__init__()
        width, heads = config.decoder_width or 0, config.decoder_heads or 0
        self.positions = Positions(config.positions, budget, width)
        self.blocks = Trunk(
            depth=config.decoder_depth,
            width=width,
            heads=heads,
            mlp_ratio=DECODER_MLP_RATIO,
            fused=use_fused_attention(config.attention, budget.kept, device_type),
            checkpoint=checkpoint if config.checkpointing in ("decoder", "full") else None,
        )
        self.norm = norm(width)
        self.head = nn.Linear(width, CHANNELS * config.tubelet * config.patch_pixels**2)

    def forward(self, visible: Tensor, mask_token: Tensor, visible_idx: Tensor, target_idx: Tensor) -> Tensor:
        """(B, V, W) visible tokens and a (1, 1, W) mask token to (B, R, P * 3) predictions."""
        seen = self.positions(visible, visible_idx)
        hidden = self.positions(mask_token.expand(*target_idx.shape, -1), target_idx)
        tokens = self.blocks.run(torch.cat([seen, hidden], dim=1).to(visible.dtype))
        return self.head(self.norm(tokens[:, -target_idx.shape[1] :]))


class MaskedAutoencoder(nn.Module):
    """Predict the pixels of hidden tokens from a few visible ones (EVEREST, section 4.1; VideoMAE).

    Args:
        config: the model settings.
        device_type: where it will run; decides what ``attention=auto`` means and in what precision tokens are scored.
        checkpoint: activation-checkpointing function; None means torch's.
    """

    def __init__(self, config: ModelConfig, *, device_type: str = "cpu", checkpoint: Checkpoint | None = None) -> None:
        super().__init__()
        self.config = config
        self.budget = TokenBudget.for_pretraining(config)
        self.selector = SELECTORS[config.resolved_selector]
        width = config.decoder_width or 0
        options = {"device_type": device_type, "checkpoint": checkpoint or recompute}
        self.encoder = PretrainEncoder(config, self.budget, **options)
        self.encoder_to_decoder = nn.Linear(config.row.width, width, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder = Decoder(config, self.budget, **options)  # type: ignore[arg-type]
        self.apply(initialise)
        trunc_normal_(self.mask_token, std=_MASK_TOKEN_DEVIATION)

    @property
    def noise_length(self) -> int:
        """Uniform numbers that one clip's selection uses: first of its tokens, then of its slots."""
        return self.selector.noise_length(self.budget) + self.budget.slot_noise

    def forward(self, clips: Tensor, noise: Tensor | None = None) -> Reconstruction:
        """One pre-training forward pass.

        Args:
            clips: (B, 3, T, H, W) uint8, T = ``config.candidate_frames``.
            noise: (B, at least ``noise_length``) uniform in [0, 1), what is visible and which slots are taken depend
                on it; None draws it.

        Raises:
            UserError: the clips or the noise have the wrong shape or type.
        """
        self._check(clips, noise)
        if noise is None:
            noise = torch.rand(len(clips), self.noise_length, device=clips.device)

        def select(scores: Tensor | None) -> tuple[Tensor, Tensor]:
            return self.selector.choose(scores, noise, self.budget)

        tokens, visible_idx, target_idx, patches, slot_idx = self.encoder(
            clips, select, self.selector.reads_importance, self._frame_selection(noise)
        )
        prediction = self.decoder(self.encoder_to_decoder(tokens), self.mask_token, visible_idx, target_idx)
        with torch.no_grad():
            targets = build_targets(patches, target_idx)
        loss = _mean_squared_error(prediction, targets)
        return Reconstruction(loss, prediction, visible_idx, target_idx, slot_idx)

    def patches(self, clips: Tensor, slot_idx: Tensor | None = None) -> Tensor:
        """Cut clips into the (B, N, 3, P) uint8 patches that are trained on, given :attr:`Reconstruction.slot_idx`."""
        patches = patchify(clips, *self.encoder.cut)
        return patches if slot_idx is None else take_slots(patches, slot_idx, self.budget.candidate_slots)

    def targets(self, clips: Tensor, target_idx: Tensor, slot_idx: Tensor | None = None) -> Tensor:
        """What :attr:`Reconstruction.prediction` is compared with, (B, R, P * 3) fp32."""
        return build_targets(self.patches(clips, slot_idx), target_idx)

    def _frame_selection(self, noise: Tensor) -> SelectFrames | None:
        if not self.budget.selects_frames:
            return None
        slot_noise = noise[:, self.selector.noise_length(self.budget) :]
        return partial(select_frames, noise=slot_noise, budget=self.budget)

    def _check(self, clips: Tensor, noise: Tensor | None) -> None:
        side, frames = self.config.image_size, self.config.candidate_frames
        if clips.ndim != 5 or clips.shape[1:] != (CHANNELS, frames, side, side) or clips.dtype != torch.uint8:
            raise UserError(
                f"clips: expected uint8 (B, {CHANNELS}, {frames}, {side}, {side}), got {clips.dtype} "
                f"{tuple(clips.shape)}"
            )
        if noise is not None and (noise.ndim != 2 or len(noise) != len(clips) or noise.shape[1] < self.noise_length):
            raise UserError(f"noise: expected ({len(clips)}, >= {self.noise_length}), got {tuple(noise.shape)}")


def _mean_squared_error(prediction: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error in fp32; ``targets``, fp32, are lost.

    It keeps one prediction-sized tensor until the backward pass, and then nothing. ``F.mse_loss`` keeps two, takes two
    more inside, and its scalar sits in a storage as large as the prediction for as long as somebody has the loss.
    """
    error = targets.sub_(prediction)
    return (error * error).sum() / error.numel()
