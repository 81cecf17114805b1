from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import RandomResizedCrop

from everest_ds.config.schema import DataConfig
from everest_ds.data.transforms import (
    RANDOM_CROPS,
    Crop,
    crop_places,
    crop_shapes,
    cut,
    draw_crop,
    draw_resized_crop,
    draw_seed,
    square_crops,
    torch_seeded,
)

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
    for kind, draw in RANDOM_CROPS.items():
        with_flip, without = (
            [draw(DataConfig(flip=flip), 224)(256, 340, rng=np.random.default_rng(s)) for s in range(50)]
            for flip in (True, False)
        )
        assert any(crop.flip for crop in with_flip), kind
        assert [crop._replace(flip=False) for crop in with_flip] == without


class TestResizedCrop:
    def draw(self, height: int, width: int, count: int, area: tuple[float, float] = (0.08, 1.0)) -> list[Crop]:
        rng = np.random.default_rng(0)
        return [draw_resized_crop(height, width, area=area, flip=True, rng=rng) for _ in range(count)]

    @pytest.mark.parametrize(("height", "width"), [(256, 340), (48, 64), (64, 48), (7, 500), (1, 1)])
    def test_it_is_torchvisions(self, height: int, width: int) -> None:
        rule = RandomResizedCrop(224, scale=(0.2, 0.9))
        for seed in range(50):
            torch.manual_seed(draw_seed(np.random.default_rng(seed)))
            expected = rule.make_params([torch.zeros(3, height, width)])
            crop = draw_resized_crop(height, width, area=(0.2, 0.9), flip=True, rng=np.random.default_rng(seed))
            assert crop._replace(flip=False) == Crop(**expected)

    def test_areas_aspects_and_flips(self) -> None:
        # Areas up to 0.7 fit with any aspect, so that none is drawn again.
        crops = self.draw(1000, 1000, 3000, area=(0.1, 0.7))
        areas = np.array([crop.height * crop.width for crop in crops]) / 1e6
        aspects = np.log([crop.width / crop.height for crop in crops])
        for values, low, high in ((areas, 0.1, 0.7), (aspects, -math.log(4 / 3), math.log(4 / 3))):
            counts, _ = np.histogram(values, bins=6, range=(low - 0.01, high + 0.01))
            assert counts.sum() == 3000
            assert counts.max() < 1.3 * counts.min()
        assert 0.46 < np.mean([crop.flip for crop in crops]) < 0.54

    @pytest.mark.parametrize(("height", "width"), [(256, 340), (3, 2), (1, 1), (20, 500)])
    def test_crops_lie_in_the_frame(self, height: int, width: int) -> None:
        for crop in self.draw(height, width, 300):
            assert crop.height >= 1
            assert crop.width >= 1
            assert 0 <= crop.top <= height - crop.height
            assert 0 <= crop.left <= width - crop.width

    def test_where_nothing_fits_the_centre_is_taken(self) -> None:
        assert {crop._replace(flip=False) for crop in self.draw(30, 400, 20, area=(1.0, 1.0))} == {Crop(0, 180, 30, 40)}

    def test_the_global_generators_are_left_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        reseeded: list[int] = []
        monkeypatch.setattr(torch.cuda, "manual_seed_all", reseeded.append)
        torch.manual_seed(0)
        assert len(reseeded) == 1
        before = torch.get_rng_state()
        self.draw(256, 340, 3)
        with pytest.raises(RuntimeError, match="mine"), torch_seeded(1):
            raise RuntimeError("mine")
        assert torch.equal(torch.get_rng_state(), before)
        assert len(reseeded) == 1


def test_the_configuration_names_the_crop() -> None:
    def draw(**settings: Any) -> Crop:
        data = DataConfig(**settings)
        return RANDOM_CROPS[data.crop](data, 224)(256, 340, rng=np.random.default_rng(3))

    rng = np.random.default_rng(3)
    assert draw(crop_scales=(0.5,)) == draw_crop(256, 340, 224, scales=(0.5,), flip=True, rng=rng)
    rng = np.random.default_rng(3)
    expected = draw_resized_crop(256, 340, area=(0.5, 0.6), flip=False, rng=rng)
    assert draw(crop="resized", crop_area=(0.5, 0.6), flip=False) == expected


def test_square_crops() -> None:
    assert square_crops(100, 181, 1) == [Crop(0, 40, 100, 100)]
    assert square_crops(181, 100, 1) == [Crop(40, 0, 100, 100)]
    assert square_crops(100, 181, 3) == [Crop(0, left, 100, 100) for left in (0, 40, 81)]
    assert square_crops(181, 100, 3) == [Crop(top, 0, 100, 100) for top in (0, 40, 81)]
    assert square_crops(256, 340, 5) == [Crop(0, left, 256, 256) for left in (0, 21, 42, 63, 84)]
    assert square_crops(60, 60, 2) == [Crop(0, 0, 60, 60)] * 2


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
