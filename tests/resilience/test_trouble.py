"""Full disks, videos that hang, decoding processes that are killed, checkpoints that are damaged."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from killing import Case, Running, assert_same_run, checkpoints, pretraining, steps_logged
from launching import ROOT, metrics
from video_files import silent_server

MANY = "train.keep_last=0"


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 6 MiB: room for one checkpoint of vit_micro, not for two."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk(motion_videos, small_disk, two_ranks, tmp_path):
    """The run says so, keeps what is there and goes on; at the end it says what to do, and nothing was lost."""
    case = pretraining(motion_videos, 9)
    settings = (MANY, "train.save_every_steps=3", "train.log_every_steps=1")
    two_ranks.succeed(*case.command(tmp_path / "straight", *settings))
    run_dir = small_disk / "run"
    done = two_ranks.run(*case.command(run_dir, *settings))
    assert done.returncode == 2, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert re.search(r"WARNING: the state after step 6 could not be saved \(.*No space left on device", done.stderr)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("pretrain: error: ")]
    assert "the state after step 9 could not be saved" in line
    assert "make room, and continue with --resume auto" in line
    assert checkpoints(run_dir) == ["step-00000003"]
    assert not list((run_dir / "checkpoints").glob(".unfinished-*"))
    assert len(metrics(run_dir)) == 9
    strict = two_ranks.run(*case.command(run_dir, *settings, "train.on_save_error=stop"))
    assert strict.returncode == 2
    assert steps_logged(run_dir) == [1, 2, 3, 4, 5, 6]
    # Room is made: here, by keeping one checkpoint.
    subprocess.run(["mount", "-o", "remount,size=40m", small_disk], check=True)
    two_ranks.succeed(*case.command(run_dir, *settings))
    assert_same_run(tmp_path / "straight", run_dir)


@pytest.fixture
def hanging() -> Iterator[str]:
    with silent_server() as url:
        yield url


def test_a_video_that_hangs_is_set_aside_for_good(motion_videos, hanging, tmp_path, two_ranks):
    """Its storage never answers. A pipe in place of a video is refused unopened."""
    pipe = tmp_path / "pipe.mp4"
    os.mkfifo(pipe)
    good = [str(motion_videos.parent / line.split(",")[0]) for line in motion_videos.read_text().split()[1:15]]
    manifest = tmp_path / "train.csv"
    manifest.write_text("\n".join([*good, hanging, str(pipe)]) + "\n")
    case = pretraining(manifest, 8)  # two epochs of 4 steps
    settings = ("data.timeout_s=2", "data.max_bad_share=0.5", "train.log_every_steps=1")
    done = two_ranks.run(*case.command(tmp_path / "run", *settings))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert f"{hanging} is set aside: no frames within data.timeout_s = 2 s" in done.stderr
    assert f"unreadable video {pipe}: not a file" in done.stderr
    lines = (tmp_path / "run/quarantine.jsonl").read_text().splitlines()
    assert 1 <= len(lines) <= 2  # by each rank at most once
    assert {json.loads(line)["video"] for line in lines} == {hanging}
    assert metrics(tmp_path / "run")[-1]["bad_samples"] >= 2
    again = two_ranks.run(*case.command(tmp_path / "run", *settings, "train.max_steps=16"))
    assert again.returncode == 0, again.stderr[-3000:]
    assert "is set aside: no frames" not in again.stderr
    assert (tmp_path / "run/quarantine.jsonl").read_text().splitlines() == lines


def test_killed_decoding_processes_change_nothing(motion_videos, tmp_path, two_ranks):
    case = pretraining(motion_videos, 60)
    two_ranks.succeed(*case.command(tmp_path / "straight"))
    running = Running(case.command(tmp_path / "run"), 2, tmp_path / "log.txt")
    try:
        for logged in (1, 5):
            assert running.wait_for(lambda least=logged: len(steps_logged(tmp_path / "run")) >= least)
            for worker in running.workers():
                with contextlib.suppress(psutil.NoSuchProcess):
                    worker.kill()
        assert running.wait(120) == 0, running.text()[-3000:]
    finally:
        running.kill()
    assert "a decoding process died (exit code -9)" in running.text()
    assert not (tmp_path / "run/quarantine.jsonl").exists()
    assert_same_run(tmp_path / "straight", tmp_path / "run")


def test_the_newest_checkpoint_is_damaged(motion_videos, tmp_path, two_ranks):
    """It is named, the one before is used, and the damaged one is kept beside its successor."""
    case = pretraining(motion_videos, 6)
    two_ranks.succeed(*case.command(tmp_path / "straight"))
    two_ranks.succeed(*case.command(tmp_path / "run"))
    part = next((tmp_path / "run/checkpoints/step-00000006").glob("part-00001-*"))
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    done = two_ranks.succeed(*case.command(tmp_path / "run"))
    assert f"step-00000006 is damaged ({part.name}: other content than was written (SHA-256))" in done.stderr
    assert "continuing " + str(tmp_path / "run/checkpoints/step-00000003") in done.stderr
    assert_same_run(tmp_path / "straight", tmp_path / "run")
    assert checkpoints(tmp_path / "run") == ["step-00000003", "step-00000006", "step-00000006.replaced-1"]


def in_small_shared_memory(size: str, *command: str) -> list[str]:
    """Let a Python command see a /dev/shm of its own, as a container does."""
    mount = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$0" "$@"'
    if subprocess.run(["unshare", "--mount", "sh", "-c", mount, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    return ["unshare", "--mount", "sh", "-c", mount, sys.executable, *command]


def start_alone(size: str, case: Case, run_dir: Path) -> Running:
    running = Running.__new__(Running)
    command = in_small_shared_memory(size, *case.command(run_dir, "data.workers=2", "data.prefetch=2"))
    running.begin(command, 1, run_dir.with_suffix(".txt"), ROOT)
    return running


def test_shared_memory_that_is_too_small_is_said_before_the_first_step(motion_videos, tmp_path):
    """A container has 64 MB of it; here less, for smaller clips."""
    running = start_alone("1m", pretraining(motion_videos, 100_000), tmp_path / "run")
    assert running.wait() == 2
    (line,) = [line for line in running.text().splitlines() if line.startswith("pretrain: error: ")]
    assert "through /dev/shm, which has 1.0 MiB, and this run takes up to 2.5 MiB by" in line
    assert "--shm-size=1g, lower data.prefetch or train.micro_batch, or set data.workers=0" in line
    assert "Traceback" not in running.text()
    assert steps_logged(tmp_path / "run") == []


def test_shared_memory_that_fills_later_ends_the_run_in_a_line(motion_videos, tmp_path):
    running = start_alone("8m", pretraining(motion_videos, 100_000), tmp_path / "run")
    try:
        assert running.wait_for(lambda: len(steps_logged(tmp_path / "run")) >= 2)
        with Path(f"/proc/{running.process.pid}/root/dev/shm/others").open("ab", buffering=0) as others:
            while running.process.poll() is None:
                try:
                    others.write(bytes(4096))
                except OSError:
                    time.sleep(0.0005)  # what a batch leaves is taken before the next one comes
    finally:
        running.kill()
    assert running.process.returncode == 2
    (line,) = [line for line in running.text().splitlines() if line.startswith("pretrain: error: ")]
    assert "no room is left for a batch in /dev/shm, where 0.0 MiB of 8.0 MiB is free" in line
    assert "Traceback" not in running.text()
