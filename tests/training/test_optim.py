import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from golden_fixtures import facts
from launching import run

from everest_ds.config.errors import UserError
from everest_ds.config.finetuning import ClassifierConfig
from everest_ds.config.schema import ModelConfig
from everest_ds.models import MaskedAutoencoder, VideoClassifier
from everest_ds.models.parameter_groups import parameter_groups
from everest_ds.training import optim
from everest_ds.training.optim import ADAMS, choose_adam, which_apex


def test_weight_decay_falls_on_what_the_official_groups_decay():
    model = MaskedAutoencoder(ModelConfig(size="vit_micro", image_size=48, decoder_depth=1))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    ours = {names[id(p)]: group["weight_decay"] > 0 for group in parameter_groups(model, 0.05) for p in group["params"]}
    assert len(ours) == len(names)
    official = facts("lr_schedule")["pretrain_parameter_groups"]["parameters"]
    for name, entry in official.items():
        renamed = name.replace("patch_embed.proj.", "patch_embed.").replace("q_bias", "qkv.bias")
        if not name.endswith("v_bias"):
            assert ours[renamed] == (entry["weight_decay"] == "yes"), name


def test_layers_learn_at_the_official_rates():
    """A 12-layer classifier: rate and decay of every parameter, and the number of groups."""
    official = facts("lr_schedule")["layer_decay"]
    assert official["num_layers"] == 12
    with torch._subclasses.FakeTensorMode():
        model = VideoClassifier(ClassifierConfig(size="vit_small", classes=10))
        groups = parameter_groups(model, 0.05, official["decay"])
    assert len(groups) == official["num_groups"]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    ours = {names[id(p)]: group for group in groups for p in group["params"]}
    assert len(ours) == len(names)
    for name, entry in official["parameters"].items():
        renamed = name.replace("patch_embed.proj.", "patch_embed.").replace("q_bias", "qkv.bias")
        if not name.endswith("v_bias"):
            assert ours[renamed]["lr_scale"] == pytest.approx(entry["lr_scale"], rel=1e-12), name
            assert (ours[renamed]["weight_decay"] > 0) == (entry["weight_decay"] == "yes"), name


def test_a_missing_compiler_leads_to_torch_with_the_reason(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    adam, why = choose_adam("auto", offload=False)
    assert adam is ADAMS["torch"]
    assert "no C++ compiler ('no-such-compiler' is not on PATH" in why
    with pytest.raises(UserError, match="offload_optimizer: needs DeepSpeedCPUAdam, but no C"):
        choose_adam("auto", offload=True)
    with pytest.raises(UserError, match="implementation=deepspeed: no C"):
        choose_adam("deepspeed", offload=False)


def test_the_apex_of_pypi_is_told_from_nvidias(monkeypatch, tmp_path):
    assert which_apex() == "none"
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex/__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert which_apex() == "other"
    with pytest.raises(UserError, match="not NVIDIA's"):
        choose_adam("apex", offload=False)
    (tmp_path / "amp_C.py").write_text("")
    assert which_apex() == "nvidia"


def test_fused_adams_step_as_torch_does():
    def stepped(row):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(33, 7))
        optimizer = row.build([{"params": [weight]}], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.05)
        for _ in range(3):
            weight.grad = weight.detach().sin()
            optimizer.step()
        return weight.detach()

    for key in ("deepspeed", "offload"):
        assert not ADAMS[key].obstacle()
        torch.testing.assert_close(stepped(ADAMS[key]), stepped(ADAMS["torch"]), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not Path(sys.executable).with_name("ninja").exists(), reason="this environment has no ninja")
def test_ops_are_loaded_with_the_ninja_of_this_environment(monkeypatch, tmp_path):
    (tmp_path / "ninja").write_text("#!/bin/sh\necho 1.0\n")
    (tmp_path / "ninja").chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path), os.environ["PATH"]]))
    for _ in range(2):
        assert not ADAMS["deepspeed"].obstacle()
        assert shutil.which("ninja") == str(Path(sys.executable).with_name("ninja"))
    assert os.environ["PATH"].split(os.pathsep).index(str(tmp_path)) == 1


def test_a_run_without_a_compiler_says_one_line_and_trains(motion_videos, tmp_path):
    """CXX names a compiler that isn't there: torch's AdamW serves, without a page of trace."""
    settings = "data.stride=1 data.workers=0 data.crop_scales=[0.75] model.size=vit_micro model.image_size=48".split()
    done = run(
        "run/pretrain.py",
        *("--ds_config", "ds_configs/zero1.json", f"data.train={motion_videos}", *settings),
        *("train.global_batch=4", "train.max_steps=2", f"train.output_dir={tmp_path / 'run'}"),
        CXX="no-such-compiler",
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "optimizer: torch fused AdamW (no C++ compiler ('no-such-compiler'" in done.stderr


def test_table_rows_are_what_they_say():
    assert optim.ADAMS.keys() == {"offload", "deepspeed", "apex", "torch"}
    assert "apex" not in sys.modules
