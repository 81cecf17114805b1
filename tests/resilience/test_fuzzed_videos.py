"""Damaged copies of real videos, read as training reads them: none crashes, none hangs, every good one is used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fuzzed_videos import KINDS, write_fuzzed
from launching import run

from everest_ds.data.manifest import Entry, format_manifest

LIMIT_S = 240


@pytest.mark.parametrize(("count", "seed"), [(500, 1), pytest.param(4000, 3, marks=pytest.mark.slow)])
def test_damaged_videos_are_read_or_named(tmp_path: Path, count: int, seed: int) -> None:
    files = write_fuzzed(tmp_path, count, seed=seed)
    assert {kind for _, kind in files} == set(KINDS)
    manifest, result = tmp_path / "train.csv", tmp_path / "result.json"
    manifest.write_text(format_manifest([Entry(str(path), None) for path, _ in files]))
    done = run("tests/read_videos.py", manifest, result, timeout_s=LIMIT_S)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    found = json.loads(result.read_text())
    used = {files[index].path for index in found["used"]}
    bad = {Path(path): reason for path, reason in found["bad"].items()}
    for path, kind in files:
        assert path in used if kind == "untouched" else path in used or bad.get(path), path
    assert all(0 < len(reason) <= 200 and "\n" not in reason for reason in bad.values())
    # Damage of every other kind makes some file unreadable, or the kind is no damage.
    assert len(bad) > count / 10
    assert len(used) > count / 10


def test_the_same_seed_makes_the_same_files(tmp_path: Path) -> None:
    """So that a file that crashed a decoder can be made again."""
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    one, two = (write_fuzzed(tmp_path / folder, 24, seed=3) for folder in ("one", "two"))
    assert [file.path.read_bytes() for file in one] == [file.path.read_bytes() for file in two]
    assert [file.path.name for file in one] == [file.path.name for file in two]
