"""Ops whose build fails: a real one, with a compiler that always fails."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from deepspeed.accelerator import get_accelerator
from launching import ROOT, environment, run

from everest_ds.training import failed_builds

TRY = """
from everest_ds.training.ops import op_obstacle
from everest_ds.training.optim import choose_adam
print(op_obstacle("FusedAdamBuilder", build=True))
print(op_obstacle("FusedAdamBuilder", build=False))
print(*choose_adam("auto", False)[1:])
"""
# Torch asks for its version first.
COMPILER = """#!/bin/sh
case "$*" in *" -c "*) echo x >> {attempts}; echo 'a.cpp:1:1: fatal error: no such luck' >&2; exit 1;; esac
exec g++ "$@"
"""


@pytest.mark.skipif(get_accelerator().device_name() != "cpu", reason="elsewhere other compilers are called, too")
def test_a_build_that_failed_is_not_tried_again_until_its_file_is_deleted(tmp_path):
    compiler, attempts = tmp_path / "compiler", tmp_path / "attempts"
    compiler.write_text(COMPILER.format(attempts=attempts))
    compiler.chmod(0o755)
    variables = {"CXX": str(compiler), "TORCH_EXTENSIONS_DIR": str(tmp_path / "ops")}
    file = tmp_path / "ops/fused_adam/failed.json"

    def lines():
        done = run("-c", TRY, **variables)
        assert done.returncode == 0, done.stderr
        return [line for line in done.stdout.splitlines() if "did not build" in line], done.stderr

    why = f"DeepSpeed's FusedAdamBuilder did not build (fatal error: no such luck): delete {file} to try again"
    said, warned = lines()
    assert len(said) == 3
    assert said[:2] == [why, why]
    assert said[2].startswith(why)
    assert "building DeepSpeed's fused_adam" in warned
    tried = attempts.read_text()
    said_again, warned = lines()
    assert said_again == said
    assert "building DeepSpeed's" not in warned
    assert attempts.read_text() == tried
    file.unlink()
    lines()
    assert len(attempts.read_text()) > len(tried)


def test_a_build_that_a_signal_ends_is_no_word_against_the_op(tmp_path):
    """Ctrl-C reaches the compilers, too: the run ends, and the next one builds."""
    folder = tmp_path / "ops/fused_adam"
    script = "import signal; [signal.signal(n, lambda *_: None) for n in (signal.SIGINT, signal.SIGTERM)]" + TRY
    variables = environment() | {"TORCH_EXTENSIONS_DIR": str(folder.parent)}
    process = subprocess.Popen([sys.executable, "-c", script], env=variables, cwd=ROOT, start_new_session=True)
    while not (folder / "build.ninja").exists():
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(1)  # ninja has begun
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60)
    assert not (folder / "failed.json").exists()


@pytest.fixture
def failed(tmp_path):
    """The folder of a failed build."""
    error = RuntimeError(
        "Error building extension 'x': [1/2] c++ -c x.cpp\nFAILED: x.o\nx.cpp:1: error: why\n1 error\n"
    )
    error.__cause__ = subprocess.CalledProcessError(1, "ninja")
    obstacle = failed_builds.remember(tmp_path, "x did not build", error)
    assert obstacle.why == "x did not build (error: why)"
    assert failed_builds.remembered(tmp_path) == obstacle
    return tmp_path


@pytest.mark.parametrize("name", ["CPATH", "CPLUS_INCLUDE_PATH", "CXX", "CXXFLAGS", "TORCH_CUDA_ARCH_LIST"])
def test_it_is_tried_again_when_what_it_depends_on_is_another(failed, name, monkeypatch):
    monkeypatch.setenv(name, "another")
    assert failed_builds.remembered(failed) is None


def test_it_is_tried_again_with_another_torch_toolkit_or_compiler(failed, monkeypatch, tmp_path):
    with monkeypatch.context() as patched:
        patched.setattr("torch.__version__", "2.99")
        assert failed_builds.remembered(failed) is None
    with monkeypatch.context() as patched:
        patched.setattr("torch.utils.cpp_extension.CUDA_HOME", "/another")
        assert failed_builds.remembered(failed) is None
    with monkeypatch.context() as patched:
        (tmp_path / "c++").touch(mode=0o755)
        patched.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        assert failed_builds.remembered(failed) is None
    assert failed_builds.remembered(failed)


def test_success_takes_it_back_and_what_nobody_can_read_is_nothing(failed):
    failed_builds.forget(failed)
    failed_builds.forget(failed)
    assert failed_builds.remembered(failed) is None
    (failed / "failed.json").write_text(json.dumps("x")[:1])
    assert failed_builds.remembered(failed) is None


def test_another_ranks_failure_is_not_written_down(tmp_path):
    obstacle = failed_builds.remember(
        tmp_path, "x did not build", ImportError("x.so: cannot open shared object file\n")
    )
    assert obstacle.why == "x did not build (x.so: cannot open shared object file)"
    assert list(tmp_path.iterdir()) == []
    silent = RuntimeError("Error building extension 'x': [1/2] c++ -c x.cpp\nFAILED: x.o\n")
    silent.__cause__ = subprocess.CalledProcessError(1, "ninja")
    assert failed_builds.remember(tmp_path, "x did not build", silent).why == (
        "x did not build (Error building extension 'x')"
    )
