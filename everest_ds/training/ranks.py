"""The process group: who we are, on what device, and how ranks agree."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from everest_ds.config.errors import UserError
from everest_ds.training.ops import missing_compiler, own_ninja_first

log = logging.getLogger(__name__)

_SHARED_MEMORY_OP = "deepspeed_shm_comm"
# A rank may wait this long for another that saves, validates, or reads slow videos. One that died is known at once.
_PATIENCE = datetime.timedelta(minutes=30)
# The launcher reports the first rank that it sees ended: a rank that ended for another's sake lets that one be first.
CAUSE_FIRST_S = 3.0
_control: Any = None


# What gloo says of a rank that is gone.
_LOST = ("onnection closed by peer", "onnection reset by peer", "onnection refused", "Broken pipe", "Timed out waiting")


class LostRankError(UserError):
    """Another rank of the run is gone: not a mistake, but nothing that a trace would explain."""

    exit_code = 1


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
    if on_cpu():
        _unlink_shared_memory()
    # gloo would go by the host's name, which often stands for the loopback interface.
    interface = os.environ.get("NCCL_SOCKET_IFNAME", "")
    if interface.isalnum():  # a name, not a pattern
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    # Among the hosts, by gloo: for what they agree on between steps. On a GPU the other group's messages are its own.
    global _control  # noqa: PLW0603 - one process group per process, as torch has it
    _control = dist.new_group(backend="gloo", timeout=_PATIENCE)
    atexit.register(dist.destroy_process_group)
    if not on_cpu():
        get_accelerator().set_device(local_rank())
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world_size()))


def any_rank(flag: bool) -> bool:
    """Say whether any rank's flag is set: the hosts meet, no device is waited for."""
    if not dist.is_initialized():
        return flag
    flags = torch.tensor([int(flag)])
    dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=_control)
    return bool(flags.item())


def gather(value: Any) -> list[Any]:
    """Return every rank's value, in order of ranks: the hosts meet, no device is waited for."""
    if not dist.is_initialized():
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value, group=_control)
    return found


def lost_contact(error: BaseException) -> bool:
    """Say whether an error means that another rank is gone."""
    text = str(error)
    return isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistError) or any(sign in text for sign in _LOST)
    )


@contextlib.contextmanager
def explaining_loss() -> Iterator[None]:
    """Turn the error of a rank that waits for one that is gone into one line.

    Raises:
        LostRankError: another rank is gone.
    """
    try:
        yield
    except RuntimeError as error:
        if not lost_contact(error):
            raise
        time.sleep(CAUSE_FIRST_S)
        raise LostRankError(f"rank {rank()} lost contact with another rank, which has ended") from error


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


def _unlink_shared_memory() -> None:
    """Take the names of DeepSpeed's shared memory away, now that every rank has mapped it.

    A killed rank would leave 66 MiB of /dev/shm behind, and the next run on the same port could begin with the flags
    that the last one left in it.
    """
    dist.barrier()
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}_{rank()}"
    Path("/dev/shm", name).unlink(missing_ok=True)


def _prepare_cpu_communication() -> None:
    """Without a compiler, leave all-reduce to gloo: building DeepSpeed's own would end in a page of trace."""
    missing = missing_compiler()
    if missing:
        deepspeed.ops.__compatible_ops__[_SHARED_MEMORY_OP] = False
        if is_main():
            log.warning("DeepSpeed's shared-memory all-reduce is off, gloo is used: %s", missing)
