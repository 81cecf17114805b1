"""MFU by hand: the paper's count of a clip, and the rates that data sheets print."""

import pytest

from everest_ds.config.ds_config import products_precision
from everest_ds.config.finetuning import ClassifierConfig
from everest_ds.config.schema import ModelConfig
from everest_ds.memory.arithmetic import step_flops
from everest_ds.memory.utilisation import Peak, mfu, peak_of

H100 = "NVIDIA H100 80GB HBM3"


def test_a_step_is_six_operations_for_each_published_multiply_accumulate():
    base = ModelConfig(size="vit_base", keep_ratio=0.3)
    assert step_flops(base) == pytest.approx(6 * 19.81e9, rel=0.006)  # Table 10
    tuned = ClassifierConfig(size="vit_base", classes=400, keep_ratio=0.6)
    assert step_flops(tuned) == pytest.approx(6 * 98.1e9, rel=0.006)


def test_recomputing_is_no_work():
    model = {"size": "vit_micro", "image_size": 64}
    assert step_flops(ModelConfig(**model, checkpointing="full")) == step_flops(ModelConfig(**model))


def test_mfu_is_the_share_of_all_devices_peak():
    # ViT-B EVEREST on 8 H100: 8000 clips/s x 118.86 GFLOP = 950.9 of 7916 TFLOP/s.
    peak = peak_of(H100, "bf16")
    assert mfu(8000, flops_per_clip=6 * 19.81e9, peak=peak, devices=8) == pytest.approx(0.1201, abs=1e-4)
    assert mfu(8000, flops_per_clip=6 * 19.81e9, peak=peak, devices=16) == pytest.approx(0.0601, abs=1e-4)


@pytest.mark.parametrize(
    ("card", "precision", "stated", "peak"),
    [
        (H100, "bf16", None, Peak(flops_per_s=989.5e12, data_sheet="H100")),
        (H100, "fp32", None, Peak(flops_per_s=67e12, data_sheet="H100")),
        (H100, "bf16", 756e12, Peak(flops_per_s=756e12, data_sheet=None)),
        ("NVIDIA A100-SXM4-40GB", "fp16", None, Peak(flops_per_s=312e12, data_sheet="A100-40")),
        ("NVIDIA H100 PCIe", "bf16", None, None),  # has other rates
        ("Tesla V100-SXM2-32GB", "bf16", None, None),
        ("cpu", "fp32", None, None),
        ("cpu", "fp32", 2e11, Peak(flops_per_s=2e11, data_sheet=None)),
    ],
)
def test_a_peak_is_stated_or_printed_or_not_known(card, precision, stated, peak):
    assert peak_of(card, precision, stated) == peak


@pytest.mark.parametrize(
    ("ds_config", "precision"),
    [
        ({}, "fp32"),
        ({"bf16": {"enabled": True}}, "bf16"),
        ({"fp16": {"enabled": True}, "torch_autocast": {"enabled": False, "dtype": "bfloat16"}}, "fp16"),
        ({"torch_autocast": {"enabled": True, "dtype": "torch.bfloat16"}}, "bf16"),
        ({"torch_autocast": {"enabled": True, "dtype": "half"}}, "fp16"),
    ],
)
def test_autocast_sets_the_precision_of_products(ds_config, precision):
    assert products_precision(ds_config) == precision
