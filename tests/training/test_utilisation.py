"""What a run says of its MFU at its start, on devices of every kind."""

import pytest

from everest_ds.config.load import load_recipe
from everest_ds.training import ranks
from everest_ds.training.utilisation import utilisation

BF16 = {"bf16": {"enabled": True}}
NO_SHEET = "NVIDIA B200"


@pytest.fixture
def card(monkeypatch):
    """A function that puts a card of this name into the machine of a run of eight ranks."""

    def put(name: str) -> None:
        monkeypatch.setattr(ranks, "device_name", lambda: name)
        monkeypatch.setattr(ranks, "on_cpu", lambda: False)
        monkeypatch.setenv("WORLD_SIZE", "8")

    return put


def test_a_known_card_is_held_against_its_data_sheet(card):
    card("NVIDIA H100 80GB HBM3")
    rate, said = utilisation(load_recipe(None, ["model.size=vit_base"]), BF16)
    assert rate(8000) == pytest.approx(0.1201, rel=0.006)
    assert said == [
        "MFU: 118.7 GFLOP per clip (backward pass counted, recomputation not), of 989.5 TFLOP/s per device "
        "(H100's data sheet, bf16)"
    ]


def test_another_card_is_held_against_what_the_user_says(card):
    card(NO_SHEET)
    none, said = utilisation(load_recipe(None), BF16)
    assert none is None
    assert said == ["no MFU: the peak of NVIDIA B200 in bf16 is not known here; say it: train.peak_flops=FLOP/s"]
    rate, said = utilisation(load_recipe(None, ["model.size=vit_base", "train.peak_flops=2.25e15"]), BF16)
    assert rate(8000) == pytest.approx(0.1201 * 989.5 / 2250, rel=0.006)
    assert "2250 TFLOP/s per device (train.peak_flops)" in said[0]


def test_a_cpu_has_no_peak_and_nothing_is_said_of_it():
    assert utilisation(load_recipe(None), {}) == (None, [])
