"""Builds of ops that failed: remembered, for each would take minutes again at every start, in vain."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch.utils import cpp_extension

from everest_ds.training.obstacle import Obstacle
from everest_ds.training.toolkit import ARCHITECTURES, PATHS

_NAME = "failed.json"
_VARIABLES = (*PATHS, "CXX", "CFLAGS", "CXXFLAGS", "LIBRARY_PATH", ARCHITECTURES)


def remembered(folder: Path) -> Obstacle | None:
    """Return why the build in this folder failed, if nothing that it depends on is another since."""
    file = folder / _NAME
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return _obstacle(record["why"], file) if record["depends_on"] == _depends_on() else None


def remember(folder: Path, what: str, error: Exception) -> Obstacle:
    """Write down why a build failed, and return it after ``what`` failed.

    Only a compiler's word is written down: a rank that waited for another's build finds no op, and doesn't know why.
    """
    if not isinstance(error.__cause__, subprocess.CalledProcessError):
        return Obstacle(f"{what} ({str(error).partition(chr(10))[0]})")
    why, file = f"{what} ({_reason(str(error))})", folder / _NAME
    file.write_text(json.dumps({"why": why, "depends_on": _depends_on()}, indent=2), encoding="utf-8")
    return _obstacle(why, file)


def forget(folder: Path) -> None:
    """Take back what was written down: the op is there."""
    if (folder / _NAME).exists():
        (folder / _NAME).unlink(missing_ok=True)  # the ranks of a node all do


def _obstacle(why: str, file: Path) -> Obstacle:
    return Obstacle(why, f"delete {file} to try again")


def _reason(output: str) -> str:
    """Return the compiler's first error, else what comes before its output."""
    error = re.search(r"(fatal )?error: .+", output)
    return error[0] if error else output.partition(": ")[0]


def _depends_on() -> dict[str, Any]:
    compilers = {name: shutil.which(name) for name in (os.environ.get("CXX", "c++"), "nvcc")}
    versions = {"torch": torch.__version__, "deepspeed": deepspeed.__version__, "CUDA_HOME": cpp_extension.CUDA_HOME}
    return versions | compilers | {name: os.environ.get(name) for name in _VARIABLES}
