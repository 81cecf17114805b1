"""How many cores feed GPUs: arithmetic on a rate that was measured."""

import math

import pytest

from everest_ds.config.errors import UserError
from everest_ds.config.load import load_recipe
from everest_ds.data.dataset import ReadingTime
from everest_ds.data.rate import ReadingRate
from everest_ds.memory.feed import feed, parse_gpus
from everest_ds.memory.gpus import GPUS

RATE = ReadingRate(clips_per_s=20.0, seconds=ReadingTime(decode=0.04, transform=0.01), videos=7)


def test_vit_base_asks_for_what_its_flops_say():
    # ViT-B EVEREST: 19.81 G multiply-accumulates forward (paper, Table 10), six operations each in training.
    fed = feed(load_recipe(None, ["model.size=vit_base"]), RATE, gpus=8, gpu=GPUS["A100-80"], utilisation=0.4)
    assert fed.step_flops_per_clip == pytest.approx(6 * 19.81e9, rel=0.006)
    assert fed.wanted_clips_per_s == pytest.approx(8 * 0.4 * 312e12 / fed.step_flops_per_clip)
    assert fed.cores == math.ceil(fed.wanted_clips_per_s / 20)
    assert f"{fed.cores} such cores" in str(fed)
    assert "40.0 ms decoding" in str(fed)


def test_videomae_needs_fewer_cores_since_it_is_slower():
    ours, theirs = (
        feed(load_recipe(None, [f"model.method={method}"]), RATE, gpus=1, gpu=GPUS["H100"], utilisation=0.5)
        for method in ("everest", "videomae")
    )
    assert theirs.cores < 0.7 * ours.cores


@pytest.mark.parametrize(
    ("text", "count", "name"), [("8xA100-80", 8, "A100-80"), ("H100", 1, "H100"), (" 2 * H200 ", 2, "H200")]
)
def test_gpus_are_a_number_and_a_name(text, count, name):
    assert parse_gpus(text) == (count, GPUS[name])


@pytest.mark.parametrize("text", ["", "8x", "0xH100", "80GB", "8xABC"])
def test_anything_else_is_refused(text):
    with pytest.raises(UserError, match="--gpus: expected a number and a GPU"):
        parse_gpus(text)


@pytest.mark.parametrize("share", [0.0, -1.0, 1.1, math.nan])
def test_a_utilisation_is_a_share(share):
    with pytest.raises(UserError, match="--utilisation"):
        feed(load_recipe(None, []), RATE, gpus=1, gpu=GPUS["H100"], utilisation=share)
