"""The doctor in a few lines, before the demo."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from everest_ds.config.errors import UserError
from everest_ds.training.doctor.checks import examine
from everest_ds.training.doctor.findings import Finding, can_train
from everest_ds.training.doctor.page import lines

_MACHINE = ("accelerator", "cores", "memory")


def first_look() -> None:
    """Say on stderr what isn't as it should be, or in one line that all is.

    Raises:
        UserError: nothing can be trained here.
    """
    findings = examine(quick=True)
    print(*brief(findings), sep="\n", file=sys.stderr, flush=True)
    if not can_train(findings):
        raise UserError("this machine can't train, see the problems above; python tools/doctor.py says more")


def brief(findings: Sequence[Finding]) -> list[str]:
    """Return what isn't ok, or one line on the machine."""
    noteworthy = [finding for finding in findings if finding.level != "ok"]
    if noteworthy:
        fixes = [f" ({finding.fix})" if finding.fix else "" for finding in noteworthy]
        return [line + fix for line, fix in zip(lines(noteworthy), fixes, strict=True)]
    says = {finding.subject: finding.says for finding in findings}
    machine = "; ".join(f"{name} {says[name]}" for name in _MACHINE if name in says)
    return [f"machine: {machine}; {len(findings)} checks fine"]
