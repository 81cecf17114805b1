"""SIGKILL at random moments, then the same command again: the run ends as if nothing had happened, to the last bit.

``make soak`` does it many times over (``SOAK_KILLS``, ``SOAK_SEED``).
"""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path

import pytest
from killing import Case, Running, assert_same_run, finetuning, kill_at, moments, orphans, pretraining
from launching import DS_CONFIGS, Console

KILLS, SEED = 3, 11
SOAK_KILLS, SOAK_SEED = int(os.environ.get("SOAK_KILLS", "12")), int(os.environ.get("SOAK_SEED", "1"))
# A rank that dies takes the others with it, and the launcher, within:
LONGEST_END_S = 60


def survive(case: Case, folder: Path, kills: int, seed: int) -> int:
    """Kill a run ``kills`` times and let it end; returns how many kills hit."""
    run_dir, log = folder / "killed", folder / "log.txt"
    draw, hits = random.Random(seed), 0
    for moment in moments(seed, kills):
        running = Running(case.command(run_dir), 2, log)
        try:
            hit = kill_at(moment, running, run_dir, draw)
            start = time.monotonic()
            code = running.wait(LONGEST_END_S if hit else 300)
        finally:
            running.kill()
        print(f"{moment}: exit code {code} after {time.monotonic() - start:.1f} s", flush=True)
        assert (code != 0) == hit, running.text()[-3000:]
        assert orphans(run_dir) == []
        assert running.left_behind() == []
        hits += hit
    assert Running(case.command(run_dir), 2, log).wait(600) == 0, log.read_text(errors="replace")[-5000:]
    assert "Traceback" not in log.read_text(errors="replace")
    return hits


def test_a_killed_run_ends_like_one_that_was_not(motion_videos, tmp_path, two_ranks: Console):
    case = pretraining(motion_videos, steps=60)
    two_ranks.succeed(*case.command(tmp_path / "straight"))
    assert survive(case, tmp_path, KILLS, SEED) == KILLS
    assert_same_run(tmp_path / "straight", tmp_path / "killed")


def in_bf16(folder: Path, name: str) -> Path:
    file = folder / f"{name}-bf16.json"
    ds = json.loads((DS_CONFIGS / f"{name}.json").read_text())
    file.write_text(json.dumps(ds | {"bf16": {"enabled": True}}))
    return file


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pretraining-zero2", "pretraining-zero3-bf16", "finetuning-zero1-bf16"])
def test_soak(kind, motion_videos, tmp_path, two_ranks: Console):
    phase, ds, *precision = kind.split("-")
    file = in_bf16(tmp_path, ds) if precision else DS_CONFIGS / f"{ds}.json"
    make = {"pretraining": pretraining, "finetuning": finetuning}[phase]
    case = make(motion_videos, 20 * SOAK_KILLS, file)
    two_ranks.succeed(*case.command(tmp_path / "straight"), timeout_s=900)
    hits = survive(case, tmp_path, SOAK_KILLS, SOAK_SEED)
    assert_same_run(tmp_path / "straight", tmp_path / "killed")
    print(f"{kind}: {hits} kills survived, ended bit-identical", flush=True)
