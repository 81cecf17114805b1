"""SIGTERM and SIGINT: the step ends, the run is saved, the exit code is 75; a second one ends it at once."""

import os
import signal
import time

from killing import Running, assert_same_run, checkpoints, pretraining, steps_logged

FAR = ("train.save_every_steps=0",)  # only a request saves


def test_one_rank_is_asked_and_all_save(motion_videos, tmp_path, two_ranks):
    """As schedulers do that signal some processes first; then the same command ends like a straight run."""
    case = pretraining(motion_videos, 120)
    two_ranks.succeed(*case.command(tmp_path / "straight", *FAR))
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
    assert 5 <= int(saved[5:]) < 120
    assert not (asked / "model.safetensors").exists()
    two_ranks.succeed(*case.command(asked, *FAR))
    assert_same_run(tmp_path / "straight", asked)


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
    assert "SIGINT: ending this step, then saving; once more to end at once" in text
    assert 'run/pretrain.py", line' not in text  # the launcher's own trace is not ours to avoid
    assert len(checkpoints(tmp_path)) == 1
    assert (tmp_path / "checkpoints/latest").read_text() == checkpoints(tmp_path)[0]


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
