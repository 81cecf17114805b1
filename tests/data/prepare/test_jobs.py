from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from everest_ds.data.prepare.jobs import Lost, run


def work(item: str) -> str:
    """What a file can do to the process that reads it."""
    kind, _, rest = item.partition(" ")
    if kind == "open":
        # A pipe that nobody writes to.
        return Path(rest).read_text()
    if kind == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == "exit":
        os._exit(7)
    if kind == "raise":
        raise ValueError(rest)
    return item.upper()


def outcomes(items: list[str], workers: int = 2, limit_s: float = 30) -> dict[str, str | Lost]:
    return dict(run(work, items, workers=workers, limit_s=limit_s))


def test_every_item_has_its_result() -> None:
    assert outcomes(list("abcdefg"), workers=3) == {letter: letter.upper() for letter in "abcdefg"}
    assert outcomes([]) == {}


def test_what_hangs_or_crashes_is_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    hangs = f"open {tmp_path / 'pipe'}"
    found = outcomes([hangs, "crash", "a", "exit", "b"], limit_s=2)
    assert found == {
        hangs: Lost("took longer than 2 s"),
        "crash": Lost("the process that read it died (SIGSEGV)"),
        "exit": Lost("the process that read it died (exit code 7)"),
        "a": "A",
        "b": "B",
    }


def test_an_error_of_ours_is_raised_with_its_trace() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)in work.*ValueError: mine"):
        outcomes(["raise mine"])


def test_processes_end_with_the_loop(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    results = run(work, ["a", f"open {tmp_path / 'pipe'}"], workers=2, limit_s=1000)
    assert next(results) == ("a", "A")
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    assert len(children.read_text().split()) >= 1
    results.close()
    # The resource tracker of multiprocessing stays.
    named = [Path(f"/proc/{pid}/cmdline").read_text() for pid in children.read_text().split()]
    assert not any("spawn_main" in name for name in named)


def test_processes_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    """Or they would write what the next call is writing."""
    tasks = tmp_path / "tasks.py"
    tasks.write_text(
        "import os, pathlib, sys, time\n"
        "from everest_ds.data.prepare.jobs import run\n"
        "def work(item):\n"
        "    pathlib.Path(item).write_text(str(os.getpid()))\n"
        "    time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        "    list(run(work, [sys.argv[1]], workers=1, limit_s=1000))\n"
    )
    begun = tmp_path / "begun"
    with subprocess.Popen([sys.executable, tasks, begun]) as parent:
        wait_for(lambda: begun.exists() and begun.read_text())
        parent.kill()
    wait_for(lambda: not Path(f"/proc/{begun.read_text()}").exists())


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_limit_may_be_longer_than_the_system_can_wait() -> None:
    assert outcomes(["a"], limit_s=3e6) == {"a": "A"}


def test_a_process_that_can_not_start_is_no_file_s_fault() -> None:
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="before it could work"):
        list(run(Unloadable(), ["a"], workers=1, limit_s=1000))
    assert time.monotonic() - started < 900


class Unloadable:
    """A task that a new process can't unpickle."""

    def __call__(self, item: str) -> str:
        return item

    def __reduce__(self) -> tuple:
        return os._exit, (3,)
