"""The accelerator and its driver."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator

from everest_ds.training import ranks
from everest_ds.training.doctor.findings import Finding
from everest_ds.training.doctor.host import GIB, processor
from everest_ds.training.toolkit import missing_headers, missing_toolkit

_NVIDIA = Path("/proc/driver/nvidia/version")
_HIDING = "CUDA_VISIBLE_DEVICES"


def accelerator() -> list[Finding]:
    """Say what DeepSpeed would train on."""
    found = get_accelerator()
    kinds = {"bf16": found.is_bf16_supported(), "fp16": found.is_fp16_supported()}
    halves = ", ".join(f"{name} {'yes' if there else 'no'}" for name, there in kinds.items())
    if ranks.on_cpu():
        return [Finding(subject="accelerator", says=f"cpu ({processor()}), {halves}")]
    if not found.device_count():
        return [Finding(subject="accelerator", level="problem", says=f"{found.device_name()}: no device is visible")]
    devices = [_device(index) for index in range(found.device_count())]
    described = ", ".join(f"{devices.count(one)} x {one}" for one in dict.fromkeys(devices))
    return [Finding(subject="accelerator", says=f"{found.device_name()}: {described}; {halves}")]


def _device(index: int) -> str:
    return f"{ranks.device_name(index)} ({get_accelerator().total_memory(index) / GIB:.1f} GiB)"


def driver(version: Path = _NVIDIA) -> list[Finding]:
    """Look whether torch can use NVIDIA's driver, where there is one, and whether ops can be built for it."""
    match = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", version.read_text(encoding="utf-8")) if version.is_file() else None
    if match is None:
        return []
    says = f"NVIDIA {match[0]}, torch {torch.__version__} with CUDA {torch.version.cuda}"
    if get_accelerator().device_name() == "cuda":
        return [Finding(subject="driver", says=says), toolkit()]
    return [Finding(subject="driver", level="note", says=f"{says}: {_why_unused()}", fix=_how_to_use())]


def _why_unused() -> str:
    try:
        torch.get_device_module("cuda").init()
    except Exception as error:  # RuntimeError of the driver, AssertionError of a torch without CUDA
        return f"GPUs are not used ({str(error).partition(chr(10))[0]})"
    return f"GPUs are not used (DS_ACCELERATOR={os.environ.get('DS_ACCELERATOR', '')})"


def _how_to_use() -> str:
    for name in ("DS_ACCELERATOR", _HIDING):
        if name in os.environ:
            return f"unset {name}"
    return f"a driver for CUDA {torch.version.cuda}" if torch.version.cuda else "a torch that is built for CUDA"


def toolkit() -> Finding:
    """Hold the toolkit that builds DeepSpeed's ops against torch's CUDA: other major versions often don't go."""
    missing = missing_toolkit() or missing_headers()
    if missing:
        return Finding(subject="CUDA toolkit", level="note", says=missing.why, fix=missing.fix)
    from deepspeed.ops.op_builder.builder import installed_cuda_version  # noqa: PLC0415 - needed for CUDA alone

    found = installed_cuda_version()
    says, wanted = ".".join(map(str, found)), str(torch.version.cuda)
    if str(found[0]) == wanted.partition(".")[0]:
        return Finding(subject="CUDA toolkit", says=says)
    says = f"{says}, but torch was built with {wanted}: DeepSpeed's ops may not build"
    return Finding(subject="CUDA toolkit", level="note", says=says, fix=f"set CUDA_HOME to a CUDA {wanted} toolkit")
