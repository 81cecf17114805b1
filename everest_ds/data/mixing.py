"""MixUp and CutMix of the clips of a pass, on the device that holds them."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms.v2 import CutMix, MixUp
from torchvision.tv_tensors import Video

from everest_ds.config.finetuning import AugmentConfig


class Mixing:
    """Mixes every clip of a pass with the one before it, and their labels in the same proportion.

    MixUp adds weighted pixels, CutMix copies a rectangle of all frames; the weight is drawn once for a pass. Clips stay
    uint8: MixUp rounds, at the cost of three copies of the clips in float32 for a moment.

    All is drawn from torch's global CPU generator, and the host never waits for the device.

    Args:
        config: mixup, cutmix, mix_probability, cutmix_share. Labels are not smoothed here.
        classes: K.
        clips_per_video: views of a video, side by side in a batch. They are dealt out first: a clip mixed with
            another of its own video would hardly be mixed.
    """

    def __init__(self, config: AugmentConfig, classes: int, *, clips_per_video: int = 1) -> None:
        self._classes, self._views = classes, clips_per_video
        kinds = ((MixUp, config.mixup), (CutMix, config.cutmix))
        self._mixes = [kind(alpha=alpha) for kind, alpha in kinds if alpha]
        self._probability, self._cutmix_share = config.mix_probability, config.cutmix_share

    def __call__(self, clips: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return clips and targets, in another order where views were dealt out.

        Args:
            clips: (B, 3, T, H, W) uint8; not written to.
            labels: (B,) int64; -1 gives a target of zeros.

        Returns:
            Clips (B, 3, T, H, W) uint8, the very same where this pass isn't mixed, and targets (B, K) float32.
        """
        # Not one_hot, which refuses -1; the loop ends the run on a sample without a video, but not in this step.
        targets = (labels[:, None] == torch.arange(self._classes, device=labels.device)).float()
        if not self._mixes or torch.rand(()) >= self._probability:
            return clips, targets
        mix = self._chosen()
        pixels = self._dealt(clips)
        if isinstance(mix, MixUp):
            pixels = pixels.float()
        # A video's frames come before its channels, which makes no difference to either mix.
        mixed, targets = mix(Video(pixels), self._dealt(targets))
        mixed = mixed.as_subclass(Tensor)
        return mixed.round_().to(torch.uint8) if mixed.is_floating_point() else mixed, targets

    def _dealt(self, batch: Tensor) -> Tensor:
        """Return the first views of all videos, then the second ones, and so on."""
        return batch.unflatten(0, (-1, self._views)).transpose(0, 1).flatten(0, 1)

    def _chosen(self) -> MixUp | CutMix:
        both = len(self._mixes) > 1
        return self._mixes[int(both and torch.rand(()) < self._cutmix_share)]
