"""RandAugment and random erasing of whole clips: what fine-tuning does to the pixels besides crop and flip."""

from __future__ import annotations

import numpy as np
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import RandAugment, RandomErasing
from torchvision.transforms.v2 import functional as F

from everest_ds.config.finetuning import AugmentConfig
from everest_ds.data.transforms import draw_seed, torch_seeded

LARGEST_STRENGTH = 10.0
# torchvision counts strength in bins: tenths here.
_BINS = 101
_GREY = 128
_GREY_LEVELS = 255
# VideoMAE's. Shares of the frame, and height by width.
_ERASED_AREA = (0.02, 1 / 3)
_ERASED_ASPECT = (0.3, 1 / 0.3)


class ClipAugment:
    """RandAugment, then random erasing, of a clip; a function of the clip and of the generator that it is given.

    All frames go through the same operations with the same strength, and lose the same rectangle. Noise fills it, other
    for every pixel and frame, normal with ImageNet's mean and deviation (VideoMAE's mode "pixel").

    The operations are torchvision's. Those of timm, on which the official code builds, differ in three things: a
    harsher Posterize, Invert and SolarizeAdd in the place of Identity, and half of all operations left out at random.
    As in timm, each operation draws its strength, normal around ``rand_augment_magnitude`` and clipped to 0 ... 10.

    Args:
        config: rand_augment_ops, rand_augment_magnitude, rand_augment_std, erasing. With 0 operations and erasing 0
            clips are returned as they are, at no cost.
    """

    def __init__(self, config: AugmentConfig) -> None:
        self._config = config
        # Its rectangles alone are used: its noise is for normalised pixels, and the same in all frames.
        self._eraser = RandomErasing(scale=_ERASED_AREA, ratio=_ERASED_ASPECT)

    def __call__(self, clip: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        """Return the clip augmented: uint8 (3, T, S, S), contiguous, as it came. The argument isn't written to."""
        # A seed each: switching one off changes nothing in the other.
        first, second = draw_seed(rng), draw_seed(rng)
        if self._config.rand_augment_ops:
            with torch_seeded(first):
                clip = self._rand_augment(clip)
        if self._config.erasing:
            with torch_seeded(second):
                clip = self._erase(clip)
        return clip

    def _rand_augment(self, clip: torch.Tensor) -> torch.Tensor:
        # Frames as a batch of images: one draw for all of them.
        frames = clip.transpose(0, 1)
        for _ in range(self._config.rand_augment_ops):
            operation = RandAugment(
                num_ops=1,
                magnitude=self._draw_bin(),
                num_magnitude_bins=_BINS,
                interpolation=InterpolationMode.BILINEAR,
                fill=_GREY,
            )
            frames = operation(frames)
        return frames.transpose(0, 1).contiguous()

    def _draw_bin(self) -> int:
        strength = self._config.rand_augment_magnitude + self._config.rand_augment_std * float(torch.randn(()))
        return round((_BINS - 1) * min(max(strength / LARGEST_STRENGTH, 0), 1))

    def _erase(self, clip: torch.Tensor) -> torch.Tensor:
        if torch.rand(()) >= self._config.erasing:
            return clip
        box = self._eraser.make_params([clip])
        # None of its tries fitted.
        if box["v"] is None:
            return clip
        noise = torch.randn(*clip.shape[:2], box["h"], box["w"])
        mean, deviation = torch.tensor([IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD])[..., None, None, None]
        pixels = noise.mul_(deviation).add_(mean).mul_(_GREY_LEVELS).round_().clamp_(0, _GREY_LEVELS)
        return F.erase(clip, **box | {"v": pixels.to(torch.uint8)})
