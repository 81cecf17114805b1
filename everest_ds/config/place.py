"""Where this process stands in its run: its rank and its host, as the launcher says; one rank where there is none."""

from __future__ import annotations

import os
import re
import socket

# Between the ports of well-known services and those that Linux gives out by itself.
_FIRST_PORT, _PORTS = 20_000, 10_000


def rank() -> int:
    """This process's rank."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process's rank on its node."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Ranks of the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Ranks on this node: torchrun and DeepSpeed's launcher call it differently; all there are, if nothing says it."""
    return int(_stated_local_world_size() or world_size())


def says_too_little() -> bool:
    """Whether this rank can't be of one node alone, and nothing says how many the node has."""
    return rank() != local_rank() and not _stated_local_world_size()


def _stated_local_world_size() -> str | None:
    return os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")


def on_this_node() -> range:
    """Ranks of this node, which all launchers number one after another."""
    first = rank() - local_rank()
    return range(first, first + local_world_size())


def several_nodes() -> bool:
    """Whether the run has ranks on other nodes."""
    return len(on_this_node()) < world_size()


def host() -> str:
    """This node's name."""
    return socket.gethostname()


def speaker() -> str:
    """Return who says something, such as ``"[rank 3 on node2] "``; an empty string for a rank that is alone."""
    return f"[rank {rank()} on {host()}] " if world_size() > 1 else ""


def take_slurm_task() -> None:
    """Let a task of SLURM's ``srun`` be a rank, where no launcher has said what this process is.

    ``srun python run/pretrain.py`` and ``deepspeed --launcher slurm`` start the ranks themselves. A command that runs
    in a batch script, outside of ``srun``, is alone.
    """
    environment = os.environ
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in environment or tasks == "1":
        return
    on_node = _tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])[int(environment["SLURM_NODEID"])]
    environment.update(
        RANK=environment["SLURM_PROCID"],
        LOCAL_RANK=environment["SLURM_LOCALID"],
        WORLD_SIZE=tasks,
        LOCAL_WORLD_SIZE=str(on_node),
    )
    environment.setdefault("MASTER_ADDR", _first_host(environment["SLURM_STEP_NODELIST"]))
    environment.setdefault("MASTER_PORT", str(_FIRST_PORT + int(environment["SLURM_JOB_ID"]) % _PORTS))


def _tasks_per_node(listed: str) -> list[int]:
    """Read ``"8(x2),4"``: 8, 8 and 4 tasks."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", listed)
    return [int(tasks) for tasks, nodes in found for _ in range(int(nodes or 1))]


def _first_host(listed: str) -> str:
    """Read ``"rack[3-4]gpu[03-04,07],other1"``: rack3gpu03."""
    first = re.match(r"(?:[^\[,]|\[[^\]]*\])*", listed)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0] if first else listed)
