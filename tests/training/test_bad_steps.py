"""What counts as a bad step; the loss scaler's searching doesn't."""

import json
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler, LossScalerBase

from everest_ds.training.bad_steps import BadSteps
from everest_ds.training.engine import searches_scale
from everest_ds.training.metrics import MetricsFile
from everest_ds.training.whole import WholeState


@pytest.fixture
def judged(tmp_path):
    def judge(*, fp16: bool, losses: list[float], applied: bool = False) -> BadSteps:
        records = MetricsFile(tmp_path / "bad_steps.jsonl", from_step=0)
        steps = BadSteps(records, "video-{}.mp4".format, searching=lambda: fp16)
        steps.in_a_row = 4
        # Two views of one; one was lost.
        videos = [torch.tensor([2 * i, 2 * i, 2 * i + 1, -1]) for i in range(len(losses))]
        steps.judge(7, applied, [torch.tensor(loss) for loss in losses], videos)
        return steps

    return judge


def test_a_step_that_was_taken_ends_a_series(judged, tmp_path):
    steps = judged(fp16=False, losses=[1.0], applied=True)
    assert (steps.total, steps.in_a_row) == (0, 0)
    assert not (tmp_path / "bad_steps.jsonl").exists()


def test_the_pass_with_the_bad_loss_is_written_down(judged, tmp_path):
    steps = judged(fp16=False, losses=[1.0, float("-inf"), 2.0])
    assert (steps.total, steps.in_a_row, steps.scaler_skips) == (1, 5, 0)
    assert json.loads((tmp_path / "bad_steps.jsonl").read_text()) == {
        "step": 7,
        "what": "loss is not finite",
        "clips": [{"rank": 0, "pass": 1, "loss": "-inf", "videos": ["video-2.mp4", "video-3.mp4"]}],
    }


def test_all_passes_are_written_down_where_only_the_gradient_is_bad(judged, tmp_path):
    judged(fp16=False, losses=[1.0, 2.0])
    record = json.loads((tmp_path / "bad_steps.jsonl").read_text())
    assert record["what"] == "gradient is not finite, every loss is"
    assert [clip["loss"] for clip in record["clips"]] == [1.0, 2.0]


def test_a_loss_scale_being_found_is_no_bad_step(judged, tmp_path):
    steps = judged(fp16=True, losses=[1.0, 2.0])
    assert (steps.total, steps.in_a_row, steps.scaler_skips) == (0, 4, 1)
    assert not (tmp_path / "bad_steps.jsonl").exists()
    steps = judged(fp16=True, losses=[1.0, float("nan")])
    assert (steps.total, steps.in_a_row, steps.scaler_skips) == (1, 5, 0)


def test_counters_travel(judged):
    steps = judged(fp16=True, losses=[1.0])
    again = judged(fp16=True, losses=[1.0], applied=True)
    again.restore(json.loads(json.dumps(steps.counters)))
    assert again.counters == {"bad_steps": 0, "in_a_row": 4, "scaler_skips": 1}


def scaled(scaler: LossScalerBase) -> WholeState:
    return WholeState(engine_of(scaler))


def engine_of(scaler: LossScalerBase) -> SimpleNamespace:
    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    optimizer.loss_scaler = scaler
    return SimpleNamespace(module=module, optimizer=optimizer)


def new_scaler() -> DynamicLossScaler:
    return DynamicLossScaler(
        init_scale=2**16, scale_window=4, min_scale=1, delayed_shift=2, consecutive_hysteresis=False
    )


def test_a_loss_scaler_continues_where_it_was(monkeypatch):
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda *_: 0)
    straight, again = new_scaler(), new_scaler()
    pattern = [True, True, False, False, True, False, False, False, False, False, True, True, False]
    for overflow in pattern[:7]:
        straight.update_scale(overflow)
    scaled(again).scaler = json.loads(json.dumps(scaled(straight).scaler))
    for overflow in pattern[7:]:
        straight.update_scale(overflow)
        again.update_scale(overflow)
        assert vars(again) == vars(straight)
    assert straight.cur_scale != 2**16


def test_a_scale_that_is_given_is_not_looked_for():
    """Nor does a checkpoint change it."""
    static = LossScaler(scale=128.0)
    scaled(static).scaler = scaled(new_scaler()).scaler
    assert static.cur_scale == 128.0
    assert scaled(static).scaler == {}
    assert not searches_scale(engine_of(static))


def test_the_search_ends_at_the_smallest_scale(monkeypatch):
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda *_: 0)
    scaler = new_scaler()
    scaler.raise_error_at_min_scale = False
    assert searches_scale(engine_of(scaler))
    for _ in range(20):
        scaler.update_scale(True)
    assert scaler.cur_scale == scaler.min_scale
    assert not searches_scale(engine_of(scaler))
