"""The stated baseline of ``tools/benchmark.py step``: the same step, written as the official research code writes it.

What it does that ours doesn't, after reading the official EVEREST and VideoMAE implementations: a Conv3d embedding of
all tokens with gradient, importance from those embeddings, boolean masks (which cost a host synchronisation on a GPU),
attention that materialises its matrix, targets of all tokens of which a share is then used, and positions copied anew
at every step. It takes the very weights of one of our models and, in fp32, gives its loss
(``tests/benchmarks/test_step.py``): only the way differs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from everest_ds.models import MaskedAutoencoder
from everest_ds.models.importance import lengths
from everest_ds.models.patches import CHANNELS, GREY_LEVELS, patchify

_TARGET_EPS = 1e-6


def _per_channel(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device, dtype=like.dtype)[:, None, None, None]


def normalised(clips: Tensor, dtype: torch.dtype) -> Tensor:
    """What the official loaders hand over: (B, 3, T, H, W) standardised floats, from uint8 clips."""
    pixels = clips.float().div_(GREY_LEVELS)
    mean, deviation = (_per_channel(v, pixels) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return pixels.sub_(mean).div_(deviation).to(dtype)


def distances(tokens: Tensor, slots: int) -> Tensor:
    """Importance as the official code takes it: (B, N, D) embeddings, subtracted, to (B, N)."""
    by_slot = tokens.unflatten(1, (slots, -1))
    moved = lengths(by_slot[:, 1:] - by_slot[:, :-1])
    return torch.cat([moved[:, :1], moved], dim=1).flatten(1)


class ReferenceStep(nn.Module):
    """A model's pre-training pass in the style of the research code.

    Args:
        model: whose weights it uses, built with ``attention="eager"``; without frame selection.
    """

    def __init__(self, model: MaskedAutoencoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, clips: Tensor, noise: Tensor) -> Tensor:
        """Return the loss of normalised clips (B, 3, T, H, W), with noise as in :class:`MaskedAutoencoder`."""
        model = self.model
        encoded, visible, target = self._encode(clips, noise)
        seen = model.encoder_to_decoder(encoded)
        positions = model.decoder.positions.table.expand(len(seen), -1, -1).type_as(seen).clone().detach()
        seen = seen + positions[visible].reshape_as(seen)
        hidden = model.mask_token + positions[target].reshape(len(clips), -1, seen.shape[-1])
        decoded = model.decoder.blocks.run(torch.cat([seen, hidden], dim=1))
        prediction = model.decoder.head(model.decoder.norm(decoded[:, -hidden.shape[1] :]))
        targets = self._targets(clips)[target].reshape_as(prediction)
        return F.mse_loss(prediction.float(), targets)

    def _encode(self, clips: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the encoder's output (B, V, D), and the masks: what all tokens took goes with the end of this."""
        encoder = self.model.encoder
        tokens = self._embed(clips)
        visible, target = self._masks(tokens.detach(), noise)
        tokens = tokens + encoder.positions.table.type_as(tokens).clone().detach()
        seen = tokens[visible].reshape(len(clips), -1, tokens.shape[-1])
        return encoder.norm(encoder.blocks.run(seen)), visible, target

    def _embed(self, clips: Tensor) -> Tensor:
        layer, (tubelet, patch) = self.model.encoder.patch_embed, self.model.encoder.cut
        kernel = layer.weight.view(-1, CHANNELS, tubelet, patch, patch)
        embedded = F.conv3d(clips, kernel, layer.bias, stride=(tubelet, patch, patch))
        return embedded.flatten(2).transpose(1, 2)

    def _masks(self, tokens: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Boolean (B, N) masks of the visible and of the target tokens."""
        selector, budget = self.model.selector, self.model.budget
        scores = distances(tokens, budget.slots) if selector.reads_importance else None
        chosen = selector.choose(scores, noise, budget)
        empty = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        visible, target = (empty.scatter(1, index, True) for index in chosen)
        return visible, target

    @torch.no_grad()
    def _targets(self, clips: Tensor) -> Tensor:
        mean, deviation = (_per_channel(v, clips) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
        pixels = patchify(clips * deviation + mean, *self.model.encoder.cut).transpose(-2, -1)
        spread = pixels.var(dim=-2, unbiased=True, keepdim=True).sqrt() + _TARGET_EPS
        return ((pixels - pixels.mean(dim=-2, keepdim=True)) / spread).flatten(-2).float()
