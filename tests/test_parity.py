"""Numerical parity with the official implementations.

Fixtures come from tests/golden or from the folder named by PARITY_DIR; all sizes are read from their json files. The
comparison itself is the one that ``tools/gpu_check.py`` makes on a GPU.
"""

import numpy as np
import pytest
import torch
from golden_fixtures import facts, tensors

from everest_ds.gpu_check import golden
from everest_ds.gpu_check.parity import BOUNDS
from everest_ds.models.patches import normalise, patchify
from everest_ds.models.positions import sine_cosine

TOLERANCE = 1e-5


@pytest.fixture(params=["eager", "fused"])
def way(request: pytest.FixtureRequest) -> dict:
    return {"device": "cpu", "dtype": torch.float32, "attention": request.param}


def test_input_normalisation():
    recorded, f = tensors("everest_pretrain"), facts("everest_pretrain")
    patches = patchify(recorded["video_u8"], f["tubelet_size"], f["patch_size"])
    ours = normalise(patches, torch.float32).unflatten(-1, (3, f["tubelet_size"], f["patch_size"], f["patch_size"]))
    assert golden.error(ours[:, 0, :, :2, :4, :4], recorded["video_corner"]) < TOLERANCE


@pytest.mark.parametrize("name", ["everest_pretrain", "videomae_pretrain"])
def test_pretraining(name, way):
    found = golden.autoencoder(name, **way)
    own = {"importance", "encoder positions", "decoder positions"} if name == "everest_pretrain" else set()
    assert set(found.errors) == {"loss", "output", "labels", "gradients"} | own
    assert found.same_indices == 1
    assert found.worst < TOLERANCE, found.errors
    assert found.errors["loss"] < TOLERANCE / 2  # golden.error counts a scalar's size twice


def test_classifier(way):
    found = golden.classifier(**way)
    assert set(found.errors) == {"logits", "logits_no_dropping", "loss", "gradients"}
    assert found.same_indices == 1
    assert found.worst < TOLERANCE, found.errors


@pytest.mark.parametrize("name", ["everest_pretrain", "videomae_pretrain"])
def test_half_precision_is_as_near_as_is_said(name):
    """And not nearer than that by a factor of ten: a bound that is never reached says nothing."""
    worst = golden.autoencoder(name, device="cpu", dtype=torch.bfloat16, attention="eager").worst
    assert BOUNDS["bf16"] / 10 < worst < BOUNDS["bf16"]


def test_what_is_off_shows():
    """One number of a tensor, by twice the tolerance."""
    recorded = tensors("everest_pretrain")["output"]
    changed = recorded.clone()
    changed.view(-1)[5] += 4 * TOLERANCE * recorded.abs().max()
    assert golden.error(recorded, recorded) == 0
    assert golden.error(changed, recorded) > TOLERANCE


def test_position_table_is_even_sine_odd_cosine():
    table = sine_cosine(torch.arange(3), 4)
    np.testing.assert_allclose(table[:, 0], np.sin([0, 1, 2]))
    np.testing.assert_allclose(table[:, 1], np.cos([0, 1, 2]))
    np.testing.assert_allclose(table[:, 2], np.sin(np.array([0, 1, 2]) / 100))
