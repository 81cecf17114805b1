import pytest
from hypothesis import given
from hypothesis import strategies as st

from everest_ds.config.errors import UserError
from everest_ds.config.schema import FrameSelectionConfig, ModelConfig
from everest_ds.tokens import TokenBudget, share


@pytest.mark.parametrize(
    ("settings", "visible", "reconstructed", "dropped"),
    [
        ({}, 156, 314, 1098),
        ({"method": "videomae"}, 160, 1408, 0),
        ({"method": "videomae", "visible_ratio": 0.25}, 392, 1176, 0),
        ({"keep_ratio": 0.4}, 156, 471, 941),
        ({"selector": "random"}, 156, 1412, 0),
        ({"size": "vit_giant", "image_size": 224}, 204, 410, 1434),  # patch 14: 16 x 16 places
        ({"frames": 32, "tubelet": 4, "image_size": 96, "patch": 8}, 115, 230, 807),
    ],
)
def test_counts_of_a_pretraining_step(settings, visible, reconstructed, dropped):
    budget = TokenBudget.for_pretraining(ModelConfig(**settings))
    assert (budget.visible, budget.reconstructed, budget.dropped) == (visible, reconstructed, dropped)
    assert budget.total == visible + reconstructed + dropped


def test_frame_selection_counts_candidates():
    off = TokenBudget.for_pretraining(ModelConfig(keep_ratio=0.5))
    assert (off.candidate_slots, off.candidate_kept, off.selects_frames) == (8, 784, False)
    assert (off.slot_noise, off.clip_noise) == (0, 1568)
    alpha = FrameSelectionConfig(alpha=1.5)
    on = TokenBudget.for_pretraining(ModelConfig(keep_ratio=0.5, frame_selection=alpha))
    assert (on.candidate_slots, on.candidate_kept, on.selects_frames) == (12, 1176, True)
    assert (on.slot_noise, on.clip_noise) == (12, 1580)
    assert (on.slots, on.visible, on.reconstructed) == (off.slots, off.visible, off.reconstructed)
    assert TokenBudget(slots=3, rows=1, columns=4, visible=2, reconstructed=2).candidate_kept == 4
    assert TokenBudget.for_pretraining(ModelConfig(method="videomae")).candidate_kept == 1568


def test_counts_of_a_classifier():
    assert TokenBudget.for_classification(ModelConfig(keep_ratio=0.6)).visible == 940
    assert TokenBudget.for_classification(ModelConfig(keep_ratio=1.0)).visible == 1568


@pytest.mark.parametrize("tenth", [0.1, 1 - 0.9, 0.3 - 0.2])
def test_float_rounding_never_costs_a_token(tenth):
    assert share(tenth, 160) == 16


@given(st.integers(1, 100), st.integers(1, 100), st.integers(1, 5000))
def test_share_is_the_exact_floor(numerator, denominator, count):
    ratio = min(numerator, denominator) / max(numerator, denominator)
    assert share(ratio, count) == count * min(numerator, denominator) // max(numerator, denominator)


def test_ratios_that_leave_nothing_are_refused():
    with pytest.raises(UserError, match="each needs at least one"):
        TokenBudget.for_pretraining(ModelConfig(image_size=32, frames=4, visible_ratio=0.1))
