"""A loss or gradient that isn't finite on one rank, under every stage: skipped, counted, its clips written down."""

import json
import shutil

import pytest
from killing import assert_same_run, checkpoints, pretraining
from launching import DS_CONFIGS, metrics

STAGES = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
SETTINGS = ("train.log_every_steps=1", "train.save_every_steps=1")


def run_faulty(console, case, run_dir, *fault, more=()):
    return console.run("tests/resilience/faulty.py", *fault, *case.command(run_dir, *SETTINGS, *more))


def case_of(manifest, stage, steps):
    return pretraining(manifest, steps, DS_CONFIGS / f"{stage}.json")


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_bad_step_is_skipped(stage, what, motion_videos, tmp_path, two_ranks):
    done = run_faulty(two_ranks, case_of(motion_videos, stage, 5), tmp_path, "1", "3", what)
    assert done.returncode == 0, done.stderr[-3000:]
    records = metrics(tmp_path)
    assert [record["bad_steps"] for record in records] == [0, 0, 1, 1, 1]
    assert all(isinstance(record["loss"], float) for record in records)
    # After a bad step nothing is saved, before and behind it everything is; the optimizer has taken one step less.
    assert checkpoints(tmp_path) == ["step-00000002", "step-00000004", "step-00000005"]
    state = json.loads((tmp_path / "checkpoints/step-00000005/state.json").read_text())
    assert (state["optimizer_steps"], state["counters"]["bad_steps"]) == (4, 1)
    (line,) = (tmp_path / "bad_steps.jsonl").read_text().splitlines()
    bad = json.loads(line)
    culprits = {clip["rank"]: clip for clip in bad["clips"]}
    assert bad["step"] == 3
    if what == "loss":
        assert bad["what"] == "loss is not finite"
        assert set(culprits) == {1}
        assert culprits[1]["loss"] == "nan"
    else:
        assert bad["what"] == "gradient is not finite, every loss is"
        assert set(culprits) == {0, 1}
    assert all(len(clip["videos"]) == 2 for clip in culprits.values())
    assert all(video.startswith(str(motion_videos.parent)) for clip in culprits.values() for video in clip["videos"])


def test_a_bad_last_step_doesnt_keep_a_run_from_its_end(motion_videos, tmp_path, two_ranks):
    """Its weights are those of the step before; a run that continues counts on from there."""
    done = run_faulty(two_ranks, case_of(motion_videos, "zero1", 4), tmp_path, "1", "4", "loss")
    assert done.returncode == 0, done.stderr[-3000:]
    assert checkpoints(tmp_path)[-1] == "step-00000004"
    assert (tmp_path / "model.safetensors").is_file()
    state = json.loads((tmp_path / "checkpoints/step-00000004/state.json").read_text())
    assert state["counters"]["in_a_row"] == 1


def test_clipping_at_stage_0_continues(motion_videos, tmp_path, two_ranks):
    """There our own wrapper keeps the norm; it is the one before clipping."""
    ds = tmp_path / "clipped.json"
    ds.write_text(json.dumps(json.loads((DS_CONFIGS / "zero0.json").read_text()) | {"gradient_clipping": 0.01}))
    case = pretraining(motion_videos, 6, ds)
    two_ranks.succeed(*case.command(tmp_path / "straight", *SETTINGS))
    shutil.copytree(tmp_path / "straight", tmp_path / "run")
    (tmp_path / "run/checkpoints/latest").write_text("step-00000004")
    again = two_ranks.succeed(*case.command(tmp_path / "run", *SETTINGS))
    assert "continuing" in again.stderr
    assert_same_run(tmp_path / "straight", tmp_path / "run")
    assert all(record["grad_norm"] > 0.02 for record in metrics(tmp_path / "run"))


@pytest.mark.parametrize("stage", ["zero0", "zero2"])
def test_bad_steps_in_a_row_end_the_run(stage, motion_videos, tmp_path, two_ranks):
    case = case_of(motion_videos, stage, 9)
    done = run_faulty(two_ranks, case, tmp_path, "0", "2,4,5,6", "loss", more=["train.max_bad_steps=3"])
    assert done.returncode == 3, done.stderr[-3000:]
    assert "loss or gradients are not finite" in done.stderr
    assert [record["step"] for record in metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert checkpoints(tmp_path) == ["step-00000001", "step-00000003"]
    assert not (tmp_path / "model.safetensors").exists()
    # The faults gone, it continues from there, and the count of bad steps with it.
    again = two_ranks.run(*case.command(tmp_path, *SETTINGS))
    assert again.returncode == 0, again.stderr[-3000:]
    assert [record["bad_steps"] for record in metrics(tmp_path)] == [0, 1, 1, 1, 1, 1, 1, 1, 1]
