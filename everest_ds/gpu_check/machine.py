"""What this machine is, and which Adam it has; builds DeepSpeed's op, for which the check's clock waits."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version

import psutil
import torch

from everest_ds.gpu_check.cases import Asked, Case, Values
from everest_ds.memory.gpus import GIB
from everest_ds.memory.overheads import card_here
from everest_ds.training.doctor.devices import driver
from everest_ds.training.doctor.host import processor, usable_cores
from everest_ds.training.optim import choose_adam

DESCRIPTION = "description"


def cases(asked: Asked) -> Iterator[Case]:
    """Describe the machine; build the op."""
    yield Case(name=DESCRIPTION, run=lambda: _device(asked.device) | _host())
    yield Case(name="Adam", run=_adam)


def _device(kind: str) -> Values:
    if kind == "cpu":
        return {"card": "", "device": processor(), "instructions": torch.backends.cpu.get_cpu_capability()}
    facts = torch.cuda.get_device_properties(0)
    return {
        "card": card_here(),
        "device": f"{card_here()}, {facts.total_memory / GIB:.1f} GiB, {facts.multi_processor_count} multiprocessors",
        "total_memory_bytes": facts.total_memory,
        "compute_capability": f"{facts.major}.{facts.minor}",
        "multiprocessors": facts.multi_processor_count,
        "driver": "; ".join(finding.says for finding in driver()),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "CUDA_HOME": os.environ.get("CUDA_HOME", ""),
    }


def _host() -> Values:
    return {
        "processor": processor(),
        "cores": usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
        "date": time.strftime("%Y-%m-%d"),
    }


def _adam() -> Values:
    adam, why = choose_adam("auto", offload=False)
    return {"adam": adam.name, "why": why}
