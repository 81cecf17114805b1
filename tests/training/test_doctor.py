import io
import json
import os
import resource
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from launching import run
from packaging.version import Version
from rich.console import Console
from torch.utils import cpp_extension

from everest_ds.config.errors import UserError
from everest_ds.training import ops, toolkit
from everest_ds.training.doctor import adam, cgroup, checks, decoders, devices, first_look, host, page, versions
from everest_ds.training.doctor.declared import declared
from everest_ds.training.doctor.findings import Finding, can_train, to_fix

ON_CPU = get_accelerator().device_name() == "cpu"
# What a checkout says whose packages don't load.
BROKEN = "raise ImportError('libcudart.so.13: cannot open shared object file')\n"


def by_subject(findings):
    return {finding.subject: finding for finding in findings}


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.fixture
def broken_torch(tmp_path):
    """The path to put first, so that a torch is found that does not load."""
    (tmp_path / "broken/torch").mkdir(parents=True)
    (tmp_path / "broken/torch/__init__.py").write_text(BROKEN)
    return os.pathsep.join([str(tmp_path / "broken"), os.environ.get("PYTHONPATH", "")])


def test_json_is_alone_on_stdout_and_true_of_this_machine(one_rank):
    said = json.loads(one_rank.succeed("tools/doctor.py", "--json").stdout)
    assert said["can_train"] is True
    found = {one["subject"]: one for one in said["findings"]}
    for package in ("torch", "deepspeed", "timm", "numpy"):
        assert found[package]["says"].startswith(version(package))
    assert found["accelerator"]["says"].startswith(get_accelerator().device_name())
    assert found["decord reads"]["says"] == "a video just written, all 20 frames right"
    assert {"FusedAdam", "Adam (auto)", "Adam (offload)", "async_io (NVMe offload)", "/dev/shm", "disk"} <= found.keys()
    assert not any("check failed" in one["says"] for one in said["findings"])
    mended = {subject for step in said["to_fix"] for subject in step["subjects"]}
    assert mended == {one["subject"] for one in said["findings"] if one["fix"] and one["level"] != "ok"}


def test_a_quick_look_leaves_out_what_takes_time(one_rank):
    page_of_lines = one_rank.succeed("tools/doctor.py", "--quick").stdout
    assert page_of_lines.endswith("this machine can train\n")
    assert "what to fix" in page_of_lines
    assert "FusedAdam" in page_of_lines
    assert "decord reads" not in page_of_lines
    assert "NVMe" not in page_of_lines


@pytest.mark.parametrize("known", [False, True], ids=["checkout", "checkout installed elsewhere"])
def test_it_speaks_where_nothing_is_installed(known, tmp_path):
    """Python without its site-packages; with known, the checkout's own metadata are found."""
    if known:
        (tmp_path / "everest_ds.egg-info").mkdir()
        (tmp_path / "everest_ds.egg-info/PKG-INFO").write_text("Name: everest_ds\nVersion: 0\nRequires-Dist: torch\n")
    done = run("-S", "tools/doctor.py", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert "Traceback" not in done.stdout + done.stderr
    assert "problem  everest_ds" in done.stdout
    assert "not looked at: deepspeed does not import" in done.stdout
    assert "1. make install  (everest_ds, memory)" in done.stdout
    assert done.stdout.endswith("this machine can't train: see the problems above\n")


def test_a_package_that_does_not_load_hides_nothing_else(broken_torch):
    done = run("tools/doctor.py", "--json", PYTHONPATH=broken_torch)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    said = json.loads(done.stdout)
    found = {one["subject"]: one for one in said["findings"]}
    assert found["torch"]["level"] == "problem"
    assert "does not import (ImportError: libcudart.so.13: cannot open shared object file)" in found["torch"]["says"]
    assert found["torch"]["fix"].startswith("pip install 'torch")
    assert found["ops"]["says"] == "not looked at: deepspeed does not import"
    for healthy in ("numpy", "memory", "decord reads"):
        assert found[healthy]["level"] == "ok"


def test_the_demo_says_it_before_it_writes_anything(broken_torch, tmp_path):
    done = run("tools/demo.py", "--outputs", tmp_path / "outputs", PYTHONPATH=broken_torch)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "does not import (ImportError: libcudart.so.13" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("demo: error: this machine can't train")
    assert not (tmp_path / "outputs").exists()


def test_a_check_that_raises_is_a_problem_in_one_line(monkeypatch):
    def check():
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(host, "cores", check)
    found = by_subject(checks.examine(quick=True))
    assert found["cores"] == Finding(
        subject="cores", level="problem", says="the check failed: RuntimeError: two lines", fix=""
    )
    assert found["disk"].level != "problem"


def test_without_a_compiler_it_says_which_adam_and_how_to_get_one(no_compiler):
    found = by_subject([*adam.every_run(), *adam.offload()])
    for subject in ("FusedAdam", "DeepSpeedCPUAdam"):
        assert found[subject].level == "note"
        assert found[subject].says == "can't be built: no C++ compiler ('g++' is not on PATH)"
    assert next(iter(to_fix(found.values()))) == "apt-get install g++"
    assert found["Adam (auto)"].says.startswith("torch fused AdamW (no C++ compiler")
    assert "needs DeepSpeedCPUAdam, but no C++ compiler" in found["Adam (offload)"].says


def test_ops_that_came_with_deepspeed_need_no_compiler(no_compiler, monkeypatch):
    monkeypatch.setattr(ops, "installed_ops", {"fused_adam": True})
    monkeypatch.setattr(ops, "accelerator_name", get_accelerator().device_name())
    found = by_subject(adam.every_run())
    assert found["FusedAdam"] == Finding(subject="FusedAdam", says="built with DeepSpeed")
    assert found["Adam (auto)"].says == "DeepSpeed FusedAdam (the default)"


def test_missing_headers_of_python_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    missing = ops.missing_compiler()
    assert missing.why == f"no headers of Python 3.{sys.version_info.minor} ({tmp_path}/Python.h)"
    assert missing.fix == f"apt-get install python3.{sys.version_info.minor}-dev"
    (tmp_path / "Python.h").touch()
    assert ops.missing_compiler() is None


@pytest.mark.skipif(not ON_CPU, reason="elsewhere a CUDA toolkit is needed, too")
def test_an_op_is_looked_for_where_torch_builds_it_and_not_built(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    fused = adam.every_run()[0]
    assert fused.level == "note"
    assert fused.says.startswith("would be built at first use")
    assert not (tmp_path / "extensions").exists()
    (tmp_path / "extensions/fused_adam").mkdir(parents=True)
    (tmp_path / "extensions/fused_adam/fused_adam.so").touch()
    assert adam.every_run()[0] == Finding(subject="FusedAdam", says=f"built, in {tmp_path / 'extensions'}")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions/fused_adam/fused_adam.so/below"))
    assert "can't be written to" in adam.every_run()[0].says
    assert "TORCH_EXTENSIONS_DIR" in adam.every_run()[0].fix


@pytest.mark.parametrize("own", [None, "own"])
def test_the_build_folder_is_torchs(own, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    if own:
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / own))
    assert str(ops.build_folder("fused_adam")) == cpp_extension._get_build_directory("fused_adam", False)


def test_the_apex_of_pypi_is_noted(monkeypatch, tmp_path):
    assert adam.apex()[0].level == "ok"
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex/__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert adam.apex()[0].level == "note"
    assert adam.apex()[0].fix == "pip uninstall apex"
    (tmp_path / "amp_C.py").touch()
    assert adam.apex()[0].says == "NVIDIA's"


@pytest.mark.skipif(not ON_CPU, reason="the GPU is used here")
def test_a_driver_that_torch_does_not_use_is_noted(monkeypatch, tmp_path):
    assert devices.driver(tmp_path / "none") == []
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.161.07  Sat Feb 17\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = devices.driver(tmp_path / "version")[0]
    assert found.level == "note"
    assert found.says.startswith(f"NVIDIA 535.161.07, torch {torch.__version__}")
    assert "GPUs are not used (" in found.says
    assert found.fix == "unset CUDA_VISIBLE_DEVICES"


def test_a_toolkit_of_another_cuda_is_noted(monkeypatch, tmp_path):
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    assert devices.toolkit().says == "no CUDA toolkit (nvcc)"
    for folder in ("bin", "include"):
        (tmp_path / folder).mkdir()
    for header in ("cuda_runtime.h", *toolkit._HEADERS):
        (tmp_path / "include" / header).touch()
    compiler = tmp_path / "bin/nvcc"
    compiler.write_text("#!/bin/sh\necho Cuda compilation tools, release 12.4, V12.4.131\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert devices.toolkit().says.startswith("12.4, but torch was built with 13.0")
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    assert devices.toolkit() == Finding(subject="CUDA toolkit", says="12.4")
    (tmp_path / "include/cusparse.h").unlink()
    monkeypatch.setattr(toolkit, "_in_pip", lambda header: None)
    found = devices.toolkit()
    assert found.level == "note"
    assert found.says == f"no cusparse.h in {tmp_path}/include, nor in pip's nvidia packages"


def test_wrong_frames_are_a_problem(monkeypatch):
    right = decoders.decode
    monkeypatch.setattr(decoders, "decode", lambda *a, **k: np.roll(right(*a, **k), 1, axis=0))
    found = by_subject(decoders.decoding())["decord reads"]
    assert found.level == "problem"
    assert found.says.startswith("wrong frames (")


def test_a_decoder_that_does_not_load_is_a_problem(monkeypatch):
    monkeypatch.setitem(sys.modules, "decord", None)
    decoders.DECODERS["decord"].cache_clear()
    try:
        found = by_subject(decoders.loading())["data.decoder=decord"]
    finally:
        decoders.DECODERS["decord"].cache_clear()
    assert found.level == "problem"
    assert "decord" in found.says
    assert found.fix.startswith("pip install --force-reinstall decord")


def test_the_tested_versions_begin_with_the_lower_bounds_and_end_with_what_tests_run_on():
    """Of every package that pyproject.toml leaves open; a release of one of them today is no failure of ours."""
    wanted = declared().here()
    assert set(versions.TESTED) == set(versions._LOOKED_AT) - set(versions._DECODERS) - {"deepspeed"}
    newest = versions.release(version("torch")) == versions.TESTED["torch"][-1]
    for name, tested in versions.TESTED.items():
        lowest = next(one.version for one in wanted[name].specifier if one.operator == ">=")
        assert tested[0] == versions.release(lowest if "." in lowest else f"{lowest}.0")
        assert list(tested) == sorted(tested, key=Version)
        if newest:
            assert Version(version(name)) >= Version(tested[-1]), f"the tests never ran on {name} {tested[-1]}"


@pytest.mark.parametrize(
    ("torch_version", "level", "says"),
    [
        ("2.5.1", "note", "2.5.1 is outside of what was tested (<2.15,>=2.6)"),
        ("2.6.0", "ok", "2.6.0"),
        ("2.9.1+cu128", "ok", "2.9.1+cu128 (tests ran on 2.6, 2.11 and 2.14)"),
        ("2.11.0+cu130", "ok", "2.11.0+cu130"),
        ("2.14.1", "ok", "2.14.1"),
        ("2.15.0", "note", "2.15.0 is outside of what was tested (<2.15,>=2.6)"),
    ],
)
def test_it_knows_the_range_of_torch(torch_version, level, says, monkeypatch):
    monkeypatch.setattr(versions, "version", lambda name: torch_version if name == "torch" else version(name))
    found = by_subject(versions.packages())["torch"]
    fix = "pip install 'torch<2.15,>=2.6'" if level == "note" else ""
    assert found == Finding(subject="torch", level=level, says=says, fix=fix)


def test_a_version_after_the_last_tested_one_is_named(monkeypatch):
    monkeypatch.setattr(versions, "version", lambda name: "1.7.0" if name == "timm" else version(name))
    assert by_subject(versions.packages())["timm"] == Finding(subject="timm", says="1.7.0 (tests ran on 1.0)")


def test_packages_that_only_commands_need_are_named_when_missing(monkeypatch):
    def without_rich(name):
        if name == "rich":
            raise PackageNotFoundError(name)
        return version(name)

    assert "rich" not in by_subject(versions.packages())
    monkeypatch.setattr(versions, "version", without_rich)
    missing = by_subject(versions.packages())["rich"]
    assert missing == Finding(subject="rich", level="problem", says="not installed", fix="pip install 'rich>=13.7'")


def test_from_pythonpath_it_asks_for_what_the_checkout_asks_for(tmp_path):
    """Not installed, every package there: an environment whose metadata know nothing of the project."""
    metadata_of_others = "import importlib.metadata as m; d = m.distribution; found = m.Distribution.from_name\n"
    (tmp_path / "sitecustomize.py").write_text(
        f"{metadata_of_others}"
        "def named(name):\n"
        "    if name == 'everest_ds':\n"
        "        raise m.PackageNotFoundError(name)\n"
        "    return found(name)\n"
        "m.Distribution.from_name = staticmethod(named)\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    said = json.loads(run("tools/doctor.py", "--quick", "--json", PYTHONPATH=path).stdout)
    assert said["can_train"] is True
    found = {one["subject"]: one for one in said["findings"]}
    assert "everest_ds" not in found
    assert found["torch"]["says"].startswith(version("torch"))


def test_a_project_file_of_another_package_is_not_ours(tmp_path):
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'other'\ndependencies = ['torch<1']\n")
    assert declared(tmp_path / "pyproject.toml").here().keys() >= {"torch", "deepspeed"}
    (tmp_path / "pyproject.toml").write_text(
        "[project]\nname = 'everest_ds'\nrequires-python = '>=3'\n"
        "dependencies = ['torch<1', 'exceptiongroup; python_version < \"3\"']\n"
    )
    ours = declared(tmp_path / "pyproject.toml").here()
    assert {name: str(one.specifier) for name, one in ours.items()} == {"torch": "<1"}


def write(root, texts):
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(
    ("texts", "memory", "cores"),
    [
        ({}, None, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, None, None),
        (
            {
                "proc/self/cgroup": "0::/job/step\n",
                "sys/fs/cgroup/job/memory.max": "4096\n",
                "sys/fs/cgroup/job/step/memory.max": "8192\n",
                "sys/fs/cgroup/job/cpu.max": "max 100000\n",
                "sys/fs/cgroup/job/step/cpu.max": "150000 100000\n",
            },
            4096,
            1.5,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/docker/a\n2:cpu,cpuacct:/docker/a\n0::/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "12288\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "50000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            12288,
            0.5,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/\n1:cpu:/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            None,
            None,
        ),
    ],
    ids=["no groups", "v2 unlimited", "v2 nested", "v1 in a container", "v1 unlimited"],
)
def test_limits_of_control_groups(texts, memory, cores, tmp_path):
    write(tmp_path, texts)
    assert cgroup.memory_limit_bytes(tmp_path) == memory
    assert cgroup.core_limit(tmp_path) == cores


def test_cores_are_those_that_this_process_may_use():
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert host.usable_cores() <= 1
    finally:
        os.sched_setaffinity(0, before)


def test_little_shared_memory_is_noted(monkeypatch, tmp_path):
    """64 MB is what Docker gives."""
    monkeypatch.setattr(host.shutil, "disk_usage", lambda folder: Usage(64 * 2**20))
    found = host.shared_memory(tmp_path)[0]
    assert found.level == "note"
    assert "0.06 GiB free: 4 workers that prepare 4 batches of 32 clips each take up to 1.3 GiB" in found.says
    assert "--shm-size" in found.fix
    monkeypatch.setattr(host.shutil, "disk_usage", lambda folder: Usage(2 * 2**30))
    assert host.shared_memory(tmp_path)[0].level == "ok"
    assert host.shared_memory(tmp_path / "none")[0].level == "note"


def test_a_full_disk_and_a_folder_that_is_not_there_are_problems(monkeypatch, tmp_path):
    assert "No such file or directory" in host.disk(tmp_path / "none")[0].says
    levels = {2**20: "problem", 5 * 2**30: "note", 50 * 2**30: "ok"}
    for free, level in levels.items():
        monkeypatch.setattr(host.shutil, "disk_usage", lambda folder, free=free: Usage(free))
        assert host.disk(tmp_path)[0].level == level


class Usage:
    def __init__(self, free):
        self.free = free


def test_a_low_limit_on_open_files_is_noted():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, before[1]))
    try:
        found = host.open_files()[0]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert found.level == "note"
    assert found.says.startswith("512 at most")
    assert found.fix.startswith("ulimit -n ")


FINE = Finding(subject="memory", says="64 GiB")
NOTE = Finding(subject="apex", level="note", says="is another", fix="pip uninstall apex")
PROBLEM = Finding(subject="torch", level="problem", says="not installed", fix="make install")


def test_what_to_fix_begins_with_problems_and_says_nothing_twice():
    twice = replace(PROBLEM, subject="timm")
    assert page.fixes([NOTE, FINE, PROBLEM, twice]) == [
        "what to fix",
        "  1. make install  (torch, timm)",
        "  2. pip uninstall apex  (apex)",
    ]
    assert page.fixes([FINE]) == ["what to fix: nothing"]
    assert can_train([FINE, NOTE])
    assert not can_train([FINE, PROBLEM])


def test_brackets_are_text_on_a_terminal():
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(page.table([FINE, replace(NOTE, says="install everest_ds[torchcodec]")]))
    said = console.export_text()
    assert "everest_ds[torchcodec]" in said
    assert "memory" in said


def test_the_demo_says_what_is_not_ok_or_one_line(monkeypatch, capsys):
    assert first_look.brief([FINE, replace(FINE, subject="cores", says="8")]) == [
        "machine: cores 8; memory 64 GiB; 2 checks fine"
    ]
    monkeypatch.setattr(first_look, "examine", lambda quick: [FINE, NOTE])
    first_look.first_look()
    assert capsys.readouterr().err == "note  apex  is another (pip uninstall apex)\n"
    monkeypatch.setattr(first_look, "examine", lambda quick: [PROBLEM])
    with pytest.raises(UserError, match="can't train"):
        first_look.first_look()
