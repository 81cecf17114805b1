import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

import everest_ds
from everest_ds.config.errors import UserError
from everest_ds.config.load import to_tree
from everest_ds.models.weights import CONFIG_KEY, from_official


def saved(path, model):
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, path, metadata={CONFIG_KEY: json.dumps(to_tree(model.config))})
    return path


def test_a_saved_model_comes_back_with_its_settings(tmp_path):
    model = everest_ds.create_model("vit_micro", image_size=48, decoder_depth=1, positions="separable")
    saved(tmp_path / "model.safetensors", model)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        again = everest_ds.load_pretrained(path)
        assert again.config == model.config
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_files_that_are_no_weights_of_ours(tmp_path):
    with pytest.raises(UserError, match=r"no model\.safetensors here"):
        everest_ds.load_pretrained(tmp_path)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"x": torch.zeros(1)}, foreign)
    with pytest.raises(UserError, match="not weights that everest_ds wrote"):
        everest_ds.load_pretrained(foreign)
    pickled = tmp_path / "model.pt"
    pickled.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UserError, match="not weights that everest_ds wrote"):
        everest_ds.load_pretrained(pickled)


def test_official_names_become_ours():
    width = 4
    official = {
        "encoder.patch_embed.proj.weight": torch.randn(width, 3, 2, 8, 8),
        "encoder.pos_embed": torch.zeros(1, 8, width),
        "encoder.blocks.0.attn.q_bias": torch.ones(width),
        "encoder.blocks.0.attn.v_bias": torch.full((width,), 2.0),
    }
    ours = from_official(official)
    assert set(ours) == {"encoder.patch_embed.weight", "encoder.blocks.0.attn.qkv.bias"}
    assert ours["encoder.patch_embed.weight"].shape == (width, 3 * 2 * 8 * 8)
    assert ours["encoder.blocks.0.attn.qkv.bias"].tolist() == [1.0] * 4 + [0.0] * 4 + [2.0] * 4
