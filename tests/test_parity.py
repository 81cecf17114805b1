"""Numerical parity with the official implementations.

Fixtures come from tests/golden or from the folder named by PARITY_DIR; all sizes are read from their json files.
"""

import numpy as np
import pytest
import torch
from golden_fixtures import facts, group, tensors

from everest_ds.config.finetuning import ClassifierConfig
from everest_ds.config.schema import ModelConfig
from everest_ds.config.sizes import SIZES, Size
from everest_ds.models import MaskedAutoencoder, VideoClassifier
from everest_ds.models.patches import normalise, patchify
from everest_ds.models.positions import sine_cosine
from everest_ds.models.selection import importance
from everest_ds.models.weights import from_official

TOLERANCE = 1e-5


def close(ours: torch.Tensor, golden: torch.Tensor) -> None:
    """Relative to the tensor's own scale, as float32 rounding is."""
    torch.testing.assert_close(ours, golden, rtol=TOLERANCE, atol=TOLERANCE * golden.abs().max().item())


def gradients_close(model: torch.nn.Module, golden: dict[str, torch.Tensor]) -> None:
    expected = from_official(group(golden, "grads/"))
    assert expected
    ours = {name: p.grad for name, p in model.named_parameters()}
    for name, gradient in expected.items():
        got = ours[name]
        assert got is not None, name
        if name.endswith("qkv.bias"):  # k's bias does not exist in the reference; its gradient is zero but for rounding
            width = len(gradient) // 3
            close(got[:width], gradient[:width])
            close(got[2 * width :], gradient[2 * width :])
        else:
            close(got, gradient)


def golden_model_config(f: dict, monkeypatch: pytest.MonkeyPatch, kind=ModelConfig, **keys):
    width = f.get("encoder_embed_dim", f.get("embed_dim"))
    row = Size(
        width=width,
        depth=f.get("encoder_depth", f.get("depth")),
        heads=f.get("encoder_num_heads", f.get("num_heads")),
        decoder_width=f.get("decoder_embed_dim", width // 2),
        decoder_heads=f.get("decoder_num_heads", 1),
        patch=f["patch_size"],
        mlp_ratio=f["mlp_ratio"],
    )
    monkeypatch.setitem(SIZES, "golden", row)
    shape = {"image_size": f["img_size"], "frames": f["num_frames"], "tubelet": f["tubelet_size"]}
    return kind(size="golden", decoder_depth=f.get("decoder_depth", 1), **shape, **keys)


def indices(mask_true_is_out: torch.Tensor) -> torch.Tensor:
    """Ascending indices of the False entries, as many in every row."""
    return torch.stack([(~row).nonzero().flatten() for row in mask_true_is_out])


@pytest.fixture(params=["eager", "fused"])
def attention(request: pytest.FixtureRequest) -> str:
    return request.param


def test_input_normalisation():
    golden = tensors("everest_pretrain")
    f = facts("everest_pretrain")
    patches = patchify(golden["video_u8"], f["tubelet_size"], f["patch_size"])
    ours = normalise(patches, torch.float32).unflatten(-1, (3, f["tubelet_size"], f["patch_size"], f["patch_size"]))
    close(ours[:, 0, :, :2, :4, :4], golden["video_corner"])


def test_everest_pretraining(monkeypatch, attention):
    f, golden = facts("everest_pretrain"), tensors("everest_pretrain")
    config = golden_model_config(
        f,
        monkeypatch,
        keep_ratio=1 - f["motion_centric_masking_ratio"],
        visible_ratio=1 - f["masking_ratio"],
        attention=attention,
    )
    model = MaskedAutoencoder(config)
    assert (model.budget.kept, model.budget.visible, model.budget.reconstructed) == (
        f["selected_tokens"],
        f["visible_tokens"],
        f["target_tokens"],
    )
    model.load_state_dict(from_official(group(golden, "weights/")), strict=True)
    close(model.encoder.positions.table, golden["encoder_pos_embed"][0])
    close(model.decoder.positions.table, golden["decoder_pos_embed"][0])

    patches = patchify(golden["video_u8"], *model.encoder.cut)
    embedded = torch.nn.functional.linear(
        normalise(patches, torch.float32), model.encoder.patch_embed.weight, model.encoder.patch_embed.bias
    )
    close(importance(embedded, f["time_slots"]), golden["importance"])

    out = model(golden["video_u8"], golden["noise"])
    assert torch.equal(out.visible_idx, indices(golden["visible_mask"]))
    assert torch.equal(out.target_idx, indices(golden["target_mask"]))
    close(out.prediction.detach(), golden["output"])
    close(model.targets(golden["video_u8"], out.target_idx), golden["labels"])
    close(out.loss.detach().reshape(1), golden["loss"])
    assert out.loss.item() == pytest.approx(f["loss"], rel=TOLERANCE)
    out.loss.backward()
    gradients_close(model, golden)


def test_videomae_pretraining(monkeypatch, attention):
    f, golden = facts("videomae_pretrain"), tensors("videomae_pretrain")
    config = golden_model_config(
        f, monkeypatch, method="videomae", visible_ratio=1 - f["mask_ratio"], attention=attention
    )
    model = MaskedAutoencoder(config)
    assert (model.budget.visible, model.budget.reconstructed) == (f["visible_tokens"], f["target_tokens"])
    model.load_state_dict(from_official(group(golden, "weights/")), strict=True)

    noise = golden["mask"][:, : f["tokens_per_slot"]].float()  # the visible places draw the lowest numbers
    out = model(golden["video_u8"], noise)
    assert torch.equal(out.visible_idx, indices(golden["mask"]))
    assert torch.equal(out.target_idx, indices(~golden["mask"]))
    close(out.prediction.detach(), golden["output"])
    close(model.targets(golden["video_u8"], out.target_idx), golden["labels"])
    close(out.loss.detach().reshape(1), golden["loss"])
    out.loss.backward()
    gradients_close(model, golden)


def test_classifier(monkeypatch, attention):
    f, golden = facts("everest_finetune"), tensors("everest_finetune")
    labels = torch.tensor(f["class_labels"])
    for keep_ratio, key in ((1.0, "logits_no_dropping"), (1 - f["mcm_ratio"], "logits")):
        config = golden_model_config(
            f,
            monkeypatch,
            ClassifierConfig,
            keep_ratio=keep_ratio,
            attention=attention,
            classes=f["num_classes"],
            drop_path=0.0,
        )
        model = VideoClassifier(config)
        model.load_state_dict(from_official(group(golden, "weights/")), strict=True)
        logits = model(golden["video_u8"])
        close(logits.detach(), golden[key])
    assert model.budget.visible == f["kept_tokens"]
    assert torch.equal(model.kept_indices(golden["video_u8"]), indices(golden["keep_mask"]))
    loss = torch.nn.functional.cross_entropy(logits, labels)
    close(loss.detach().reshape(1), golden["loss"].reshape(1))
    loss.backward()
    gradients_close(model, golden)


def test_position_table_is_even_sine_odd_cosine():
    table = sine_cosine(torch.arange(3), 4)
    np.testing.assert_allclose(table[:, 0], np.sin([0, 1, 2]))
    np.testing.assert_allclose(table[:, 1], np.cos([0, 1, 2]))
    np.testing.assert_allclose(table[:, 2], np.sin(np.array([0, 1, 2]) / 100))
