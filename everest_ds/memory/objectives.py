"""From a batch to its loss, in tensors that may be fake: what training/objectives.py allocates on the way.

That module itself can't be traced: MixUp and CutMix draw numbers that the host reads, and fake tensors hold none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from everest_ds.config.finetuning import AugmentConfig
from everest_ds.data.loader import Batch
from everest_ds.models import MaskedAutoencoder, VideoClassifier
from everest_ds.models.patches import CHANNELS

# What of data/mixing.py takes most in a run.
Mixing = Literal["none", "cutmix", "mixup"]
ToDevice = Callable[[Tensor], Tensor]

_SMOOTHING = 0.1  # any but 0: how much doesn't matter to memory


def heaviest_mixing(augment: AugmentConfig) -> Mixing:
    """Return the kind of mixing that needs most memory among those that an augmentation chooses from."""
    if not augment.mix_probability or not (augment.mixup or augment.cutmix):
        return "none"
    takes_mixup = augment.mixup and (not augment.cutmix or augment.cutmix_share < 1)
    return "mixup" if takes_mixup else "cutmix"


def random_batch(
    model: MaskedAutoencoder | VideoClassifier, clips: int, generator: torch.Generator | None = None
) -> Batch:
    """Return a batch of random bytes in the shapes and types that the loader gives to this model's training."""
    config = model.config
    shape = (clips, CHANNELS, config.candidate_frames, config.image_size, config.image_size)
    noise = 0 if isinstance(model, VideoClassifier) else model.budget.clip_noise
    return Batch(
        clips=torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
        noise=torch.rand(clips, noise, generator=generator),
        labels=torch.zeros(clips, dtype=torch.int64),
        index=torch.zeros(clips, dtype=torch.int64),
        bad=[],
        lost=0,
    )


def loss_of(model: MaskedAutoencoder | VideoClassifier, batch: Batch, *, to_device: ToDevice, mixing: Mixing) -> Tensor:
    """Return the loss of a batch: of reconstruction, or of classification."""
    if isinstance(model, MaskedAutoencoder):
        return model(to_device(batch.clips), to_device(batch.noise)).loss
    clips, labels = to_device(batch.clips), to_device(batch.labels)
    clips = MIXINGS[mixing](clips)
    targets = torch.zeros(len(labels), model.head.out_features)
    return F.cross_entropy(model(clips).float(), targets, label_smoothing=_SMOOTHING)


def _mixup(clips: Tensor) -> Tensor:
    pixels = clips.float()
    return pixels.roll(1, 0).mul_(0.5).add_(pixels.mul(0.5)).round_().to(torch.uint8)


def _cutmix(clips: Tensor) -> Tensor:
    neighbours, mixed = clips.roll(1, 0), clips.clone()
    mixed[..., :1, :1] = neighbours[..., :1, :1]
    return mixed


MIXINGS: dict[Mixing, Callable[[Tensor], Tensor]] = {
    "none": lambda clips: clips,
    "cutmix": _cutmix,
    "mixup": _mixup,
}
