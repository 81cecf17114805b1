"""What CUDA ops are built with: the toolkit, and headers of CUDA's libraries, which many toolkits lack.

torch's own headers include them, so no CUDA op builds without. A torch from pip brings them in nvidia/*/include.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from pathlib import Path

import torch
from torch.utils import cpp_extension

from everest_ds.training.obstacle import Obstacle

# Of torch's ATen/cuda/CUDAContextLight.h.
_HEADERS = ("cusparse.h", "cublas_v2.h", "cublasLt.h", "cusolverDn.h")
# Compilers look into the first one's folders before they look into the toolkit's, and into the second one's after.
PATHS = ("CPATH", ADDED := "CPLUS_INCLUDE_PATH")
ARCHITECTURES = "TORCH_CUDA_ARCH_LIST"
_PLAIN, _VARIANT = re.compile(r"\d+\.\d(\+PTX)?"), re.compile(r"^(\d+\.\d)[af]")


def missing_toolkit() -> Obstacle | None:
    """Say whether nvcc is missing, which builds CUDA ops."""
    # Not at the top: on other accelerators nobody needs it.
    from deepspeed.ops.op_builder.builder import MissingCUDAException, installed_cuda_version  # noqa: PLC0415

    try:
        installed_cuda_version()
    except MissingCUDAException:
        return Obstacle("no CUDA toolkit (nvcc)", f"install the CUDA {torch.version.cuda} toolkit and set CUDA_HOME")
    return None


def missing_headers() -> Obstacle | None:
    """Say which headers neither the toolkit nor the user's folders nor pip's packages have."""
    _, nowhere = _headers_elsewhere()
    if not nowhere:
        return None
    fix = f"set CPATH to the folder that has them, of a whole CUDA {torch.version.cuda} toolkit"
    return Obstacle(f"no {', '.join(nowhere)} in {home()}/include, nor in pip's nvidia packages", fix)


def use_toolkit() -> None:
    """Let torch, and the compilers that it starts, find the toolkit, its headers, and the GPUs to build for."""
    cpp_extension.CUDA_HOME = str(home())
    _use_plain_architectures()
    folders, _ = _headers_elsewhere()
    if folders:
        os.environ[ADDED] = os.pathsep.join(filter(None, [os.environ.get(ADDED), *map(str, folders)]))


def _use_plain_architectures() -> None:
    """Rewrite the GPUs to build for so that DeepSpeed can read them, which takes numbers alone.

    torch knows "9.0a" and "Hopper", too. Where a name is left, the op is built for the GPUs that are here.
    """
    asked = [_VARIANT.sub(r"\1", name) for name in re.split(r"[; ]+", os.environ.get(ARCHITECTURES, "")) if name]
    if asked and all(_PLAIN.fullmatch(name) for name in asked):
        os.environ[ARCHITECTURES] = ";".join(dict.fromkeys(asked))
    else:
        os.environ.pop(ARCHITECTURES, None)


def home() -> Path:
    """Return the folder of a toolkit that isn't missing.

    torch takes the folder above that of the nvcc on PATH. Where a script stands there for nvcc, that holds no toolkit,
    and nvcc says where it is.
    """
    found = Path(str(cpp_extension.CUDA_HOME))
    if any(folder.joinpath("cuda_runtime.h").is_file() for folder in _includes(found)):
        return found
    told = subprocess.run(
        [found / "bin/nvcc", "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
    )
    top = re.search(r"^#\$ TOP=(.+)$", told.stderr, re.MULTILINE)
    return Path(top[1]).resolve() if top else found


def _headers_elsewhere() -> tuple[list[Path], list[str]]:
    """Return folders of pip's packages with headers that the toolkit lacks, and headers that are nowhere at all."""
    set_by_user = [Path(folder) for name in PATHS for folder in os.environ.get(name, "").split(os.pathsep) if folder]
    searched = [*_includes(home()), *set_by_user]
    lacking = [name for name in _HEADERS if not any((folder / name).is_file() for folder in searched)]
    found = {name: _in_pip(name) for name in lacking}
    folders = dict.fromkeys(folder for folder in found.values() if folder)
    return list(folders), [name for name, folder in found.items() if folder is None]


def _includes(toolkit: Path) -> list[Path]:
    return [toolkit / "include", *toolkit.glob("targets/*/include")]


def _in_pip(header: str) -> Path | None:
    """Return the folder with a header: one for all of CUDA 13 (nvidia/cu13), one for each library of CUDA 12."""
    package = importlib.util.find_spec("nvidia")
    roots = package.submodule_search_locations if package else None
    found = [file.parent for root in roots or [] for file in Path(root).glob(f"*/include/{header}")]
    own = f"cu{str(torch.version.cuda).partition('.')[0]}"
    return min(found, key=lambda folder: folder.parent.name != own, default=None)
