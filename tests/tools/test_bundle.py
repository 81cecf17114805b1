"""Wheels for machines without a network: which, on a small index of our own, and (slow) those of the real one."""

import importlib.util
import os
import sys
import zipfile
from importlib.metadata import requires
from pathlib import Path

import pytest
from launching import ROOT, run
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

from everest_ds.config.errors import UserError
from everest_ds.training.doctor.declared import declared

THERE = ("torch", "torchvision", "timm")
PROJECT = """
[project]
name = "everest_ds"
version = "1"
requires-python = ">=3.10"
dependencies = ["torch>=2,<3", "timm", "deepspeed", "rich; python_version < '3.12'"]
[project.optional-dependencies]
shards = ["webdataset"]
"""
# Name and version -> what it needs.
INDEX = {
    ("torch", "2.1"): ["sympy"],
    ("torch", "3.0"): ["sympy"],
    ("sympy", "1.0"): [],
    ("timm", "1.0"): ["torch", "pyyaml"],
    ("pyyaml", "6.0"): [],
    ("deepspeed", "0.19"): ["torch", "hjson", "pyyaml", "pydantic"],
    ("hjson", "3.1"): [],
    ("pydantic", "2.0"): ["pydantic-core==2.7"],
    ("pydantic-core", "2.7"): [],
    ("pydantic-core", "2.8"): [],
    ("rich", "13.0"): [],
    ("webdataset", "1.0"): ["pyyaml", "braceexpand"],
    ("braceexpand", "0.1"): [],
}


@pytest.fixture(scope="module")
def bundle():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("bundle", ROOT / "tools/bundle.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def small_index(bundle, monkeypatch, tmp_path):
    for (name, version), needs in INDEX.items():
        write_wheel(tmp_path / "index", name, version, needs)
    (tmp_path / "project").mkdir()
    (tmp_path / "project/pyproject.toml").write_text(PROJECT)
    monkeypatch.setattr(bundle, "PROJECT", tmp_path / "project")
    (tmp_path / "uv.toml").write_text(f"no-index = true\nfind-links = ['{tmp_path}/index']\n")
    monkeypatch.setenv("UV_CONFIG_FILE", str(tmp_path / "uv.toml"))
    return tmp_path


def write_wheel(folder: Path, name: str, version: str, needs: list[str]) -> None:
    folder.mkdir(exist_ok=True)
    name = name.replace("-", "_")
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {n}" for n in needs)]
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}-{version}.dist-info/METADATA", "\n".join(lines) + "\n")
        wheel.writestr(f"{name}-{version}.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{name}-{version}.dist-info/RECORD", "")


def test_it_takes_what_is_needed_less_what_is_there_and_all_that_this_needs(bundle, small_index):
    found = bundle.missing("3.12", ["torch", "timm"], "shards")
    assert found == [
        "braceexpand==0.1",
        "deepspeed==0.19",
        "hjson==3.1",
        "pydantic==2.0",
        "pydantic-core==2.7",
        "webdataset==1.0",
    ]
    assert "rich==13.0" in bundle.missing("3.11", ["torch", "timm"], "shards")
    assert bundle.missing("3.12", ["torch", "timm", "deepspeed"], "shards") == ["braceexpand==0.1", "webdataset==1.0"]


def test_what_can_not_be_had_is_one_line(bundle, small_index):
    for wheel in (small_index / "index").glob("hjson*"):
        wheel.unlink()
    with pytest.raises(UserError, match=r"uv pip, which needs a network, failed: .*hjson") as raised:
        bundle.missing("3.12", ["torch"], "shards")
    assert len(str(raised.value)) < 700


@pytest.mark.parametrize("python", ["3.9", "2.7", "3", "3.12.1", "three"])
def test_a_python_that_it_does_not_run_on_is_a_mistake(python):
    done = run("tools/bundle.py", "--python-version", python)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"python version '{python}': give one such as 3.12 that everest_ds runs on (>=3.10,<3.14)" in done.stderr


def test_without_a_network_it_says_so(tmp_path):
    nobody = {"UV_DEFAULT_INDEX": "http://127.0.0.1:9/simple", "UV_NO_CACHE": "1", "UV_HTTP_RETRIES": "0"}
    done = run("tools/bundle.py", "--out", tmp_path / "bundle", **nobody)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("bundle: error: uv pip, which needs a network, failed: ")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.slow
def test_the_real_bundle_is_the_closure_of_our_metadata(tmp_path):
    """Some 120 MB from PyPI, for this Python."""
    done = run("tools/bundle.py", "--out", tmp_path, timeout_s=900)
    assert done.returncode == 0, done.stderr
    wheels = [parse_wheel_filename(file.name) for file in tmp_path.iterdir()]
    names = {name for name, *_ in wheels}
    ours = {canonicalize_name(Requirement(one).name) for one in declared().here()}
    assert names == {"everest-ds"} | closure({*ours, "webdataset", "fsspec", "aiohttp"}) - closure(set(THERE))
    assert not any(name.startswith(("nvidia", "torch", "triton")) for name in names)
    tags = {str(tag) for name, _, _, tags in wheels for tag in tags if name in ("deepspeed", "everest-ds")}
    assert tags == {"py3-none-any"}
    assert f"{len(wheels)} wheels" in done.stdout


def closure(names: set[str]) -> set[str]:
    """All that packages need, by the metadata of what is installed here."""
    found: set[str] = set()
    waiting = set(names)
    while waiting:
        name = waiting.pop()
        found.add(name)
        parsed = [Requirement(one) for one in requires(name) or [] if "extra ==" not in one]
        needed = {canonicalize_name(one.name) for one in parsed if one.marker is None or one.marker.evaluate()}
        waiting |= needed - found
    return found


def test_it_runs_from_a_checkout_that_is_not_installed(tmp_path):
    done = run("-I", "tools/bundle.py", "--help", PYTHONPATH=os.fspath(tmp_path))
    assert done.returncode == 0, done.stderr
    assert f"default {sys.version_info.major}.{sys.version_info.minor}" in done.stdout
