"""SIGTERM and SIGINT: the step ends, the run is saved, the exit code is 75; a second one ends it at once.

So does a launcher that is gone.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from killing import Running, assert_same_run, checkpoints, orphans, pretraining, steps_logged
from launching import ROOT, launcher

from everest_ds.training.preemption import StopRequest

FAR = ("train.save_every_steps=0",)  # only a request saves
STEPS = 120


@pytest.fixture(scope="module")
def straight(motion_videos, two_ranks, tmp_path_factory):
    """A run that nothing happens to."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    two_ranks.succeed(*pretraining(motion_videos, STEPS).command(folder, *FAR))
    return folder


def test_one_rank_is_asked_and_all_save(motion_videos, tmp_path, two_ranks, straight):
    """As schedulers do that signal some processes first; then the same command ends like a straight run."""
    case = pretraining(motion_videos, STEPS)
    asked = tmp_path / "asked"
    running = Running(case.command(asked, *FAR), 2, tmp_path / "log.txt")
    try:
        assert running.wait_for(lambda: len(steps_logged(asked)) >= 2)
        running.ranks()[1].send_signal(signal.SIGTERM)
        assert running.wait(60) == 75
    finally:
        running.kill()
    text = running.text()
    assert "asked to stop" in text
    assert "Traceback" not in text
    (saved,) = checkpoints(asked)
    assert 5 <= int(saved[5:]) < STEPS
    assert not (asked / "model.safetensors").exists()
    two_ranks.succeed(*case.command(asked, *FAR))
    assert_same_run(straight, asked)


def test_ctrl_c_saves(motion_videos, tmp_path):
    """In a terminal the signal reaches the launcher and everything that it started, and then the launcher's SIGTERM."""
    case = pretraining(motion_videos, 100_000)
    running = Running(case.command(tmp_path, *FAR), 2, tmp_path / "log.txt")
    try:
        assert running.wait_for(lambda: len(steps_logged(tmp_path)) >= 2)
        os.killpg(running.process.pid, signal.SIGINT)
        assert running.wait(60) != 0  # the launcher's own code, whatever its ranks say
    finally:
        running.kill()
    text = running.text()
    # Of two signals that wait for a process the later one's handler runs first: a busy machine shows SIGTERM.
    assert re.search("SIG(INT|TERM): ending this step, then saving; once more to end at once", text)
    assert 'run/pretrain.py", line' not in text  # the launcher's own trace is not ours to avoid
    assert len(checkpoints(tmp_path)) == 1
    assert (tmp_path / "checkpoints/latest").read_text() == checkpoints(tmp_path)[0]


def wait_until_nothing_is_left(run_dir: Path, running: Running, *, within_s: float) -> None:
    """Wait for the end of all processes of a run, whatever has become of its launcher."""
    deadline = time.monotonic() + within_s
    while left := orphans(run_dir):
        assert time.monotonic() < deadline, f"still there: {left}: {running.text()[-3000:]}"
        time.sleep(0.1)


@pytest.mark.parametrize(
    "end",
    [
        ("deepspeed.launcher.runner", signal.SIGTERM),
        ("deepspeed.launcher.runner", signal.SIGINT),
        ("deepspeed.launcher.runner", signal.SIGKILL),
        ("deepspeed.launcher.launch", signal.SIGKILL),
    ],
)
def test_ranks_whose_launcher_is_gone_save_and_end(motion_videos, tmp_path, two_ranks, straight, end):
    """The first one is the command deepspeed, which asks nobody to stop; the second is its process on each node."""
    whose, number = end
    case = pretraining(motion_videos, STEPS)
    run_dir = tmp_path / "run"
    running = Running(case.command(run_dir, *FAR), 2, tmp_path / "log.txt")
    try:
        assert running.wait_for(lambda: len(steps_logged(run_dir)) >= 2)
        family = [running.ranks()[0].parent().parent(), running.ranks()[0].parent()]
        (launching,) = [process for process in family if whose in process.cmdline()]
        launching.send_signal(number)
        wait_until_nothing_is_left(run_dir, running, within_s=30)
    finally:
        running.kill()
    # Said by the first rank, if it has noticed before another one has stopped all.
    assert "asked to stop" in running.text()
    assert "exits with return code = -" not in running.text()
    (saved,) = checkpoints(run_dir)
    assert 5 <= int(saved[5:]) < STEPS
    two_ranks.succeed(*case.command(run_dir, *FAR))
    assert_same_run(straight, run_dir)


def test_ctrl_c_in_a_pipeline_saves(motion_videos, tmp_path):
    """Whoever reads what the run prints goes at once."""
    case = pretraining(motion_videos, 100_000)
    line = shlex.join([sys.executable, *launcher(2), *case.command(tmp_path, *FAR, "train.log_every_steps=1")])
    running = Running.__new__(Running)
    running.begin(["bash", "-c", f"{line} 2>&1 | cat"], 2, tmp_path / "log.txt", ROOT)
    try:
        assert running.wait_for(lambda: len(steps_logged(tmp_path)) >= 2)
        os.killpg(running.process.pid, signal.SIGINT)
        wait_until_nothing_is_left(tmp_path, running, within_s=60)
    finally:
        running.kill()
    assert len(checkpoints(tmp_path)) == 1


def test_a_second_request_ends_it_at_once(motion_videos, tmp_path):
    """Here, of a process that can't end its step: its fellow rank is stopped."""
    case = pretraining(motion_videos, 100_000)
    running = Running(case.command(tmp_path, *FAR), 2, tmp_path / "log.txt")
    try:
        assert running.wait_for(lambda: len(steps_logged(tmp_path)) >= 2)
        first, second = running.ranks()
        second.suspend()
        first.send_signal(signal.SIGTERM)
        time.sleep(2.5)  # closer together, two signals are one request
        assert first.is_running()
        first.send_signal(signal.SIGTERM)
        first.wait(10)
        second.resume()
        assert running.wait(60) != 0
    finally:
        running.kill()
    assert checkpoints(tmp_path) == []


@pytest.mark.parametrize("parent", [0, os.getppid()])
def test_ranks_that_can_not_be_seen_are_not_taken_for_gone(monkeypatch, parent):
    """The first process of a container sees no parent; a parent may have started something else than ranks."""
    monkeypatch.setattr(os, "getppid", lambda: parent)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    with StopRequest() as stop:
        assert stop._all_here()


def test_a_rank_that_is_gone_is_missed(monkeypatch):
    sleeping = subprocess.Popen(["sleep", "60"])
    monkeypatch.setattr(os, "getppid", os.getpid)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(len(psutil.Process().children())))
    with StopRequest() as stop:
        assert stop._all_here()
        sleeping.kill()
        sleeping.wait()
        assert not stop._all_here()
