"""DeepSpeed's compiled ops: which can be had here.

An op is there since DeepSpeed was installed (DS_BUILD_OPS), or torch builds it when it is first used and keeps it in a
folder of the user's.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.git_version_info import accelerator_name, installed_ops
from torch.utils import cpp_extension

from everest_ds.training.failed_builds import forget, remember, remembered
from everest_ds.training.obstacle import Obstacle
from everest_ds.training.toolkit import ADDED, missing_headers, missing_toolkit, use_toolkit

log = logging.getLogger(__name__)

# torch's file while it builds. A process that is killed leaves it behind, and every later one waits for ever.
_LOCK = "lock"
# What ninja says when a signal ends it: no word against the op.
_INTERRUPTED = "interrupted by user"
_WHAT_IS_MISSING = {"async_io": ("no libaio with its headers", "apt-get install libaio-dev")}


def missing_compiler() -> Obstacle | None:
    """Say what is missing to build C++ ops."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return Obstacle(f"no C++ compiler ('{compiler}' is not on PATH)", "apt-get install g++")
    if shutil.which("ninja") is None and importlib.util.find_spec("ninja") is None:
        return Obstacle("no ninja", "pip install ninja")
    headers = sysconfig.get_path("include")
    if not Path(headers, "Python.h").is_file():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        return Obstacle(f"no headers of Python {version} ({headers}/Python.h)", f"apt-get install python{version}-dev")
    return None


def op_obstacle(name: str, *, build: bool) -> Obstacle | None:
    """Say why an op can't be had here.

    Args:
        name: class of DeepSpeed's builder, such as "FusedAdamBuilder".
        build: build it if need be, which takes a minute or two the first time; else judge by what that would need.
    """
    own_ninja_first()
    builder = get_accelerator().create_op_builder(name)
    if builder is None:
        return Obstacle(f"DeepSpeed has no {name} for {get_accelerator().device_name()}")
    if prebuilt(builder):
        return _failure_to_load(builder, name) if build else None
    return (
        missing_compiler()
        or (_prepare_cuda(builder) if _needs_cuda(builder) else None)
        or remembered(build_folder(builder.name))
        or (_failure_to_load(builder, name) if build else _foreseen(builder))
    )


def own_ninja_first() -> None:
    """Let torch find the ninja of this Python's environment, activated or not, before the system's.

    Another version takes what the first one built for out of date, and builds it again: minutes, at every change.
    """
    own, found = str(Path(sys.executable).parent), os.environ.get("PATH", "")
    if found.split(os.pathsep)[0] != own:
        os.environ["PATH"] = os.pathsep.join([own, found])


def prebuilt(builder: Any) -> bool:
    """Whether the op was built when DeepSpeed was installed."""
    return bool(installed_ops.get(builder.name)) and accelerator_name == get_accelerator()._name


def built(builder: Any) -> bool:
    """Whether torch has built the op before."""
    return (build_folder(builder.name) / f"{builder.name}.so").is_file()


def build_folder(name: str) -> Path:
    """Return the folder that torch builds an op in. Its own function for this makes the folder."""
    own = os.environ.get("TORCH_EXTENSIONS_DIR")
    if own is not None:
        return Path(own, name)
    versions = {"rocm": torch.version.hip, "cu": torch.version.cuda}
    target = next((f"{key}{value.replace('.', '')}" for key, value in versions.items() if value), "cpu")
    python = f"py{sys.version_info.major}{sys.version_info.minor}{getattr(sys, 'abiflags', '')}"
    return Path(cpp_extension.get_default_build_root(), f"{python}_{target}", name)


def _prepare_cuda(builder: Any) -> Obstacle | None:
    # Only then the headers: what was built is loaded without them, but not without the toolkit.
    if missing := missing_toolkit() or (None if built(builder) else missing_headers()):
        return missing
    use_toolkit()
    return None


def _needs_cuda(builder: Any) -> bool:
    # Not at the top: on other accelerators nobody needs it.
    from deepspeed.ops.op_builder.builder import CUDAOpBuilder  # noqa: PLC0415

    return isinstance(builder, CUDAOpBuilder) and get_accelerator().device_name() == "cuda" and not torch.version.hip


def _failure_to_load(builder: Any, name: str) -> Obstacle | None:
    folder = build_folder(builder.name)
    if not prebuilt(builder) and not built(builder):
        headers = f", headers from {os.environ[ADDED]}" if ADDED in os.environ else ""
        said = "building DeepSpeed's %s, once: minutes, and every rank waits (%s%s)"
        log.warning(said, builder.name, folder.parent, headers)
    # Newer versions of torch lock the file itself, which then always lies there.
    if hasattr(cpp_extension, "FileBaton") and (lock := folder / _LOCK).exists():
        log.warning(
            "waiting for another process to build %s; if none does (it was killed), delete %s", builder.name, lock
        )
    try:
        builder.load(verbose=False)
    except Exception as error:
        if _INTERRUPTED in str(error):
            raise KeyboardInterrupt from error
        return remember(folder, f"DeepSpeed's {name} did not build", error)
    forget(folder)
    return None


def _foreseen(builder: Any) -> Obstacle | None:
    if not builder.is_compatible(verbose=False):
        return Obstacle(*_WHAT_IS_MISSING.get(builder.name, (f"DeepSpeed says that {builder.name} can't run here",)))
    if built(builder):
        return None
    folder = build_folder(builder.name)
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        return Obstacle(f"{there} can't be written to", "set TORCH_EXTENSIONS_DIR to a folder that can be")
    return None
