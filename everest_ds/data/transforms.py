"""MultiScaleCrop and flip: one crop per clip, drawn as plain numbers, then cut from uint8 frames.

Frames stay uint8 until they are on the device; normalisation happens there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

# Sides whose places in the list of scales differ by at most this make a crop: keeps it near to square.
MAX_DISTORT = 1
# A side closer to the output than this becomes the output: no resize for a pixel or two.
_SNAP = 3
# Quarters of the free room, (rows, columns): corners, centre, middles of the edges, and centres of the quadrants.
_PLACES = (
    *((0, 0), (0, 4), (4, 0), (4, 4), (2, 2)),
    *((2, 0), (2, 4), (4, 2), (0, 2)),
    *((1, 1), (1, 3), (3, 1), (3, 3)),
)


class Crop(NamedTuple):
    """A rectangle of a frame, in pixels, and whether it is mirrored."""

    top: int
    left: int
    height: int
    width: int
    flip: bool = False


def crop_shapes(height: int, width: int, out: int, scales: Sequence[float]) -> list[tuple[int, int]]:
    """Return every (height, width) that MultiScaleCrop may take from a frame, for an output of ``out`` pixels.

    Sides are shares of the short side. Unlike the official code, a side never snaps beyond the frame, where that one
    pads with black.
    """
    short = min(height, width)
    sides = [max(1, int(short * scale)) for scale in scales]
    sides = [out if abs(side - out) < _SNAP and out <= short else side for side in sides]
    return [(h, w) for i, h in enumerate(sides) for j, w in enumerate(sides) if abs(i - j) <= MAX_DISTORT]


def crop_places(height: int, width: int, shape: tuple[int, int]) -> list[tuple[int, int]]:
    """Return the 13 fixed (top, left) places of a crop of ``shape`` in a frame (some equal when there is no room)."""
    step_y, step_x = (height - shape[0]) // 4, (width - shape[1]) // 4
    return [(rows * step_y, columns * step_x) for rows, columns in _PLACES]


def draw_crop(
    height: int, width: int, out: int, *, scales: Sequence[float], flip: bool, rng: np.random.Generator
) -> Crop:
    """Return a crop drawn uniformly over shapes, then places; mirrored half of the time if ``flip``."""
    shapes = crop_shapes(height, width, out, scales)
    shape = shapes[rng.integers(len(shapes))]
    places = crop_places(height, width, shape)
    place = places[rng.integers(len(places))]
    # Drawn even when unused, so that switching it off changes nothing else.
    mirrored = bool(rng.random() < 0.5)
    return Crop(*place, *shape, flip=flip and mirrored)


def centre_crop(height: int, width: int) -> Crop:
    """Return the largest square in the middle of a frame."""
    side = min(height, width)
    return Crop((height - side) // 2, (width - side) // 2, side, side)


def cut(frames: NDArray[np.uint8], crop: Crop, out: int) -> torch.Tensor:
    """Return the crop of frames (T, H, W, 3) as a clip: contiguous uint8 (3, T, out, out), bilinear, antialiased."""
    # A view, not .contiguous(): channels stay last in memory, for which the uint8 resize is five times as fast.
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)
    box = [crop.top, crop.left, crop.height, crop.width]
    resized = F.resized_crop(pixels, *box, size=[out, out], interpolation=InterpolationMode.BILINEAR, antialias=True)
    if crop.flip:
        resized = resized.flip(-1)
    # .contiguous() may return a view of the whole decoded video where nothing had to be moved: T = 1, say.
    return resized.transpose(0, 1).clone(memory_format=torch.contiguous_format)
