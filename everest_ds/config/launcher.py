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
# What starts ranks and waits for them: DeepSpeed (the command, and its process on each node), torchrun, SLURM, Open MPI
# and MPICH. Not shells: one may end long before what it has started.
_LAUNCHERS = {
    *("deepspeed", "ds", "deepspeed.launcher.runner", "deepspeed.launcher.launch"),
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


def _launchers(process: psutil.Process) -> list[tuple[psutil.Process, str]]:
    """Return the processes that started this one and wait for it, nearest first, and what to call them."""
    found: list[tuple[psutil.Process, str]] = []
    try:
        while (parent := process.parent()) and _is_launcher(parent):
            found.append((parent, f"process {parent.pid} ({parent.name()})"))
            process = parent
    except psutil.Error:
        pass  # it is gone, or another user's
    return found


def _is_launcher(process: psutil.Process) -> bool:
    # A program may set its own line, as slurmstepd does: one word with blanks.
    line = " ".join(process.cmdline()[:_FIRST_WORDS]).split()
    if not line:
        return False
    if PurePath(line[0]).name in _LAUNCHERS:
        return True
    # Python's script, or the module after -m.
    script = next((word for word in line[1:] if not word.startswith("-")), "")
    return PurePath(line[0]).name.startswith("python") and PurePath(script).name in _LAUNCHERS


def _follow(chain: list[tuple[psutil.Process, str]]) -> None:
    while not (gone := _gone(chain)):
        time.sleep(_LOOK_EVERY_S)
    if _tell is None:
        os.kill(os.getpid(), signal.SIGTERM)
    else:
        _tell(gone)


def _gone(chain: list[tuple[psutil.Process, str]]) -> str:
    """Name the process that is gone. What it has started gets another parent at once, while it may be a zombie yet."""
    parent = os.getppid()
    for process, name in chain:
        if parent != process.pid:
            return name
        try:
            parent = process.ppid()
        except psutil.NoSuchProcess:
            return name
        except (psutil.Error, OSError):
            break  # nothing can be told now
    return ""
