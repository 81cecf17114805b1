"""Packages: do they import, and are their versions those that the tests ran on?"""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from everest_ds.training.doctor.declared import Declared, declared
from everest_ds.training.doctor.findings import Finding
from everest_ds.training.doctor.imports import failure

if TYPE_CHECKING:
    from packaging.requirements import Requirement

# What the tests ran on, where pyproject.toml allows more: its lower bounds first (make test-oldest).
TESTED = {
    "torch": ("2.6", "2.11", "2.14"),
    "torchvision": ("0.21", "0.26", "0.29"),
    "timm": ("1.0",),
    "av": ("17.0", "18.1"),
    "numpy": ("1.26", "2.4"),
}
_LOOKED_AT = ("torch", "torchvision", "deepspeed", "timm", "decord", "decord2", "av", "numpy")
_DECODERS = ("decord", "decord2")  # loaded and tried by a check of their own


def packages() -> list[Finding]:
    """Look at Python and at every package that runs a model or reads a video; of others at those that are missing."""
    if failure("packaging"):
        says = f"not installed with its packages in this Python ({sys.executable})"
        return [Finding(subject="everest_ds", level="problem", says=says, fix="make install")]
    asked, unread = _declared()
    found = {name: _package(wanted) for name, wanted in asked.here().items()}
    others = [finding for name, finding in found.items() if name not in _LOOKED_AT and finding.level != "ok"]
    return [*unread, _python(asked), *(found[name] for name in _LOOKED_AT if name in found), *others]


def _declared() -> tuple[Declared, list[Finding]]:
    """Return what is asked for, or bare names with a note: a checkout that isn't installed, in Python 3.10."""
    try:
        return declared(), []
    except PackageNotFoundError:
        says = "not installed, and this Python can't read pyproject.toml: versions not looked at"
        names = [name for name in _LOOKED_AT if name not in _DECODERS]
        note = Finding(subject="everest_ds", level="note", says=says, fix="pip install tomli")
        return Declared(requirements=names, python=""), [note]


def release(installed: str) -> str:
    """Return the first two numbers of a version."""
    return ".".join(installed.split(".")[:2])


def _python(asked: Declared) -> Finding:
    from packaging.specifiers import SpecifierSet  # noqa: PLC0415 - may be missing, which is a finding

    found = platform.python_version()
    if SpecifierSet(asked.python).contains(found, prereleases=True):
        return Finding(subject="python", says=found)
    fix = "make install PYTHON=python3.12 VENV=.venv-3.12"
    return Finding(
        subject="python", level="note", says=f"{found} is outside of what was tested ({asked.python})", fix=fix
    )


def _package(wanted: Requirement) -> Finding:
    name, fix = wanted.name, f"pip install '{wanted.name}{wanted.specifier}'"
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding(subject=name, level="problem", says="not installed", fix=fix)
    if name in _LOOKED_AT and name not in _DECODERS and (reason := failure(name)):
        return Finding(subject=name, level="problem", says=f"{found} does not import ({reason})", fix=fix)
    if not wanted.specifier.contains(found, prereleases=True):
        says = f"{found} is outside of what was tested ({wanted.specifier})"
        return Finding(subject=name, level="note", says=says, fix=fix)
    tested = TESTED.get(name, (release(found),))
    return Finding(
        subject=name, says=found if release(found) in tested else f"{found} (tests ran on {_listed(tested)})"
    )


def _listed(names: Sequence[str]) -> str:
    """Return names as a sentence lists them."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
