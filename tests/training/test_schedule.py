import pytest
from golden_fixtures import facts

from everest_ds.config.schema import OptimConfig
from everest_ds.training.schedule import CosineSchedule, build_schedule

GOLDEN = facts("lr_schedule")


@pytest.mark.parametrize("case", [GOLDEN["cosine_scheduler"], *GOLDEN["more_schedules"]])
def test_official_values(case):
    arguments = case["args"]
    per_epoch = arguments["niter_per_ep"]
    schedule = CosineSchedule(
        peak=arguments["base_value"],
        final=arguments["final_value"],
        start=arguments.get("start_warmup_value", 0.0),
        warmup_steps=arguments.get("warmup_steps") or arguments.get("warmup_epochs", 0) * per_epoch,
        total_steps=arguments["epochs"] * per_epoch,
    )
    assert [schedule(step) for step in range(schedule.total_steps)] == pytest.approx(case["values"], rel=1e-9)


def test_rates_scale_with_the_global_batch():
    optim = OptimConfig(base_lr=1.5e-4, min_lr=1e-5, warmup_lr=1e-6, warmup_epochs=2)
    schedule = build_schedule(optim, global_batch=1024, steps_per_epoch=10, total_steps=100)
    assert (schedule.peak, schedule.final, schedule.start) == pytest.approx((6e-4, 4e-5, 4e-6))
    assert schedule.warmup_steps == 20


def test_a_run_shorter_than_its_warmup_says_so(caplog):
    schedule = build_schedule(OptimConfig(warmup_steps=50), global_batch=256, steps_per_epoch=10, total_steps=10)
    assert "inside its warm-up" in caplog.text
    assert schedule(9) < schedule.peak
