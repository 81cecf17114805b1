"""The machine around the accelerator: cores, memory, shared memory, disk, open files."""

from __future__ import annotations

import math
import os
import platform
import resource
import shutil
import tempfile
from pathlib import Path

from everest_ds.config.schema import DataConfig, ModelConfig
from everest_ds.data.ahead import batches_ahead
from everest_ds.data.shared_memory import FOLDER, needed_bytes
from everest_ds.training.doctor.cgroup import core_limit, memory_limit_bytes
from everest_ds.training.doctor.findings import Finding

GIB = 2**30
_LEAST_MEMORY_GIB = 4  # two CPU ranks of the demo with a worker each
_LEAST_DISK_GIB = 1  # the demo's videos and checkpoints
_ROOMY_DISK_GIB = 20  # a ViT-L's checkpoint, weights and optimizer, is some 5 GiB; the old one goes after the new one
_LEAST_FILES = 1024
_CLIPS_PER_BATCH = 32  # of a rank, as in the README
_CPUINFO = Path("/proc/cpuinfo")


def processor() -> str:
    """Return the processor's name."""
    if _CPUINFO.is_file():
        for line in _CPUINFO.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def usable_cores() -> float:
    """Return how many cores this process may use."""
    return min(len(os.sched_getaffinity(0)), core_limit() or math.inf)


def cores() -> list[Finding]:
    """Say how many cores there are for ranks and decoding."""
    mine, all_of_them = usable_cores(), os.cpu_count() or 1
    of = "" if mine == all_of_them else f" of {all_of_them} (affinity or the container's limit)"
    return [Finding(subject="cores", says=f"{mine:g}{of}")]


def memory() -> list[Finding]:
    """Say how much memory the host has, and how much of it is free for this process."""
    import psutil  # noqa: PLC0415 - may be missing, which is no reason not to look at the rest

    machine, limit = psutil.virtual_memory(), memory_limit_bytes()
    total = min(machine.total, limit or machine.total)
    free = min(machine.available, total)
    says = f"{total / GIB:.1f} GiB{' (the limit of a control group)' if total < machine.total else ''}"
    says += f", {free / GIB:.1f} GiB available"
    if free >= _LEAST_MEMORY_GIB * GIB:
        return [Finding(subject="memory", says=says)]
    fix = "free some memory, or start fewer ranks (--num_accelerators 1) with data.workers=0"
    return [Finding(subject="memory", level="note", says=says, fix=fix)]


def shared_memory(folder: Path = FOLDER) -> list[Finding]:
    """Hold /dev/shm, through which workers hand over batches, against a rank with the default settings."""
    subject, fix = "/dev/shm", "docker run --shm-size=16g (or --ipc=host); else data.workers=0"
    if not folder.is_dir():
        return [Finding(subject=subject, level="note", says="there is none, so workers can't hand over clips", fix=fix)]
    model, data = ModelConfig(), DataConfig()
    batch_bytes = _CLIPS_PER_BATCH * 3 * model.frames * model.image_size**2
    ahead = batches_ahead(data, batch_bytes)
    needed = needed_bytes(data.workers, batch_bytes, ahead)
    free = shutil.disk_usage(folder).free
    if free >= needed:
        return [Finding(subject=subject, says=f"{free / GIB:.1f} GiB free")]
    says = (
        f"{free / GIB:.2f} GiB free: {data.workers} workers that prepare {ahead} batches of {_CLIPS_PER_BATCH} "
        f"clips each take up to {needed / GIB:.1f} GiB per rank"
    )
    return [Finding(subject=subject, level="note", says=says, fix=fix)]


def disk(folder: Path | None = None) -> list[Finding]:
    """Look whether runs can be written to the current folder."""
    folder = folder or Path.cwd()
    fix = "train.output_dir=FOLDER on a disk with room"
    try:
        with tempfile.TemporaryFile(dir=folder):
            free_gib = shutil.disk_usage(folder).free / GIB
    except OSError as error:
        says = f"cannot write to {folder} ({error.strerror})"
        return [Finding(subject="disk", level="problem", says=says, fix="cd to a folder that can be written to")]
    says = f"{free_gib:.1f} GiB free in {folder}"
    if free_gib >= _ROOMY_DISK_GIB:
        return [Finding(subject="disk", says=says)]
    if free_gib >= _LEAST_DISK_GIB:
        return [Finding(subject="disk", level="note", says=f"{says}: a few checkpoints of a large model", fix=fix)]
    return [Finding(subject="disk", level="problem", says=f"{says}: no room for a checkpoint", fix=fix)]


def open_files() -> list[Finding]:
    """Look at the limit on open files, of which every batch in flight takes some."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    names = {resource.RLIM_INFINITY: "unlimited"}
    says = f"{names.get(soft, soft)} at most (ulimit -n), {names.get(hard, hard)} if asked for"
    if soft == resource.RLIM_INFINITY or soft >= _LEAST_FILES:
        return [Finding(subject="open files", says=says)]
    most = _LEAST_FILES if hard == resource.RLIM_INFINITY else min(hard, 64 * _LEAST_FILES)
    return [Finding(subject="open files", level="note", says=says, fix=f"ulimit -n {most}")]
