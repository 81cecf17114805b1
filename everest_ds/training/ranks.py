"""The process group: who we are, on what device, and how ranks agree."""

from __future__ import annotations

import atexit
import logging
import os
import socket

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from everest_ds.training.ops import missing_compiler, own_ninja_first

log = logging.getLogger(__name__)

_SHARED_MEMORY_OP = "deepspeed_shm_comm"


def start() -> None:
    """Join the launcher's process group, or make one of a single rank when there is no launcher.

    Does nothing if that was done before; the group is left when the process ends.
    """
    if dist.is_initialized():
        return
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone, MASTER_PORT=str(free_port()))
    own_ninja_first()
    if on_cpu():
        _prepare_cpu_communication()
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    atexit.register(dist.destroy_process_group)
    if not on_cpu():
        get_accelerator().set_device(local_rank())
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world_size()))


def free_port() -> int:
    """Return a TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def on_cpu() -> bool:
    """Whether the accelerator is the CPU."""
    return get_accelerator().device_name() == "cpu"


def device() -> torch.device:
    """This rank's device."""
    return torch.device(get_accelerator().device_name(local_rank()) if not on_cpu() else "cpu")


def rank() -> int:
    """This process's rank, also before the group exists."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process's rank on its node."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Ranks of the run, also before the group exists."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Ranks on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size())


def is_main() -> bool:
    """Whether this rank writes files and speaks."""
    return rank() == 0


def _prepare_cpu_communication() -> None:
    """Without a compiler, leave all-reduce to gloo: building DeepSpeed's own would end in a page of trace."""
    missing = missing_compiler()
    if missing:
        deepspeed.ops.__compatible_ops__[_SHARED_MEMORY_OP] = False
        if is_main():
            log.warning("DeepSpeed's shared-memory all-reduce is off, gloo is used: %s", missing)
