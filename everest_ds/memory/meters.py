"""Memory that is really used. The one place that asks a device's allocator."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import re
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch

from everest_ds.memory.storages import StorageWatch, held_bytes, storages_in_process, tensors_in_process

_KIB = 1024
_RESET_PEAK_RSS = "5"  # proc(5), /proc/pid/clear_refs


def peak_bytes(device: torch.device) -> int:
    """Highest memory since the process started: the device allocator's, or on a CPU the process's resident set.

    A :class:`PeakSince` makes it begin anew.
    """
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB
    return torch.get_device_module(device).max_memory_allocated(device)


def peaks(device: torch.device) -> dict[str, int]:
    """:func:`peak_bytes` as metrics.jsonl calls it; on a device also the most that its allocator has reserved."""
    found = {"peak_memory_bytes": peak_bytes(device)}
    if device.type != "cpu":
        found["reserved_memory_bytes"] = torch.get_device_module(device).max_memory_reserved(device)
    return found


def available_bytes(device: torch.device) -> int:
    """Memory that this process could take now: of its device, or on a CPU of the machine and its control group.

    Nothing of it is shared out among ranks that compute on the same CPU.
    """
    if device.type == "cpu":
        return min((psutil.virtual_memory().available, *_left_in_control_groups()))
    module: Any = torch.get_device_module(device)
    free, _ = module.mem_get_info(device)
    return int(free) + int(module.memory_reserved(device) - module.memory_allocated(device))


def resident_bytes() -> int:
    """The process's resident set (RSS) now, without what it only keeps for later."""
    gc.collect()
    return_free_memory()
    return int(psutil.Process().memory_info().rss)


class StorageMeter:
    """Counts the bytes of every tensor storage alive in this process, while it is entered.

    What was there before is counted too. Operators run slower meanwhile: measure times elsewhere.
    """

    def __init__(self) -> None:
        self.current_bytes = 0
        self.peak_bytes = 0
        self.before_bytes = 0
        self._sizes: dict[int, int] = {}
        self._watch = StorageWatch(self, "cpu")

    def born(self, block: int, size_bytes: int) -> None:
        """A storage appeared."""
        self._sizes[block] = size_bytes
        self.current_bytes += size_bytes
        self.peak_bytes = max(self.peak_bytes, self.current_bytes)

    def died(self, block: int) -> None:
        """A storage is gone."""
        self.current_bytes -= self._sizes.pop(block)

    def __enter__(self) -> StorageMeter:
        gc.collect()
        for tensor in tensors_in_process():
            self._watch.watch(tensor)
        self.before_bytes = self.current_bytes
        self._watch.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watch.__exit__(kind, error, trace)


class ResidentMeter:
    """The process's resident set (RSS): its growth since a moment, and the highest since then.

    Linux alone can forget an earlier peak; elsewhere the peak is the process's highest ever.
    """

    def __init__(self) -> None:
        self.start_bytes = resident_bytes()
        self.forget_peak()

    def forget_peak(self) -> None:
        """Look for the peak from now on; what the growth is counted from stays."""
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text(_RESET_PEAK_RSS, encoding="ascii")

    def growth_bytes(self) -> int:
        """Highest resident set since the start, less what was there then."""
        for line in _proc_status():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * _KIB - self.start_bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB - self.start_bytes


def return_free_memory() -> None:
    """Ask the C library to hand freed memory back to the system, so that the resident set means what is in use."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def states_bytes(device: torch.device) -> int:
    """Tensor bytes alive now: all storages of the process on a CPU, the allocator's count on another device."""
    gc.collect()
    if device.type == "cpu":
        return held_bytes()
    return int(torch.get_device_module(device).memory_allocated(device))


class Leftover:
    """Tensors that a process held at a moment: how many bytes of them are still there.

    On a CPU each storage is watched, for some of them may go: weights that were read from a file, say.
    """

    def __init__(self, device: torch.device) -> None:
        gc.collect()
        self._bytes = 0 if device.type == "cpu" else states_bytes(device)
        self._storages = list(storages_in_process()) if device.type == "cpu" else []

    def still_bytes(self) -> int:
        """Bytes of those that are left."""
        return self._bytes + sum(storage.nbytes() for reference in self._storages if (storage := reference()))


class PeakSince:
    """Highest memory since a moment: growth of the resident set on a CPU, else blocks of the device's allocator."""

    def __init__(self, device: torch.device) -> None:
        self._meter = ResidentMeter() if device.type == "cpu" else DeviceMeter(device).__enter__()

    def read(self) -> tuple[int, int | None]:
        """Return it, and on a device what the allocator had reserved."""
        if isinstance(self._meter, ResidentMeter):
            return self._meter.growth_bytes(), None
        self._meter.__exit__(None, None, None)
        return self._meter.peaks.allocated_bytes, self._meter.peaks.reserved_bytes


@dataclass(frozen=True, kw_only=True)
class DevicePeaks:
    """Highest bytes of a device's allocator, and what the driver reports.

    ``requested_bytes`` is what tensors ask for, ``allocated_bytes`` their blocks as rounded, ``active_bytes`` adds
    blocks that another stream may still use, ``reserved_bytes`` are the allocator's segments. ``driver_bytes`` is used
    on the device at the end, by every process: the allocator keeps what it reserved, so that is its peak, too.
    ``retries``: how often the allocator gave back what it kept, to find room.
    """

    requested_bytes: int
    allocated_bytes: int
    active_bytes: int
    reserved_bytes: int
    driver_bytes: int
    retries: int

    def beyond(self, leftover_bytes: int) -> DevicePeaks:
        """Return them without tensors that were there before; segments and the driver can't tell whose they are."""
        return dataclasses.replace(
            self,
            requested_bytes=self.requested_bytes - leftover_bytes,
            allocated_bytes=self.allocated_bytes - leftover_bytes,
            active_bytes=self.active_bytes - leftover_bytes,
        )


class DeviceMeter:
    """Reads a device allocator's :class:`DevicePeaks` of the time in which it is entered into ``peaks``."""

    peaks: DevicePeaks

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module: Any = torch.get_device_module(device)

    def __enter__(self) -> DeviceMeter:
        self._module.synchronize(self._device)
        self._module.reset_peak_memory_stats(self._device)
        self._retries = self._stats().get("num_alloc_retries", 0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._module.synchronize(self._device)
        stats = self._stats()
        free, total = self._module.mem_get_info(self._device)
        self.peaks = DevicePeaks(
            requested_bytes=stats["requested_bytes.all.peak"],
            allocated_bytes=stats["allocated_bytes.all.peak"],
            active_bytes=stats["active_bytes.all.peak"],
            reserved_bytes=stats["reserved_bytes.all.peak"],
            driver_bytes=int(total - free),
            retries=stats.get("num_alloc_retries", 0) - self._retries,
        )

    def _stats(self) -> dict[str, int]:
        return self._module.memory_stats(self._device)


def peak_of(work: Callable[[], object], device: torch.device) -> tuple[int, DevicePeaks | None]:
    """Do something; return its peak bytes: of tensor storages on a CPU, else of the device's allocator, with the rest.

    What was there before is counted too.
    """
    if device.type == "cpu":
        with StorageMeter() as storages:
            work()
        return storages.peak_bytes, None
    with DeviceMeter(device) as allocator:
        work()
    return allocator.peaks.allocated_bytes, allocator.peaks


def forget_workspaces(device: torch.device) -> None:
    """Let cuBLAS give back the workspaces that it keeps for each thread, and the allocator what it keeps unused.

    A process that measures several engines begins each of them as if it were the first.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


@contextlib.contextmanager
def allocator_snapshot(device: torch.device, path: Path | None, *, stacks: bool = True) -> Iterator[None]:
    """Record a CUDA allocator's history and write it to ``path`` (for pytorch.org/memory_viz); None: don't.

    ``stacks``: with the lines of code that called the allocator, which slows it down and makes a larger file.
    """
    if path is None or device.type != "cuda":
        yield
        return
    torch.cuda.memory._record_memory_history(context="all" if stacks else None, max_entries=1_000_000)
    try:
        yield
    finally:
        torch.cuda.memory._dump_snapshot(str(path))
        torch.cuda.memory._record_memory_history(enabled=None)


def _left_in_control_groups(root: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """Yield what each limit of cgroup v2 on this process leaves; file cache, which makes way, isn't counted as used."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        own = root / next(line for line in lines if line.startswith("0::")).removeprefix("0::/")
        for group in (own, *own.parents[: len(own.relative_to(root).parts)]):
            with contextlib.suppress(OSError, ValueError):  # the root has no limit, and "max" is none
                limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
                cached = re.findall(r"^(?:in)?active_file (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)
                yield limit - used + sum(map(int, cached))


def _proc_status() -> list[str]:
    with contextlib.suppress(OSError):
        return Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return []
