"""What counts as a bad step; the loss scaler's searching doesn't."""

import json
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

from everest_ds.data.loader import Batch
from everest_ds.training.bad_steps import BadSteps
from everest_ds.training.whole import WholeState


def batch(*videos: int) -> Batch:
    empty, index = torch.empty(len(videos), 0), torch.tensor(videos)
    return Batch(empty, empty, index, index, bad=[], lost=0)


@pytest.fixture
def judged(tmp_path):
    def judge(*, fp16: bool, losses: list[float], applied: bool = False) -> BadSteps:
        steps = BadSteps(tmp_path / "bad_steps.jsonl", "video-{}.mp4".format, fp16=fp16)
        steps.in_a_row = 4
        batches = [batch(2 * i, 2 * i, 2 * i + 1, -1) for i in range(len(losses))]  # two views of one; one was lost
        steps.judge(7, applied, [torch.tensor(loss) for loss in losses], batches)
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
    assert again.counters == {"bad_steps": 0, "scaler_skips": 1}


def scaled(scaler: DynamicLossScaler, *, fp16: bool = True) -> WholeState:
    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    optimizer.loss_scaler = scaler
    return WholeState(SimpleNamespace(module=module, optimizer=optimizer, fp16_enabled=lambda: fp16))


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
    assert scaled(straight, fp16=False).scaler == {}
