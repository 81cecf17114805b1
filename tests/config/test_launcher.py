"""Which of the processes that started this one are launchers."""

import psutil
import pytest

from everest_ds.config import launcher

PYTHON = "/opt/env/bin/python3.12"
LAUNCH = [PYTHON, "-u", "-m", "deepspeed.launcher.launch", "--world_info=e30=", "run/pretrain.py"]


class Process:
    """One that has a command line, and the one that started it."""

    def __init__(self, pid, line, parent=None):
        self.pid, self._line, self._parent = pid, line, parent

    def cmdline(self):
        if self._line is None:
            raise psutil.AccessDenied(self.pid)
        return self._line

    def name(self):
        return self._line[0].rpartition("/")[2]

    def parent(self):
        return self._parent

    def ppid(self):
        return self._parent.pid


def chain(*lines):
    """Return the lines that are followed, of processes from the first to the one that started the rank."""
    parent = Process(1, ["init"])
    for number, line in enumerate(lines, 2):
        parent = Process(number, line, parent)
    found = launcher._launchers(Process(99, [PYTHON, "run/pretrain.py"], parent))
    return [process.cmdline() for process, _ in found]


@pytest.mark.parametrize(
    "line",
    [
        [PYTHON, "/opt/env/bin/torchrun", "--nproc-per-node", "2", "run/pretrain.py"],
        [PYTHON, "-m", "torch.distributed.run", "run/pretrain.py"],
        ["slurmstepd: [123.0]"],
        ["mpirun", "-np", "2", PYTHON, "run/pretrain.py"],
    ],
)
def test_what_waits_for_its_ranks_is_followed(line):
    assert chain(["bash"], line) == [line]


def test_both_of_deepspeeds_are_followed_and_the_shell_is_not():
    command = [PYTHON, "/opt/env/bin/deepspeed", "run/pretrain.py"]
    assert chain(["bash", "-c", "deepspeed run/pretrain.py"], command, LAUNCH) == [LAUNCH, command]


@pytest.mark.parametrize(
    "line",
    [
        ["bash", "-c", "nohup torchrun run/pretrain.py & sleep 9"],
        ["bash", "-c", "torchrun run/pretrain.py"],
        ["sh", "torchrun"],
        [PYTHON, "sweep.py", "torchrun"],
        ["-zsh"],
        [],
        None,
    ],
)
def test_what_may_end_before_is_not(line):
    assert chain(line) == []
    assert chain(line, LAUNCH) == [LAUNCH]


def test_the_process_that_is_gone_is_named(monkeypatch):
    command = Process(2, [PYTHON, "/opt/env/bin/deepspeed"], Process(1, ["init"]))
    launch = Process(3, LAUNCH, command)
    followed = [(launch, "launch"), (command, "command")]
    monkeypatch.setattr(launcher.os, "getppid", lambda: 3)
    assert launcher._gone(followed) == ""
    launch._parent = Process(1, ["init"])
    assert launcher._gone(followed) == "command"
    monkeypatch.setattr(launcher.os, "getppid", lambda: 1)
    assert launcher._gone(followed) == "launch"
