"""Crops and flip: one crop per clip, drawn as plain numbers, then cut from uint8 frames.

Frames stay uint8 until they are on the device; normalisation happens there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from everest_ds.config.schema import DataConfig

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
    """Return a MultiScaleCrop, drawn uniformly over shapes, then places; mirrored half of the time if ``flip``."""
    shapes = crop_shapes(height, width, out, scales)
    shape = shapes[rng.integers(len(shapes))]
    places = crop_places(height, width, shape)
    place = places[rng.integers(len(places))]
    return Crop(*place, *shape, flip=_draw_flip(flip, rng))


def draw_resized_crop(
    height: int, width: int, *, area: tuple[float, float], flip: bool, rng: np.random.Generator
) -> Crop:
    """Return a crop by the rule of torchvision's RandomResizedCrop; mirrored half of the time if ``flip``.

    Its share of the frame is uniform in ``area``, its aspect (width by height) log-uniform in 3/4 ... 4/3; where ten of
    these don't fit, it is the largest in the centre that has a permitted aspect.
    """
    # The rule alone is wanted, not what it does with a size.
    rule = RandomResizedCrop(1, scale=area)
    with torch_seeded(draw_seed(rng)):
        box = rule.make_params([torch.empty(height, width, device="meta")])
    return Crop(**box, flip=_draw_flip(flip, rng))


def _draw_flip(flip: bool, rng: np.random.Generator) -> bool:
    # Drawn even when unused, so that switching it off changes nothing else.
    return bool(rng.random() < 0.5) and flip


class DrawCrop(Protocol):
    """A rule that draws the crop of a clip from the height and width of its frames."""

    def __call__(self, height: int, width: int, *, rng: np.random.Generator) -> Crop:
        """Return a crop, mirrored or not."""


RANDOM_CROPS: dict[str, Callable[[DataConfig, int], DrawCrop]] = {
    "multiscale": lambda data, out: partial(draw_crop, out=out, scales=data.crop_scales, flip=data.flip),
    "resized": lambda data, _: partial(draw_resized_crop, area=data.crop_area, flip=data.flip),
}
"""data.crop -> a function of (the data settings, the clip's pixels) that returns the rule."""


def draw_seed(rng: np.random.Generator) -> int:
    """Return a seed for another generator."""
    return int(rng.integers(2**63))


@contextlib.contextmanager
def torch_seeded(seed: int) -> Iterator[None]:
    """Seed torch's global CPU generator, from which torchvision draws, while this lasts; then put it back."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would seed the accelerators as well, and nothing would put those back.
        torch.default_generator.manual_seed(seed)
        yield


def square_crops(height: int, width: int, count: int) -> list[Crop]:
    """Return ``count`` squares of a frame's short side, evenly from end to end of the long one; alone, the centre."""
    side = min(height, width)
    room_y, room_x = height - side, width - side
    if count == 1:
        return [Crop(room_y // 2, room_x // 2, side, side)]
    return [Crop(room_y * i // (count - 1), room_x * i // (count - 1), side, side) for i in range(count)]


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
