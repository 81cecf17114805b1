"""The table of checks, and how one is made: by itself, so that a broken package hides no other finding."""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from everest_ds.training.doctor.findings import Finding
from everest_ds.training.doctor.imports import failure, in_a_line


@dataclass(frozen=True, kw_only=True)
class Check:
    """A row: ``function`` of the doctor's ``module`` returns findings; ``needs`` is a package that must import."""

    subject: str
    module: str
    function: str
    needs: str = ""
    quick: bool = True


CHECKS = (
    Check(subject="packages", module="versions", function="packages"),
    Check(subject="accelerator", module="devices", function="accelerator", needs="deepspeed"),
    Check(subject="driver", module="devices", function="driver", needs="deepspeed"),
    Check(subject="cores", module="host", function="cores"),
    Check(subject="memory", module="host", function="memory"),
    Check(subject="/dev/shm", module="host", function="shared_memory"),
    Check(subject="disk", module="host", function="disk"),
    Check(subject="open files", module="host", function="open_files"),
    Check(subject="ops", module="adam", function="every_run", needs="deepspeed"),
    Check(subject="ops of offload", module="adam", function="offload", needs="deepspeed", quick=False),
    Check(subject="apex", module="adam", function="apex", needs="deepspeed"),
    Check(subject="decoders", module="decoders", function="loading", needs="numpy"),
    Check(subject="decoding", module="decoders", function="decoding", needs="av", quick=False),
)


def examine(*, quick: bool) -> list[Finding]:
    """Make all checks, or those that take no time, and return what they find."""
    with _quiet():
        return [finding for check in CHECKS if check.quick or not quick for finding in make(check)]


def make(check: Check) -> list[Finding]:
    """Make one check. What it raises is a finding, too."""
    if check.needs and failure(check.needs):
        return [Finding(subject=check.subject, level="note", says=f"not looked at: {check.needs} does not import")]
    try:
        module = importlib.import_module(f"{__package__}.{check.module}")
        found: list[Finding] = getattr(module, check.function)()
    except Exception as error:
        fix = "make install" if isinstance(error, ImportError) else ""
        return [Finding(subject=check.subject, level="problem", says=f"the check failed: {in_a_line(error)}", fix=fix)]
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep stdout for the page, and the remarks of torch and DeepSpeed on missing devices to themselves."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        # Whatever DeepSpeed prints.
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logging.disable(disabled)
