"""The processes that started this rank. When they are gone, nobody else would ever end it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import PurePath

import psutil

_LOOK_EVERY_S = 1.0
# DeepSpeed's process on each node; who started that (the deepspeed command, or a shell of ssh's) waits for it, too.
_ON_EACH_NODE = "deepspeed.launcher.launch"
# All that start ranks and wait for them: DeepSpeed, torchrun, SLURM, Open MPI, MPICH. A shell may end before them.
_LAUNCHERS = {
    _ON_EACH_NODE,
    *("torchrun", "torch.distributed.run", "torch.distributed.launch", "slurmstepd:"),
    *("mpirun", "mpiexec", "orterun", "orted", "prterun", "prted", "hydra_pmi_proxy"),
}
_FIRST_WORDS = 4  # of a command line: python -u -m deepspeed.launcher.launch

_tell: Callable[[str], None] | None = None
_follower: threading.Thread | None = None


def follow_launcher() -> None:
    """Look every second, in a thread, whether the launcher is still there, if one started this process.

    Once it isn't, whoever :func:`when_gone` named is told; else this process gets SIGTERM. Call it early: a launcher
    that is gone already can't be told from none.
    """
    global _follower  # noqa: PLW0603 - a process is started once
    if _follower is None and (chain := _launchers(psutil.Process())):
        _follower = threading.Thread(target=_follow, args=(chain,), name="follow-launcher", daemon=True)
        _follower.start()


def when_gone(tell: Callable[[str], None] | None) -> None:
    """Let a function hear, in another thread, which process is gone; None: let this process get SIGTERM."""
    global _tell  # noqa: PLW0603 - as above
    _tell = tell


def _launchers(process: psutil.Process) -> list[psutil.Process]:
    """Return the processes that started this one and wait for it, nearest first."""
    found: list[psutil.Process] = []
    try:
        while parent := process.parent():
            below_deepspeed = found and _ON_EACH_NODE in " ".join(process.cmdline())
            if not (below_deepspeed or _is_launcher(parent)):
                break
            found.append(parent)
            process = parent
    except psutil.Error:
        pass  # it is gone, or another user's
    return found


def _is_launcher(process: psutil.Process) -> bool:
    words = " ".join(process.cmdline()[:_FIRST_WORDS]).split()[:_FIRST_WORDS]
    return any(PurePath(word).name in _LAUNCHERS for word in words)


def _follow(chain: list[psutil.Process]) -> None:
    named = [(process, f"process {process.pid} ({process.name()})") for process in chain]
    while not (gone := _gone(named)):
        time.sleep(_LOOK_EVERY_S)
    if _tell is None:
        os.kill(os.getpid(), signal.SIGTERM)
    else:
        _tell(gone)


def _gone(named: list[tuple[psutil.Process, str]]) -> str:
    """Name the process that is gone. What it has started gets another parent at once, while it may be a zombie yet."""
    parent = os.getppid()
    for process, name in named:
        if parent != process.pid:
            return name
        try:
            parent = process.ppid()
        except psutil.NoSuchProcess:
            return name
    return ""
