"""The learning table as Markdown and JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from everest_ds.benchmarks.learning import (
    FINETUNE,
    HELD_OUT,
    LABELLED,
    LEAST,
    MOST,
    PRETRAIN,
    SCRATCH,
    UNLABELLED,
    Cell,
    Settings,
    final_loss,
    pretrained,
)
from everest_ds.benchmarks.tables import machine
from everest_ds.data.synthetic import DIRECTIONS

# What the method promises, as differences of cells.
_QUESTIONS = (
    ("EVEREST pre-training against none", ("EVEREST", MOST), (SCRATCH, MOST)),
    ("most- against least-changing tokens in fine-tuning", ("EVEREST", MOST), ("EVEREST", LEAST)),
    (
        "most- against least-changing tokens in pre-training",
        ("EVEREST", MOST),
        ("EVEREST, least-changing tokens", MOST),
    ),
    ("separable against flattened positions", ("EVEREST", MOST), ("EVEREST, flattened positions", MOST)),
    ("EVEREST against VideoMAE, same steps", ("EVEREST", MOST), ("VideoMAE, same steps", MOST)),
    ("EVEREST against VideoMAE, same compute", ("EVEREST", MOST), ("VideoMAE, same compute", MOST)),
)


def as_json(cells: list[Cell], settings: Settings) -> dict[str, Any]:
    """Return the numbers as plain values."""
    numbers = [asdict(cell) | {"mean": cell.mean, "spread": cell.spread} for cell in cells]
    return {"seeds": settings.seeds, "cells": numbers}


def report(cells: list[Cell], settings: Settings, *, command: str) -> list[str]:
    """Return the lines of the table, the differences that the method promises, and how they came about."""
    found = {(cell.pretraining, cell.finetuning): cell for cell in cells}
    seeds = ", ".join(map(str, settings.seeds))
    lines = [
        "# The learning table",
        "",
        f"Written by `{command}` ({machine()}).",
        "",
        f"Held-out top-1 accuracy on synthetic motion videos (chance {1 / DIRECTIONS:.3f}): mean and standard "
        f"deviation over seeds {seeds}, and each seed. A seed decides videos, initial weights and order. {UNLABELLED} "
        f"videos without labels, {LABELLED} of them with labels, {HELD_OUT} held out; the settings are those of "
        f"`{PRETRAIN}` and `{FINETUNE}`.",
        "",
        "| pre-training | last loss | fine-tuning on | accuracy | by seed |",
        "|---|---|---|---|---|",
    ]
    for cell in cells:
        values = " ".join(f"{value:.3f}" for value in cell.accuracy.values())
        first = cell.finetuning == settings.table.pretrainings[cell.pretraining].finetunings[0]
        loss = _losses(settings, cell.pretraining) if first else ""
        lines.append(
            f"| {cell.pretraining} | {loss} | {cell.finetuning} | {cell.mean:.3f} ± {cell.spread:.3f} | {values} |"
        )
    asked = [question for question in _QUESTIONS if {*question[1:]} <= set(found)]
    lines += ["", "| difference | mean | by seed |", "|---|---|---|"] if asked else []
    for question, left, right in asked:
        pairs = [found[left].accuracy[seed] - found[right].accuracy[seed] for seed in settings.seeds]
        by_seed = " ".join(f"{pair:+.3f}" for pair in pairs)
        lines.append(f"| {question} | {sum(pairs) / len(pairs):+.3f} | {by_seed} |")
    return lines


def _losses(settings: Settings, row: str) -> str:
    if settings.table.pretrainings[row].overrides is None:
        return ""
    return " ".join(f"{final_loss(pretrained(settings, seed, row)):.3f}" for seed in settings.seeds)
