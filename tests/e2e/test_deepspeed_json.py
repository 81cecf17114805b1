"""What a user writes into a DeepSpeed JSON: it works, or one line says why not, on one rank and on two."""

import importlib.util
import json

import pytest
from launching import deepspeed

SMALL = (
    "data.stride=1 data.workers=0 data.crop_scales=[0.75] model.size=vit_micro model.image_size=48 "
    "model.decoder_depth=1 train.global_batch=4 train.max_steps=2 optim.warmup_steps=0"
).split()
# DeepSpeed refuses it only when it builds its optimizer.
UNFORESEEN = {"zero_optimization": {"stage": 2}, "prescale_gradients": True, "gradient_predivide_factor": 2.0}


@pytest.fixture
def arguments(motion_videos, tmp_path):
    """The command that trains with a JSON, and writes into tmp_path / "run"."""

    def command(ds):
        file = tmp_path / "ds.json"
        file.write_text(json.dumps(ds))
        place = (f"data.train={motion_videos}", f"train.output_dir={tmp_path / 'run'}")
        return ["run/pretrain.py", "--ds_config", file, *SMALL, *place]

    return command


def error_lines(done, command="pretrain"):
    assert done.returncode == 2, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith(f"{command}: error: ")]


def test_settings_that_nothing_reads(one_rank, arguments, tmp_path):
    """The planner refuses them as the run does."""
    (told,) = error_lines(one_rank.run(*arguments({"stage": 3})))
    assert told == f"pretrain: error: ds_config {tmp_path / 'ds.json'}: 'stage' belongs into 'zero_optimization'"
    plan = ("tools/memprof", "plan", "--model", "vit_micro", "--micro-batch", "2", "--ds_config", tmp_path / "ds.json")
    assert error_lines(one_rank.run(*plan), "memprof") == [told.replace("pretrain", "memprof")]


def test_the_old_switch_of_offload(one_rank, arguments, tmp_path):
    done = one_rank.succeed(*arguments({"zero_optimization": {"stage": 2, "cpu_offload": True}}))
    assert 'zero_optimization.cpu_offload is an old name; it is read as offload_optimizer with "device": "cpu"' in (
        done.stderr
    )
    assert "optimizer: DeepSpeedCPUAdam (the optimizer is offloaded to the host)" in done.stderr
    ds = json.loads((tmp_path / "run/ds_config.json").read_text())
    assert ds["zero_optimization"] == {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": False}}


def test_what_deepspeed_prints_is_printed_where_it_is_asked_for(one_rank, arguments):
    asked = {
        "steps_per_print": 1,
        "wall_clock_breakdown": True,
        "comms_logger": {"enabled": True, "verbose": True},
        "flops_profiler": {"enabled": True, "profile_step": 1},
        "dump_state": True,
    }
    said = one_rank.succeed(*arguments(asked)).stdout
    signs = ("step=2, skipped=0, lr=", "fwd_microstep", "Comm. Op", "comm op: ", "Profile Summary", "DeepSpeedEngine:")
    assert [sign for sign in signs if sign not in said] == []
    off = {"comms_logger": {"enabled": False}, "flops_profiler": {"enabled": False}}
    quiet = one_rank.succeed(*arguments(off), "train.max_steps=4", "--resume", "auto").stdout
    assert [sign for sign in (*signs, "step=4") if sign in quiet] == []


@pytest.mark.parametrize("section", ["wandb", "comet"])
def test_a_monitor_without_its_package(one_rank, arguments, section):
    if importlib.util.find_spec({"wandb": "wandb", "comet": "comet_ml"}[section]):
        pytest.skip("it is installed")
    (told,) = error_lines(one_rank.run(*arguments({section: {"enabled": True}})))
    assert f"ds_config {section}: pip install " in told


def test_what_deepspeed_refuses_on_all_ranks_is_one_line(two_ranks, arguments, tmp_path):
    (told,) = error_lines(two_ranks.run(*arguments(UNFORESEEN)))
    file = tmp_path / "run/deepspeed_errors.log"
    assert "DeepSpeed can't build an engine with it: gradient_predivide_factor != 1.0 is not yet supported" in told
    assert told.startswith("pretrain: error: [rank 0 on ")
    assert told.endswith(f"(trace: {file})")
    traces = file.read_text()
    assert traces.count("Traceback (most recent call last)") == 2
    assert " rank 1\n" in traces


def test_a_rank_that_fails_alone_says_so_and_nobody_waits(arguments):
    """Under the launcher, which ends rank 0 in its collective."""
    done = deepspeed(2, "tests/e2e/failing_alone.py", "1", *arguments({}), timeout_s=120)
    (told,) = error_lines(done)
    assert told.startswith("pretrain: error: [rank 1 on ")
    assert "can't build an engine with it: KeyError 'of one rank'" in told
