"""What a training pass minimises: the one place where pre-training and fine-tuning differ inside the loop."""

from __future__ import annotations

from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor

from everest_ds.config.finetuning import AugmentConfig, FinetuneRecipe
from everest_ds.config.schema import Recipe
from everest_ds.data.loader import Batch
from everest_ds.data.mixing import Mixing


class Objective(Protocol):
    """Runs the engine forward on a batch, wherever that is, and returns the loss, a scalar on the device."""

    def __call__(self, engine: Any, batch: Batch) -> Tensor:
        """Return the loss, with its graph."""


class Reconstruct:
    """Pre-training: the loss that the autoencoder computes itself."""

    def __call__(self, engine: Any, batch: Batch) -> Tensor:
        """Return the mean squared error of the reconstructed tokens."""
        clips, noise = (t.to(engine.device, non_blocking=True) for t in (batch.clips, batch.noise))
        return engine(clips, noise).loss


class Classify:
    """Fine-tuning: cross entropy, in fp32, with mixed and smoothed labels.

    Args:
        augment: MixUp, CutMix and label smoothing.
        classes: of the model.
        clips_per_video: views of a video in a batch, side by side.
    """

    def __init__(self, augment: AugmentConfig, classes: int, *, clips_per_video: int = 1) -> None:
        self._mix = Mixing(augment, classes, clips_per_video=clips_per_video)
        self._smoothing = augment.label_smoothing

    def __call__(self, engine: Any, batch: Batch) -> Tensor:
        """Return the mean cross entropy of a batch with labels."""
        clips, labels = (t.to(engine.device, non_blocking=True) for t in (batch.clips, batch.labels))
        clips, targets = self._mix(clips, labels)
        return F.cross_entropy(engine(clips).float(), targets, label_smoothing=self._smoothing)


def objective_for(recipe: Recipe) -> Objective:
    """Return what a recipe's training minimises; a classifier's number of classes is known by now."""
    if not isinstance(recipe, FinetuneRecipe):
        return Reconstruct()
    assert recipe.model.classes is not None
    return Classify(recipe.augment, recipe.model.classes, clips_per_video=recipe.data.clips_per_video)
