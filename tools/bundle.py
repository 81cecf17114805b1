"""Wheels for a machine without a network: ``python tools/bundle.py --python-version 3.12``.

Everything that everest_ds needs, and itself, less what an environment with torch, torchvision and timm has already.
docs/offline.md says how to use it.
"""

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

# Runs from a checkout that was not installed, too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from everest_ds.config.errors import UserError, one_line_errors, shortened
from everest_ds.training.doctor.declared import declared

PROJECT = Path(__file__).resolve().parents[1]
# PyPI has its source alone. Its ops are built where they are used.
FROM_SOURCE = "deepspeed"
# torch's own wheels ask for as new a C library.
_NEWEST_GLIBC = 28
_LONGEST_REASON = 500


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Collect the wheels that a machine without a network still lacks.")
    mine = ".".join(platform.python_version_tuple()[:2])
    add = parser.add_argument
    add("--python-version", default=mine, metavar="3.X", help=f"Python of that machine (default {mine}, as here)")
    add("--there", default="torch,torchvision,timm", help="what it has, with all that this needs (default %(default)s)")
    add("--extras", default="shards", help="of everest_ds, with commas between (default %(default)s)")
    add("--out", type=Path, help="folder (default dist/bundle-3.X); wheels in it are deleted first")
    arguments = parser.parse_args()
    with one_line_errors("bundle"):
        check(arguments.python_version)
        out = arguments.out or PROJECT / f"dist/bundle-{arguments.python_version}"
        lacking = missing(arguments.python_version, arguments.there.split(","), arguments.extras)
        collect(lacking, arguments.python_version, out)
        wheels = list(out.glob("*.whl"))
        print(f"{len(wheels)} wheels, {sum(wheel.stat().st_size for wheel in wheels) / 1e6:.0f} MB, in {out}")
        print(f"on that machine: pip install --no-index --find-links {out.name} 'everest_ds[{arguments.extras}]'")
    return 0


def check(python: str) -> None:
    """Raise a UserError for a Python that everest_ds does not run on."""
    from packaging.specifiers import SpecifierSet  # noqa: PLC0415 - --help works without it

    wanted = declared(PROJECT / "pyproject.toml").python
    if not re.fullmatch(r"\d+\.\d+", python) or not SpecifierSet(wanted).contains(python):
        raise UserError(f"python version '{python}': give one such as 3.12 that everest_ds runs on ({wanted})")


def missing(python: str, there: Sequence[str], extras: str) -> list[str]:
    """Return ``name==version`` of what everest_ds needs, less packages that are there and all that they need."""
    needed = resolve(python, [f"everest_ds[{extras}] @ {PROJECT.as_uri()}"])
    others = [one for one in needed if "==" in one]
    brought = resolve(python, there, constraints=others)
    return [one for one in others if one not in brought]


def resolve(python: str, packages: Sequence[str], constraints: Sequence[str] = ()) -> list[str]:
    """Return ``name==version`` of packages and all that they need, for a Python that need not be this one's."""
    with tempfile.TemporaryDirectory() as folder:
        asked, bounds = Path(folder, "asked.txt"), Path(folder, "bounds.txt")
        asked.write_text("\n".join(packages), encoding="utf-8")
        bounds.write_text("\n".join(constraints), encoding="utf-8")
        bounded: list[str | Path] = ["--constraints", bounds] if constraints else []
        target = ["--python-version", python, "--python-platform", f"x86_64-manylinux_2_{_NEWEST_GLIBC}"]
        # That Python need not be installed here.
        asking = ["uv", "pip", "compile", "--no-python-downloads", "--no-header", "--no-annotate"]
        return run(*asking, *target, *bounded, asked)


def collect(packages: Sequence[str], python: str, out: Path) -> None:
    """Put wheels of the packages and of everest_ds into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.whl"):
        old.unlink()
    sources = [one for one in packages if one.startswith(f"{FROM_SOURCE}==")]
    glibcs = [f"_2_{minor}" for minor in range(_NEWEST_GLIBC, 4, -1)]
    target = [f"--platform=manylinux{name}_x86_64" for name in (*glibcs, "2014", "2010", "1")]
    target += [f"--python-version={python}", "--implementation=cp", "--only-binary=:all:"]
    run("pip", "download", "--no-deps", "--dest", out, *target, *(one for one in packages if one not in sources))
    run("pip", "wheel", "--no-deps", "--wheel-dir", out, *sources, DS_BUILD_OPS="0")
    with tempfile.TemporaryDirectory() as folder:
        # From the archive of its sources: in the checkout it would take in what lies in build/.
        run("uv", "build", "--out-dir", folder, PROJECT)
        for wheel in Path(folder).glob("*.whl"):
            shutil.copy(wheel, out)


def run(*command: str | Path, **variables: str) -> list[str]:
    """Run a Python module that is a command, and return the lines that it prints.

    Raises:
        UserError: it failed; what it says about that in one line.
    """
    environment = os.environ | variables
    done = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        said = " ".join(line.strip() for line in done.stderr.splitlines() if not line.lower().startswith("warning"))
        reason = shortened(said, _LONGEST_REASON)
        raise UserError(f"{' '.join(map(str, command[:2]))}, which needs a network, failed: {reason}")
    return done.stdout.splitlines()


if __name__ == "__main__":
    sys.exit(main())
