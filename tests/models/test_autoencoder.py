import pytest
import timm
import torch
import torch.nn.functional as F

import everest_ds
from everest_ds.config.errors import UserError
from everest_ds.config.finetuning import ClassifierConfig
from everest_ds.config.schema import FrameSelectionConfig, ModelConfig
from everest_ds.config.sizes import SIZES
from everest_ds.models import MaskedAutoencoder, VideoClassifier
from everest_ds.models.patches import patchify, unpatchify
from everest_ds.models.selection import SELECTORS
from everest_ds.tokens import TokenBudget

METHODS = ("everest", "videomae")


def clips(config: ModelConfig, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (batch, 3, config.candidate_frames, config.image_size, config.image_size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def small(kind=ModelConfig, **settings) -> ModelConfig:
    return kind(**({"size": "vit_micro", "image_size": 48, "decoder_depth": 2} | settings))


SHAPES = [
    small(),
    small(method="videomae"),
    small(selector="random"),
    small(selector="least"),
    small(positions="separable"),
    small(checkpointing="full"),
    small(frames=6, tubelet=3, image_size=40, keep_ratio=0.5),
    small(decoder_depth=1, decoder_width=32, decoder_heads=4, attention="fused"),
    small(frame_selection=FrameSelectionConfig(alpha=1.5)),
    small(frame_selection=FrameSelectionConfig(alpha=3), frames=6, tubelet=3, checkpointing="full", keep_ratio=0.5),
]


@pytest.mark.parametrize("config", SHAPES, ids=str)
def test_every_parameter_gets_a_gradient(config):
    model = MaskedAutoencoder(config)
    out = model(clips(config))
    budget = model.budget
    pixels = 3 * config.tubelet * config.patch_pixels**2
    assert out.prediction.shape == (2, budget.reconstructed, pixels)
    assert out.visible_idx.shape == (2, budget.visible)
    assert out.loss.isfinite()
    out.loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_is_the_mean_squared_error_and_holds_only_itself(method):
    """The loop keeps each pass's loss to the end of a step; F.mse_loss's sits in a prediction-sized storage."""
    config = small(method=method)
    model, some = MaskedAutoencoder(config), clips(config)
    out = model(some)
    assert out.loss.untyped_storage().nbytes() == 4
    torch.testing.assert_close(out.loss, F.mse_loss(out.prediction, model.targets(some, out.target_idx)))


@pytest.mark.parametrize("keep_ratio", [0.6, 1.0])
def test_every_parameter_of_the_classifier_gets_a_gradient(keep_ratio):
    config = small(ClassifierConfig, keep_ratio=keep_ratio, classes=8, drop_path=0.0)
    model = VideoClassifier(config)
    model(clips(config)).logsumexp(1).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("method", METHODS)
def test_all_sizes_run_forward_and_backward_at_their_own_shape(size, method):
    """On fake tensors: every shape is real, no arithmetic is done."""
    with torch._subclasses.FakeTensorMode():
        model = everest_ds.create_model(size, method=method, image_size=224)
        out = model(torch.zeros(1, 3, 16, 224, 224, dtype=torch.uint8))
        out.loss.backward()
        assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", ["encoder", "decoder", "full"])
def test_checkpointing_changes_nothing(method, mode):
    results = []
    for checkpointing in ("none", mode):
        torch.manual_seed(0)
        config = small(method=method, checkpointing=checkpointing)
        model = MaskedAutoencoder(config)
        out = model(clips(config), torch.rand(2, model.noise_length, generator=torch.Generator().manual_seed(1)))
        out.loss.backward()
        results.append((out.loss.detach(), [p.grad for p in model.parameters()]))
    (loss, grads), (loss_again, grads_again) = results
    assert torch.equal(loss, loss_again)
    assert all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True))


@pytest.mark.parametrize("config", [*SHAPES[:3], SHAPES[-2]], ids=str)
def test_visible_and_reconstructed_are_disjoint_ascending_and_as_counted(config):
    model = MaskedAutoencoder(config)
    out = model(clips(config, 4))
    for visible, target in zip(out.visible_idx, out.target_idx, strict=True):
        assert torch.equal(visible, visible.unique())
        assert torch.equal(target, target.unique())
        assert not set(visible.tolist()) & set(target.tolist())
        assert max(visible.max(), target.max()) < model.budget.total


def test_rero_keeps_what_changes_and_resolves_ties_by_index():
    budget = TokenBudget(slots=3, rows=1, columns=4, visible=2, reconstructed=2)
    scores = torch.zeros(1, 12)
    scores[0, 9] = 3.0
    noise = torch.tensor([[0.9, 0.1, 0.2, 0.3]])
    visible, target = SELECTORS["rero"].choose(scores, noise, budget)
    # Kept: 9, then the ties in order: 0, 1, 2. Token 9 drew the most noise.
    assert visible.tolist() == [[0, 1]]
    assert target.tolist() == [[2, 9]]
    visible, target = SELECTORS["least"].choose(scores, noise, budget)
    # Kept: 0 to 3, all tied.
    assert (visible.tolist(), target.tolist()) == ([[1, 2]], [[0, 3]])


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_half_precision_chooses_what_its_weights_would_choose_in_fp32(device_type):
    """A GPU's way, products in fp16, runs on a CPU, too."""
    torch.manual_seed(0)
    config = small()
    model = MaskedAutoencoder(config, device_type=device_type).bfloat16()
    # Some columns change more than others: no token is so near to the cut that rounding decides.
    batch, noise = (clips(config) * torch.linspace(0.1, 1, 48)).to(torch.uint8), torch.rand(2, model.noise_length)
    low = model(batch, noise)
    assert low.prediction.dtype == torch.bfloat16
    assert low.loss.dtype == torch.float32
    reference = MaskedAutoencoder(config)
    reference.encoder.patch_embed.weight.data.copy_(model.encoder.patch_embed.weight)
    single = reference(batch, noise)
    # Which of the kept tokens are visible goes by rank, and near-ties among them may change places.
    kept, kept_low = (torch.cat([out.visible_idx, out.target_idx], 1).sort().values for out in (single, low))
    assert torch.equal(kept, kept_low)


def test_patches_fit_together_again():
    config = small(frames=6, tubelet=3, image_size=40)
    batch = clips(config)
    patches = patchify(batch, 3, 8)
    assert patches.shape == (2, 2 * 5 * 5, 3, 3 * 8 * 8)
    assert torch.equal(unpatchify(patches, (2, 5, 5), 3, 8), batch)


def test_wrong_clips_are_named():
    config = small()
    model = MaskedAutoencoder(config)
    with pytest.raises(UserError, match=r"expected uint8 \(B, 3, 16, 48, 48\), got torch.float32"):
        model(clips(config).float())
    with pytest.raises(UserError, match="noise: expected"):
        model(clips(config), torch.rand(2, 3))


def test_timm_finds_the_sizes():
    assert "everest_vit_small" in timm.list_models("everest_*")
    model = timm.create_model("everest_vit_micro", num_classes=8, image_size=48)
    assert model(clips(small())).shape == (2, 8)
    autoencoder = timm.create_model("videomae_vit_micro_pretrain", image_size=48)
    assert autoencoder.budget.dropped == 0
    with pytest.raises(UserError, match="no weights are published"):
        timm.create_model("everest_vit_micro", pretrained=True)


def test_create_model_refuses_unknown_keys():
    with pytest.raises(UserError, match=r"did you mean 'model\.keep_ratio'"):
        everest_ds.create_model("vit_micro", keep_ration=0.3)
