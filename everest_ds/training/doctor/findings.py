"""What a check finds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "note", "problem"]
"""A note: runs are slower or lack something. A problem: none can be had."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One row: a subject and one line on it; ``fix`` is the command or setting that mends it, if there is one."""

    subject: str
    says: str
    level: Level = "ok"
    fix: str = ""


def can_train(findings: Iterable[Finding]) -> bool:
    """Whether nothing that was found prevents training."""
    return all(finding.level != "problem" for finding in findings)


def to_fix(findings: Iterable[Finding]) -> dict[str, list[str]]:
    """Return what the user can do, problems first, and the subjects that each command or setting mends."""
    mendable = [finding for finding in findings if finding.fix and finding.level != "ok"]
    subjects: dict[str, list[str]] = {}
    for finding in sorted(mendable, key=lambda finding: finding.level != "problem"):
        subjects.setdefault(finding.fix, []).append(finding.subject)
    return subjects
