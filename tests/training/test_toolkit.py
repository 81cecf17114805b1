"""The CUDA toolkit and its libraries' headers: found without a GPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from everest_ds.training import ops, toolkit

HEADERS = toolkit._HEADERS
NVCC = shutil.which("nvcc")


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """A folder with a toolkit that lacks the libraries' headers, and no other headers about."""
    for name in toolkit.PATHS:
        monkeypatch.delenv(name, raising=False)
    write(tmp_path / "cuda/include/cuda_runtime.h")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    write(tmp_path / "packages/nvidia/__init__.py")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    return tmp_path


def write(file: Path, text: str = "") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def test_a_whole_toolkit_needs_nothing_else(folder):
    for header in HEADERS:
        write(folder / "cuda/targets/x86_64-linux/include" / header)
    assert toolkit.missing_headers() is None
    toolkit.use_toolkit()
    assert "CPLUS_INCLUDE_PATH" not in os.environ


def test_headers_are_found_in_the_package_of_torchs_own_cuda(folder, monkeypatch):
    for cuda in ("cu12", "cu13", "cu14"):
        for header in HEADERS:
            write(folder / "packages/nvidia" / cuda / "include" / header)
    monkeypatch.setenv("CPLUS_INCLUDE_PATH", "/mine")
    assert toolkit.missing_headers() is None
    toolkit.use_toolkit()
    assert os.environ["CPLUS_INCLUDE_PATH"] == f"/mine:{folder}/packages/nvidia/cu13/include"
    toolkit.use_toolkit()
    assert os.environ["CPLUS_INCLUDE_PATH"].count("cu13") == 1


def test_headers_are_found_in_one_package_for_each_library(folder, monkeypatch):
    monkeypatch.setenv("CPLUS_INCLUDE_PATH", "")
    for header, package in zip(HEADERS, ("cusparse", "cublas", "cublas", "cusolver"), strict=True):
        write(folder / "packages/nvidia" / package / "include" / header)
    toolkit.use_toolkit()
    added = [Path(path).parent.name for path in os.environ["CPLUS_INCLUDE_PATH"].split(":")]
    assert added == ["cusparse", "cublas", "cusolver"]


def test_headers_that_are_nowhere_are_named_and_those_of_the_user_are_enough(folder, monkeypatch):
    write(folder / "cuda/include/cublas_v2.h")
    missing = toolkit.missing_headers()
    assert missing.why.startswith("no cusparse.h, cublasLt.h, cusolverDn.h in ")
    assert missing.fix == "set CPATH to the folder that has them, of a whole CUDA 13.0 toolkit"
    for header in HEADERS:
        write(folder / "mine" / header)
    monkeypatch.setenv("CPATH", f"/none:{folder}/mine")
    assert toolkit.missing_headers() is None


def test_a_script_called_nvcc_leads_to_the_toolkit(folder, monkeypatch):
    script = write(
        folder / "local/bin/nvcc", f"#!/bin/sh\necho '#$ _HERE_=x' >&2; echo '#$ TOP={folder}/cuda/bin/..' >&2"
    )
    script.chmod(0o755)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(folder / "local"))
    assert toolkit.home() == folder / "cuda"
    toolkit.use_toolkit()
    assert str(folder / "cuda") == cpp_extension.CUDA_HOME


def test_an_op_is_not_built_without_headers_but_one_that_was_built_needs_none(folder, monkeypatch):
    nvcc = write(folder / "cuda/bin/nvcc", "#!/bin/sh\necho Cuda compilation tools, release 13.0, V13.0.88\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(ops, "_needs_cuda", lambda builder: True)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder / "ops"))
    for build in (False, True):
        assert ops.op_obstacle("FusedAdamBuilder", build=build).why.startswith("no cusparse.h, ")
    assert not (folder / "ops").exists()
    write(folder / "ops/fused_adam/fused_adam.so")
    assert ops.op_obstacle("FusedAdamBuilder", build=False) is None
    (folder / "ops/fused_adam/fused_adam.so").unlink()
    for header in HEADERS:
        write(folder / "packages/nvidia/cu13/include" / header)
    monkeypatch.setenv("CPLUS_INCLUDE_PATH", "")
    assert ops.op_obstacle("FusedAdamBuilder", build=False) is None
    assert os.environ["CPLUS_INCLUDE_PATH"].endswith("nvidia/cu13/include")


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_compilers_find_what_torch_includes(monkeypatch, tmp_path):
    """Really: nvcc and the C++ compiler read the headers with what was set."""
    for name in toolkit.PATHS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(Path(NVCC).parent.parent))
    if toolkit.missing_headers():
        pytest.skip("this torch came without CUDA's headers, and so did the toolkit")
    monkeypatch.setenv("CPLUS_INCLUDE_PATH", "")
    toolkit.use_toolkit()
    source = write(
        tmp_path / "source.cu", "#include <cuda_runtime.h>\n" + "".join(f"#include <{h}>\n" for h in HEADERS)
    )
    for compiler in ([NVCC], ["g++", "-x", "c++", "-isystem", f"{cpp_extension.CUDA_HOME}/include"]):
        done = subprocess.run([*compiler, "-E", source], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("asked", "taken"),
    [("9.0a", "9.0"), ("8.0 9.0a+PTX", "8.0;9.0+PTX"), ("10.0f;9.0;9.0a", "10.0;9.0"), ("Hopper", None), ("", None)],
)
def test_the_gpus_to_build_for_are_named_as_deepspeed_reads_them(folder, monkeypatch, asked, taken):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    for header in HEADERS:
        write(folder / "cuda/include" / header)
    toolkit.use_toolkit()
    assert os.environ.get("TORCH_CUDA_ARCH_LIST") == taken
