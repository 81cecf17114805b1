"""docs/slurm.sbatch, run as SLURM runs it: SIGTERM to the script, and the job is queued again."""

import os
import shutil
import signal
import stat
import subprocess
import sys
import time

import pytest
from killing import START_S, checkpoints, pretraining, steps_logged
from launching import ROOT, environment

# One node of two tasks, with the variables that srun sets.
SRUN = """
while [[ $1 == --* ]]; do shift; done
export SLURM_STEP_NUM_TASKS=2 SLURM_STEP_TASKS_PER_NODE=2 SLURM_STEP_NODELIST=localhost SLURM_NODEID=0
for task in 0 1; do
  SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
  tasks[$task]=$!
done
echo "${tasks[@]}" > "$STARTED"
wait "${tasks[1]}"
wait "${tasks[0]}"
"""


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_the_script_hands_the_signal_on_and_queues_the_job_again(motion_videos, tmp_path):
    called, tasks = tmp_path / "called", tmp_path / "tasks"
    scripts = {
        "scontrol": f'echo "$@" > {called}',
        "scancel": f'[ "$*" = "--signal=TERM 123" ] && kill -TERM $(cat {tasks})',
        "srun": SRUN,
    }
    for name, line in scripts.items():
        script = tmp_path / name
        script.write_text(f"#!/bin/bash\n{line}\n")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
    paths = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    variables = {"PATH": paths, "PYTHON": sys.executable, "SLURM_JOB_ID": "123", "STARTED": str(tasks)}
    run_dir = tmp_path / "run"
    command = pretraining(motion_videos, 100_000).command(run_dir, "train.save_every_steps=0")
    assert command[-3:-1] == ["--resume", "auto"]  # the script says it, too: the later one counts
    with (tmp_path / "log.txt").open("wb") as log:
        job = subprocess.Popen(
            ["bash", ROOT / "docs/slurm.sbatch", *command],
            cwd=ROOT,
            env=environment(2) | variables,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_S
        while len(steps_logged(run_dir)) < 2:
            text = (tmp_path / "log.txt").read_text(errors="replace")[-3000:]
            assert job.poll() is None, text
            assert time.monotonic() < deadline, text
            time.sleep(0.1)
        job.send_signal(signal.SIGTERM)
        assert job.wait(60) == 75
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert "x ranks 2;" in (tmp_path / "log.txt").read_text(errors="replace")
    assert called.read_text() == "requeue 123\n"
    assert len(checkpoints(run_dir)) == 1
