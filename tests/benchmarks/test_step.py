"""The step benchmark: its baseline does the same work, its table says what was measured. Times are not looked at."""

import re

import pytest
import torch
from packaging.version import Version

from everest_ds.benchmarks import step
from everest_ds.benchmarks.parts import PARTS
from everest_ds.benchmarks.reference_step import ReferenceStep, normalised
from everest_ds.benchmarks.step import REFERENCE, Runner, Settings, Variant
from everest_ds.benchmarks.step_report import report
from everest_ds.benchmarks.tables import Spread
from everest_ds.memory.meters import StorageMeter
from everest_ds.models import create_model
from everest_ds.training import ranks

SMALL = ("model.image_size=48", "model.decoder_depth=1", "model.frames=8")


@pytest.mark.parametrize("method", ["everest", "videomae"])
def test_the_reference_style_gives_the_same_loss_and_gradients(method):
    torch.manual_seed(1)
    model = create_model("vit_micro", method=method, image_size=48, frames=8, decoder_depth=1, attention="eager")
    clips, noise = torch.randint(0, 256, (2, 3, 8, 48, 48), dtype=torch.uint8), torch.rand(2, model.budget.clip_noise)
    ours = model(clips, noise).loss
    ours.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    theirs = ReferenceStep(model)(normalised(clips, torch.float32), noise)
    theirs.backward()
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.fixture(scope="module")
def result() -> step.Result:
    settings = Settings(sizes=("vit_micro",), batch=1, pairs=2, profiled=True, overrides=SMALL)
    return step.measure(settings, lambda line: None)


def test_every_variant_is_measured_against_its_own_baseline(result):
    assert [row.variant for row in result.rows] == step.variants(step.PRETRAINING, compiled=False)
    assert len(result.rows) == 6
    for ratio in result.ratios[1:]:
        assert ratio.numerator.split(",")[0] == ratio.denominator.split(",")[0]
    assert result.ratios[0].numerator.startswith("EVEREST, ours")
    assert result.ratios[0].denominator.startswith("VideoMAE, ours")
    assert sum(REFERENCE in ratio.denominator for ratio in result.ratios) == 2


def test_the_peak_holds_gradients_and_the_reference_takes_more(result):
    peaks = {(row.variant.task, row.variant.style, row.variant.attention): row.peak_bytes for row in result.rows}
    gradients = sum(p.nbytes for p in create_model("vit_micro", image_size=48, decoder_depth=1).parameters())
    for task in step.PRETRAINING:
        assert gradients < peaks[task, "ours", "fused"] <= peaks[task, "ours", "eager"]
        assert peaks[task, "ours", "eager"] < peaks[task, REFERENCE, "eager"]


def test_rates_are_arithmetic_over_time(result):
    row = result.rows[0]
    assert row.done_share.median < row.share.median
    # Slowest step, slowest rate.
    assert row.flops_per_s.least * row.seconds.most == pytest.approx(row.flops_per_s.most * row.seconds.least)


def test_ratios_are_taken_round_by_round():
    runners = [
        Runner(
            variant=Variant(task=task, style="ours", attention="fused"),
            model=None,
            loss=None,
            flops=1,
            flops_done=1,
            rounds=r,
        )
        for task, r in (("EVEREST", [1.0, 2.0, 30.0]), ("VideoMAE", [2.0, 4.0, 40.0]))
    ]
    (ratio,) = step.compare("vit_base", runners, ("EVEREST", "VideoMAE"))
    assert (ratio.spread.median, ratio.spread.least, ratio.spread.most) == (0.5, 0.5, 0.75)


def test_the_report_lists_rows_ratios_and_where_time_goes(result):
    text = "\n".join(report(result, command="c"))
    for row in result.rows:
        assert f"| vit_micro: {row.variant.name} | {row.seconds:.3f} |" in text
    assert "matrix products" in text
    profile = result.profiles["vit_micro"]["EVEREST, ours, eager"]
    assert profile["matrix products"] > 0
    assert profile["attention"] > 0


def test_fine_tuning_compares_kept_tokens_with_all():
    settings = Settings(sizes=("vit_micro",), phase="finetune", batch=1, pairs=1, overrides=SMALL)
    result = step.measure(settings, lambda line: None)
    assert len(result.rows) == 4
    assert result.ratios[0].numerator.startswith("kept tokens, ours")
    assert result.ratios[0].denominator.startswith("all tokens, ours")
    kept, every = (next(row for row in result.rows if row.variant.task == task) for task in step.FINETUNING)
    assert kept.peak_bytes < every.peak_bytes


def test_spreads():
    assert f"{Spread.of([3.0, 1.0, 2.0]):.1f}" == "2.0 (1.0 to 3.0)"


def test_every_kernel_of_fused_attention_counts_as_attention():
    """CUDA has three, of which a CPU's profile shows none: by the names that torch registers.

    torch 2.6 has cuDNN's inside another operator.
    """
    registered = {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    kernels = {name for name in registered if re.fullmatch(r"aten::_\w+_attention_(forward|backward)", name)}
    own = ("flash", "efficient", *(["cudnn"] if Version(torch.__version__) >= Version("2.11") else []))
    assert {f"aten::_{kind}_attention_forward" for kind in own} <= kernels
    assert [name for name in kernels if not name.startswith(PARTS["attention"])] == []


@pytest.mark.parametrize("in_a_row", [1, 50])
def test_products_in_a_row_hold_one_result(monkeypatch, in_a_row):
    """A GPU is given many, so that it works while the next one is asked for."""
    monkeypatch.setattr(step, "_PRODUCTS_IN_A_ROW", in_a_row)
    monkeypatch.setattr(step, "_PRODUCTS_S", 1e-9)
    monkeypatch.setattr(ranks, "on_cpu", lambda: False)
    monkeypatch.setattr(ranks, "device", lambda: torch.device("cpu"))
    with StorageMeter() as meter:
        assert step.product_rate((64, 32, 128), torch.float32) > 0
    operands_bytes, result_bytes = (64 * 32 + 32 * 128) * 4, 64 * 128 * 4
    assert meter.peak_bytes - meter.before_bytes == operands_bytes + result_bytes
