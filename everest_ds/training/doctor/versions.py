"""Packages: do they import, and are their versions those that the tests ran on?"""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from typing import TYPE_CHECKING

from everest_ds.training.doctor.findings import Finding
from everest_ds.training.doctor.imports import failure

if TYPE_CHECKING:
    from packaging.requirements import Requirement

# What the tests last ran on, where pyproject.toml allows more. A test compares it with what it finds installed.
TESTED = {"deepspeed": "0.19", "timm": "1.0", "av": "18.1", "numpy": "2.4"}
_LOOKED_AT = ("torch", "torchvision", "deepspeed", "timm", "decord", "decord2", "av", "numpy")
_DECODERS = ("decord", "decord2")  # loaded and tried by a check of their own


def packages() -> list[Finding]:
    """Look at Python and at every package that runs a model or reads a video."""
    try:
        wanted = _requirements()
    except (PackageNotFoundError, ModuleNotFoundError):
        says = f"not installed with its packages in this Python ({sys.executable})"
        return [Finding(subject="everest_ds", level="problem", says=says, fix="make install")]
    return [_python(), *(_package(wanted[name]) for name in _LOOKED_AT if name in wanted)]


def release(installed: str) -> str:
    """Return the first two numbers of a version."""
    return ".".join(installed.split(".")[:2])


def _requirements() -> dict[str, Requirement]:
    """Return what pyproject.toml asks for on this platform, by name."""
    from packaging.requirements import Requirement  # noqa: PLC0415 - may be missing, which is a finding

    parsed = map(Requirement, requires("everest_ds") or [])
    return {one.name: one for one in parsed if one.marker is None or one.marker.evaluate({"extra": ""})}


def _python() -> Finding:
    from packaging.specifiers import SpecifierSet  # noqa: PLC0415 - as above

    found, wanted = platform.python_version(), metadata("everest_ds")["Requires-Python"]
    if SpecifierSet(wanted).contains(found, prereleases=True):
        return Finding(subject="python", says=found)
    fix = "make install PYTHON=python3.12 VENV=.venv-3.12"
    return Finding(subject="python", level="note", says=f"{found} is outside of what was tested ({wanted})", fix=fix)


def _package(wanted: Requirement) -> Finding:
    name, fix = wanted.name, f"pip install '{wanted.name}{wanted.specifier}'"
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding(subject=name, level="problem", says="not installed", fix=fix)
    if name not in _DECODERS and (reason := failure(name)):
        return Finding(subject=name, level="problem", says=f"{found} does not import ({reason})", fix=fix)
    if not wanted.specifier.contains(found, prereleases=True):
        says = f"{found} is outside of what was tested ({wanted.specifier})"
        return Finding(subject=name, level="note", says=says, fix=fix)
    tested = TESTED.get(name, release(found))
    return Finding(subject=name, says=found if release(found) == tested else f"{found} (tests ran on {tested})")
