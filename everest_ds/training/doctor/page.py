"""Findings as a page: a table on a terminal, plain lines in a pipe, or what scripts read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from everest_ds.training.doctor.findings import Finding, can_train, to_fix

if TYPE_CHECKING:
    from rich.table import Table

_COLOURS = {"ok": "green", "note": "yellow", "problem": "bold red"}


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """Return the fields that scripts rely on."""
    steps = [{"fix": fix, "subjects": subjects} for fix, subjects in to_fix(findings).items()]
    return {"can_train": can_train(findings), "findings": [asdict(finding) for finding in findings], "to_fix": steps}


def lines(findings: Sequence[Finding]) -> list[str]:
    """Return one line per finding."""
    widths = [max((len(text) for text in column), default=0) for column in zip(*map(_names, findings), strict=True)]
    return [f"{level:{widths[0]}}  {subject:{widths[1]}}  {says}" for level, subject, says in map(_row, findings)]


def table(findings: Sequence[Finding]) -> Table:
    """Return the same for a terminal."""
    from rich.table import Table  # noqa: PLC0415 - may be missing, and then lines do
    from rich.text import Text  # noqa: PLC0415

    made = Table(box=None, show_header=False, pad_edge=False)
    for level, subject, says in map(_row, findings):
        made.add_row(Text(level, style=_COLOURS[level]), Text(subject), Text(says))
    return made


def fixes(findings: Sequence[Finding]) -> list[str]:
    """Return what to fix, numbered."""
    mendable = to_fix(findings)
    if not mendable:
        return ["what to fix: nothing" if can_train(findings) else "what to fix: see the problems above"]
    numbered = [f"  {i}. {fix}  ({', '.join(mendable[fix])})" for i, fix in enumerate(mendable, start=1)]
    return ["what to fix", *numbered]


def verdict(findings: Sequence[Finding]) -> str:
    """Say in one line whether this machine can train."""
    return "this machine can train" if can_train(findings) else "this machine can't train: see the problems above"


def _row(finding: Finding) -> tuple[str, str, str]:
    return finding.level, finding.subject, finding.says


def _names(finding: Finding) -> tuple[str, str]:
    return finding.level, finding.subject
