from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from everest_ds.data.transforms import Crop, centre_crop, crop_places, crop_shapes, cut, draw_crop

SCALES = (1.0, 0.875, 0.75, 0.66)


def test_shapes_of_the_official_setting() -> None:
    # 256 x 340 -> sides 256, 224, 192, 168; neighbours in this list may mix.
    assert crop_shapes(256, 340, 224, SCALES) == [
        *((256, 256), (256, 224)),
        *((224, 256), (224, 224), (224, 192)),
        *((192, 224), (192, 192), (192, 168)),
        *((168, 192), (168, 168)),
    ]


@pytest.mark.parametrize(("out", "side"), [(97, 100), (98, 98), (99, 99), (100, 100), (101, 100), (102, 100)])
def test_sides_near_the_output_snap_to_it_inside_of_the_frame(out: int, side: int) -> None:
    assert crop_shapes(100, 180, out, (1.0,)) == [(side, side)]


def test_a_side_below_the_output_snaps_up_where_there_is_room() -> None:
    assert crop_shapes(120, 180, 62, (0.5,)) == [(62, 62)]
    assert crop_shapes(120, 180, 63, (0.5,)) == [(60, 60)]


def test_the_thirteen_places() -> None:
    places = crop_places(100, 180, (60, 60))  # steps of 10 down, 30 across
    assert places == [
        *((0, 0), (0, 120), (40, 0), (40, 120), (20, 60)),
        *((20, 0), (20, 120), (40, 60), (0, 60)),
        *((10, 30), (10, 90), (30, 30), (30, 90)),
    ]
    assert set(crop_places(100, 180, (100, 100))) == {(0, 0), (0, 20), (0, 40), (0, 60), (0, 80)}


@pytest.mark.parametrize(("height", "width"), [(256, 340), (48, 64), (64, 48), (3, 2), (1, 1), (223, 500)])
def test_crops_lie_in_the_frame(height: int, width: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        crop = draw_crop(height, width, 224, scales=SCALES, flip=True, rng=rng)
        assert crop.height >= 1
        assert crop.width >= 1
        assert 0 <= crop.top <= height - crop.height
        assert 0 <= crop.left <= width - crop.width


def test_shapes_places_and_flips_are_uniform() -> None:
    rng = np.random.default_rng(0)
    crops = [draw_crop(256, 340, 224, scales=SCALES, flip=True, rng=rng) for _ in range(6500)]
    shapes = Counter((c.height, c.width) for c in crops)
    assert set(shapes) == set(crop_shapes(256, 340, 224, SCALES))
    assert max(shapes.values()) < 1.2 * min(shapes.values())
    places = Counter((c.top, c.left) for c in crops if (c.height, c.width) == (168, 168))
    assert set(places) == set(crop_places(256, 340, (168, 168)))
    assert 0.47 < sum(c.flip for c in crops) / len(crops) < 0.53


def test_switching_flip_off_changes_nothing_else() -> None:
    with_flip, without = (
        [draw_crop(256, 340, 224, scales=SCALES, flip=flip, rng=np.random.default_rng(s)) for s in range(50)]
        for flip in (True, False)
    )
    assert any(crop.flip for crop in with_flip)
    assert [crop._replace(flip=False) for crop in with_flip] == without


def test_centre_crop() -> None:
    assert centre_crop(100, 181) == Crop(0, 40, 100, 100)
    assert centre_crop(181, 100) == Crop(40, 0, 100, 100)


def test_a_crop_of_the_outputs_size_is_copied_exactly() -> None:
    frames = np.random.default_rng(0).integers(0, 256, size=(4, 40, 60, 3), dtype=np.uint8)
    expected = torch.from_numpy(frames[:, 5:37, 9:41]).permute(3, 0, 1, 2)
    clip = cut(frames, Crop(5, 9, 32, 32), 32)
    assert clip.dtype == torch.uint8
    assert clip.shape == (3, 4, 32, 32)
    assert clip.is_contiguous()
    assert torch.equal(clip, expected)
    assert torch.equal(cut(frames, Crop(5, 9, 32, 32, flip=True), 32), expected.flip(-1))


@pytest.mark.parametrize("count", [1, 4])
def test_the_clip_does_not_hold_on_to_the_decoded_video(count: int) -> None:
    frames = np.zeros((count, 40, 60, 3), dtype=np.uint8)
    clip = cut(frames, Crop(5, 9, 32, 32), 32)
    frames[:] = 255
    assert clip.max() == 0
    assert clip.untyped_storage().nbytes() == clip.numel()


def test_resizing_is_bilinear_with_antialias() -> None:
    frames = np.random.default_rng(0).integers(0, 256, size=(2, 64, 96, 3), dtype=np.uint8)
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)[:, :, 0:64, 16:80].float()
    kernel = {"mode": "bilinear", "antialias": True, "align_corners": False}
    for out in (24, 64, 100):
        expected = torch.nn.functional.interpolate(pixels, size=(out, out), **kernel).transpose(0, 1)
        clip = cut(frames, Crop(0, 16, 64, 64), out)
        assert clip.shape == (3, 2, out, out)
        assert (clip.float() - expected).abs().max() < 1.01
