"""The stated baseline of ``tools/benchmark.py data``: a clip read as the official research code reads it.

decord gives the frames; each becomes a PIL image, is cropped and resized by MultiScaleCrop, and all of them are
stacked, made float32 and normalised on the CPU. The frames and the crop are drawn by our own rules, so that both do
the same.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from everest_ds.config.schema import DataConfig
from everest_ds.data.sampling import SAMPLINGS
from everest_ds.data.transforms import draw_crop


def read_clip(path: str, data: DataConfig, *, frames: int, image_size: int, rng: np.random.Generator) -> Tensor:
    """Return a normalised clip (3, T, S, S), float32, of one opened file."""
    import decord  # noqa: PLC0415 - only where it is used, as in everest_ds.data.decode

    reader = decord.VideoReader(path, num_threads=1)
    ids = SAMPLINGS[data.sampling](data, frames).draw(len(reader), rng)
    pixels = reader.get_batch(ids.tolist()).asnumpy()
    height, width = pixels.shape[1:3]
    crop = draw_crop(height, width, image_size, scales=data.crop_scales, flip=data.flip, rng=rng)
    box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
    images = [
        Image.fromarray(frame).crop(box).resize((image_size, image_size), Image.Resampling.BILINEAR) for frame in pixels
    ]
    if crop.flip:
        images = [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in images]
    stacked = torch.from_numpy(np.concatenate([np.asarray(image) for image in images], axis=2))
    floats = stacked.permute(2, 0, 1).contiguous().float().div(255)
    mean, deviation = (torch.tensor(v * frames)[:, None, None] for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    floats.sub_(mean).div_(deviation)
    return floats.unflatten(0, (frames, 3)).transpose(0, 1)
