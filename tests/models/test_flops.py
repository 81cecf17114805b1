"""Forward multiply-accumulates, counted on the real models, against every published figure."""

import dataclasses
import functools

import pytest
from golden_fixtures import facts

from everest_ds.config.finetuning import ClassifierConfig
from everest_ds.config.schema import FrameSelectionConfig, ModelConfig
from everest_ds.models import MaskedAutoencoder, VideoClassifier
from everest_ds.models.flops import done_macs, forward_backward_macs, forward_macs
from everest_ds.tokens import TokenBudget

SIZE = {"S": "vit_small", "B": "vit_base", "L": "vit_large"}
KINETICS_CLASSES = 400

# Giga multiply-accumulates of one clip's forward pass: (size, model settings, published).
PRETRAIN = [
    *((size, {"method": "videomae"}, gmacs) for size, gmacs in (("S", 11.6), ("B", 35.5), ("L", 83.1))),  # Table 1
    *((size, {"keep_ratio": 0.4}, gmacs) for size, gmacs in (("S", 6.3), ("B", 21.5), ("L", 60.8))),  # Table 1
    *(("B", {"keep_ratio": r}, g) for r, g in ((0.5, 23.43), (0.4, 21.54), (0.3, 19.81), (0.2, 18.22))),  # Table 10
    ("B", {"method": "videomae", "visible_ratio": 0.25}, 57.50),  # Table 10
    ("B", {"method": "videomae"}, 35.48),  # Table 10
    ("B", {"frames": 24}, 30.65),  # Table 12
]
FINETUNE = [
    *(("S", {"keep_ratio": r}, g) for r, g in ((1.0, 57.0), (0.6, 29.1))),
    *(("L", {"keep_ratio": r}, g) for r, g in ((1.0, 597.2), (0.6, 330.0))),
    *(("B", {"keep_ratio": r}, g) for r, g in ((1.0, 180.5), (0.8, 137.5), (0.7, 117.3), (0.6, 98.1), (0.5, 79.8))),
    ("B", {"keep_ratio": 0.6, "frames": 24}, 159.4),  # Table 12
]


@functools.cache
def count_gmacs(build, config: ModelConfig) -> float:
    return forward_macs(build, config) / 1e9


@pytest.mark.parametrize(("size", "settings", "published"), PRETRAIN)
def test_pretraining_compute_is_as_published(size, settings, published):
    config = ModelConfig(size=SIZE[size], **settings)
    assert count_gmacs(MaskedAutoencoder, config) == pytest.approx(published, rel=0.006)


@pytest.mark.parametrize(("size", "settings", "published"), FINETUNE)
def test_finetuning_compute_is_as_published(size, settings, published):
    config = ClassifierConfig(size=SIZE[size], classes=KINETICS_CLASSES, **settings)
    assert count_gmacs(VideoClassifier, config) == pytest.approx(published, rel=0.006)


@pytest.mark.parametrize(
    ("key", "size", "settings"),
    [
        (f"pretrain/{letter}/{name}", size, settings)
        for letter, size in (*SIZE.items(), ("H", "vit_huge"))
        for name, settings in (
            ("everest", {}),
            ("videomae_0.9", {"method": "videomae"}),
            ("videomae_0.75", {"method": "videomae", "visible_ratio": 0.25}),
        )
    ],
)
def test_pretraining_compute_is_the_official_models(key, size, settings):
    entry = facts("flops")["entries"][key]
    config = ModelConfig(size=size, **settings)
    assert count_gmacs(MaskedAutoencoder, config) == pytest.approx(entry["macs"] / 1e9, rel=1e-6)


def test_frame_selection_embeds_the_candidates_and_costs_nothing_else():
    off = ModelConfig(size="vit_base", keep_ratio=0.5)
    on = ModelConfig(size="vit_base", keep_ratio=0.5, frame_selection=FrameSelectionConfig(alpha=1.5))
    more_tokens, width, pixels = (12 - 8) * 196, 768, 3 * 2 * 16 * 16
    assert forward_macs(MaskedAutoencoder, on) - forward_macs(MaskedAutoencoder, off) == more_tokens * width * pixels


# In the place of one embedding of each of 1568 tokens: of 7 slots the differences, and the embeddings of the visible
# ones. Frame selection scores 11 of its 12 slots, too.
IN_THE_EMBEDDING = [
    (MaskedAutoencoder, ModelConfig(), 7 * 196 + 156),
    (MaskedAutoencoder, ModelConfig(method="videomae"), 160),
    (MaskedAutoencoder, ModelConfig(frame_selection=FrameSelectionConfig(alpha=1.5)), (11 + 7) * 196 + 156),
    (VideoClassifier, ClassifierConfig(classes=KINETICS_CLASSES, keep_ratio=0.6), 7 * 196 + 940),
    (VideoClassifier, ClassifierConfig(classes=KINETICS_CLASSES, keep_ratio=1.0), 1568),
]


@pytest.mark.parametrize(("build", "config", "tokens"), IN_THE_EMBEDDING)
def test_what_is_done_differs_from_the_published_count_in_the_embedding_alone(build, config, tokens):
    config = dataclasses.replace(config, size="vit_base")
    width, pixels = 768, 3 * 2 * 16 * 16
    saved = (config.candidate_slots * 196 - tokens) * width * pixels
    assert forward_macs(build, config) - done_macs(build, config) == saved


@pytest.mark.parametrize(("size", "published"), [("S", 6.3), ("B", 21.5), ("L", 60.8)])  # Table 1
def test_what_everest_really_does_in_pretraining_is_as_published_too(size, published):
    config = ModelConfig(size=SIZE[size], keep_ratio=0.4)
    assert done_macs(MaskedAutoencoder, config) / 1e9 == pytest.approx(published, rel=0.006)


@pytest.mark.parametrize("method", ["everest", "videomae"])
def test_the_backward_pass_has_two_products_for_each_but_scores_and_pixels(method):
    config = ModelConfig(size="vit_micro", method=method, image_size=64)
    budget, width, pixels = TokenBudget.for_pretraining(config), 96, 3 * config.tubelet * config.patch**2
    scored = (budget.slots - 1) * budget.per_slot if method == "everest" else 0
    without = 2 * scored + budget.visible
    counted = forward_backward_macs(MaskedAutoencoder, config)
    assert counted == 3 * done_macs(MaskedAutoencoder, config) - without * width * pixels


@pytest.mark.parametrize("method", ["everest", "videomae"])
def test_fused_attention_counts_as_eager(method):
    fused, eager = (
        forward_macs(MaskedAutoencoder, ModelConfig(size="vit_micro", method=method, image_size=64, attention=a))
        for a in ("fused", "eager")
    )
    assert fused == eager
