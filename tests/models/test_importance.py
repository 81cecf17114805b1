"""Scores from differences of pixels: those of embeddings that are subtracted, in any precision."""

import pytest
import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from everest_ds.benchmarks.reference_step import distances
from everest_ds.models.importance import importance, scoring_dtype

SLOTS, PLACES, PIXELS, WIDTH = 4, 9, 2 * 8 * 8, 96


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def patches(batch: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (batch, SLOTS * PLACES, 3, PIXELS), dtype=torch.uint8, generator=generator())


def weights(size: float = 0.03) -> torch.Tensor:
    return size * torch.randn(WIDTH, 3 * PIXELS, generator=generator(1))


def exact(of: torch.Tensor, weight: torch.Tensor, bias: float = 0.0) -> torch.Tensor:
    """Embed normalised pixels and subtract, in fp64, as the method is defined."""
    mean, deviation = (
        torch.tensor(values, dtype=torch.float64).unsqueeze(1)
        for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    )
    pixels = ((of.double() / 255 - mean) / deviation).flatten(2)
    return distances(F.linear(pixels, weight.double()) + bias, SLOTS)


# 1e-12 to 1e6: weights that fp16 holds as zero or infinity by themselves.
@pytest.mark.parametrize("size", [0.03, 1e-12, 1e6])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 2e-6), (torch.float16, 3e-4)])
def test_scores_are_distances_of_embeddings(dtype, error, size):
    some, weight = patches(), weights(size)
    scores = importance(some, weight, SLOTS, dtype)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), exact(some, weight, bias=size), rtol=error, atol=0)


def test_the_first_slot_takes_the_scores_of_the_second():
    some = torch.zeros(1, SLOTS, PLACES, 3, PIXELS, dtype=torch.uint8)
    some[0, 1:, 4, 1, 7] = 200  # one place changes, between slots 0 and 1
    scores = importance(some.flatten(1, 2), weights(), SLOTS, torch.float32)
    assert scores.nonzero()[:, 1].tolist() == [4, 4 + PLACES]
    assert scores[0, 4] == scores[0, 4 + PLACES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_largest_change_overflows_nothing(dtype):
    """Black to white wherever a row of weights is positive, white to black elsewhere: nothing changes its sum more."""
    weight = weights()
    rises = (weight[weight.abs().sum(1).argmax()] > 0).unflatten(0, (3, PIXELS))
    some = torch.stack([~rises, rises, ~rises, rises]).repeat_interleave(PLACES, dim=0).to(torch.uint8) * 255
    scores = importance(some.unsqueeze(0), weight, SLOTS, dtype)
    torch.testing.assert_close(scores.double(), exact(some.unsqueeze(0), weight), rtol=3e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_does_not_move_scores_nothing(dtype):
    still = patches()[:, :PLACES].repeat(1, SLOTS, 1, 1)
    assert not importance(still, weights(), SLOTS, dtype).any()
    assert not importance(patches(), torch.zeros(WIDTH, 3 * PIXELS), SLOTS, dtype).any()


def test_tensor_cores_score_where_they_train():
    half, single = torch.float16, torch.float32
    assert [scoring_dtype(of, "cuda") for of in (torch.bfloat16, half, single)] == [half, half, single]
    assert [scoring_dtype(of, "cpu") for of in (torch.bfloat16, half, single)] == [single] * 3


def test_autocast_is_half_precision_too():
    torch.set_autocast_enabled("cuda", True)
    try:
        assert scoring_dtype(torch.float32, "cuda") == torch.float16
        assert scoring_dtype(torch.float32, "cpu") == torch.float32
    finally:
        torch.set_autocast_enabled("cuda", False)
