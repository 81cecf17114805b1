"""The process group: who we are, on what device, and how ranks agree."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
import re
import socket
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import deepspeed
import psutil
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.distributed import distributed_c10d

from everest_ds.config.errors import RankError, UserError, shortened
from everest_ds.config.place import (
    host,
    local_rank,
    local_world_size,
    on_this_node,
    rank,
    says_too_little,
    several_nodes,
    world_size,
)
from everest_ds.training.ops import own_ninja_first

_SHARED_MEMORY_OP = "deepspeed_shm_comm"
# A rank may wait this long for another that saves, validates, or reads slow videos. One that died is known at once.
_PATIENCE = datetime.timedelta(minutes=30)
# Within this, ranks come to what ends them all.
_TOGETHER = datetime.timedelta(seconds=5)
_LONGEST_REASON = 300
# What gloo says of a rank that is gone, and of where it was.
_LOST = ("onnection closed by peer", "onnection reset by peer", "onnection refused", "Broken pipe", "Timed out waiting")
_PEER = re.compile(r"\[([0-9a-fA-F.:]+)\]:\d+")

Found = TypeVar("Found")

_control: Any = None
_nodes: list[tuple[str, str]] = []  # of each rank: its host and its address


class LostRankError(UserError):
    """Another rank of the run is gone: not a mistake, but nothing that a trace would explain."""

    exit_code = 1
    # The launcher reports the first rank that it sees ended, and ends the others: let it be the one with a reason.
    linger_s = 3.0


def start() -> None:
    """Join the launcher's process group, or make one of a single rank when there is no launcher.

    Does nothing if that was done before; the group is left when the process ends.

    Raises:
        UserError: the launcher doesn't say where a rank is, or a rank doesn't see its GPU.
    """
    if dist.is_initialized():
        return
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone, MASTER_PORT=str(free_port()))
    if says_too_little():
        raise UserError("the launcher doesn't say how many ranks a node has: set LOCAL_RANK and LOCAL_WORLD_SIZE")
    own_ninja_first()
    address = _choose_interface()
    attach_deepspeed()
    # Among the hosts, by gloo: for what they agree on between steps. On a GPU the other group's messages are its own.
    global _control  # noqa: PLW0603 - one process group per process, as torch has it
    _control = dist.new_group(backend="gloo", timeout=_PATIENCE)
    _nodes[:] = gather((host(), address))
    atexit.register(dist.destroy_process_group)
    if not on_cpu():
        seen = get_accelerator().device_count()
        if local_rank() >= seen:
            raise UserError(f"rank {local_rank()} of its node sees {seen} GPUs: let each rank see all of the node's")
        get_accelerator().set_device(local_rank())
        # Tokens are scored by products in fp16, whose sums are to stay in fp32 when a kernel splits them, too.
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world_size()))


def attach_deepspeed() -> None:
    """Let DeepSpeed send through torch's process group, which it makes if there is none."""
    if on_cpu():
        # Built and started on every CPU, 66 MiB a rank that a killed one leaves behind, and used in inference alone:
        # training sums through gloo (DeepSpeed comm/torch.py).
        deepspeed.ops.__compatible_ops__[_SHARED_MEMORY_OP] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


class LostNodeError(LostRankError, RankError):
    """It was on another node. Whoever meets it speaks: the others of this node may only see that one end."""


@contextlib.contextmanager
def naming_the_lost() -> Iterator[None]:
    """Turn what torch says when another rank is gone into a :class:`LostRankError`, which says where that was."""
    try:
        yield
    except RuntimeError as error:
        if not lost_contact(error):
            raise
        if not _nodes:
            reason = shortened(str(error), _LONGEST_REASON)
            raise LostRankError(f"found no way to the other ranks ({reason}); see docs/multi-node.md") from error
        if place := _elsewhere(str(error)):
            raise LostNodeError(f"lost contact with {place}, which has ended") from error
        raise LostRankError("lost contact with another rank, which has ended") from error


def all_end() -> bool:
    """Say whether what ends this rank ends the others, too; for a rank that ends, and needs no answer of the others.

    The store is what a rank may give up waiting at: a collective that one is missing from keeps a process from ending.
    """
    if not dist.is_initialized():
        return True
    store = distributed_c10d._get_default_store()
    keys = [f"everest_ds/ended/{number}" for number in range(world_size())]
    try:
        store.set(keys[rank()], "")
        store.wait(keys, _TOGETHER)
    except RuntimeError:  # not in time, or the rank that keeps the store has ended
        return False
    return True


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
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value, group=_control)
    return found


def from_rank_0(work: Callable[[], Found]) -> Found:
    """Let rank 0 do something; return on every rank what came of it there.

    A collective call, for which the ranks join their group.

    Raises:
        UserError: rank 0 met one; every rank ends with it.
    """
    found, problem = None, None
    with naming_the_lost():
        start()
        if is_main():
            try:
                found = work()
            except UserError as error:
                problem = str(error)
        found, problem = gather((found, problem))[0]
    if problem is not None:
        raise UserError(problem)
    return cast("Found", found)


def host_of(number: int) -> str:
    """Return the name of the node that a rank is on."""
    return _nodes[number][0]


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


def device_name(index: int | None = None) -> str:
    """The model of a device, None for this rank's: "cpu", or as its driver has it ("NVIDIA H100 80GB HBM3")."""
    if on_cpu():
        return "cpu"
    module: Any = torch.get_device_module(get_accelerator().device_name())
    return str(module.get_device_name(local_rank() if index is None else index))


def is_main() -> bool:
    """Whether this rank writes files and speaks."""
    return rank() == 0


def lost_contact(error: BaseException) -> bool:
    """Say whether an error of torch's means that another rank is gone."""
    text = str(error)
    if "out of memory" in text:  # NCCL's own, which is a DistError
        return False
    return isinstance(error, dist.DistError) or any(sign in text for sign in _LOST)


def _elsewhere(text: str) -> str:
    """Name the node whose address gloo's message shows, and its ranks, which all have that; "" if it is this one."""
    peer = _PEER.search(text)
    there = [number for number, (_, address) in enumerate(_nodes) if peer and address == peer[1]]
    if not there or there[0] in on_this_node():
        return ""
    return f"{host_of(there[0])} (rank{'s' if there[1:] else ''} {', '.join(map(str, there))})"


def _choose_interface() -> str:
    """Let gloo use NCCL's interface, or the one that leads to rank 0's node. Returns this node's address there.

    By itself it goes by the host's name, which often stands for the loopback interface.
    """
    if not several_nodes():
        return ""
    address, interface = _way_to(os.environ["MASTER_ADDR"])
    named = os.environ.get("NCCL_SOCKET_IFNAME", "")
    # NCCL takes patterns, too.
    chosen = named if named in {name for _, name in socket.if_nameindex()} else interface
    if chosen:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", chosen)
    return address


def _way_to(name: str) -> tuple[str, str]:
    """Return this node's address and interface on the way to another one; empty strings where there is none."""
    try:
        family, kind, _, _, there = socket.getaddrinfo(name, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(there)  # sends nothing
            own = str(probe.getsockname()[0])
    except OSError:
        return "", ""
    found = psutil.net_if_addrs()
    return own, next((name for name, addresses in found.items() if own in (a.address for a in addresses)), "")
