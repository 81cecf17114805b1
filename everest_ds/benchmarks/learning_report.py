"""The learning table as Markdown and JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from everest_ds.benchmarks.learning import (
    FINETUNE,
    HELD_OUT,
    LABELLED,
    LEAST,
    MOST,
    PRETRAIN,
    PRETRAININGS,
    SCRATCH,
    UNLABELLED,
    Cell,
    Settings,
    final_loss,
    pretrained,
)
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


def write(cells: list[Cell], settings: Settings, *, command: str, machine: str, path: Path) -> None:
    """Write the table to ``path`` (Markdown) and the numbers beside it (JSON)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(markdown(cells, settings, command=command, machine=machine), encoding="utf-8")
    numbers = [asdict(cell) | {"mean": cell.mean, "spread": cell.spread} for cell in cells]
    facts = {"command": command, "machine": machine, "seeds": settings.seeds, "cells": numbers}
    path.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def markdown(cells: list[Cell], settings: Settings, *, command: str, machine: str) -> str:
    """Return the table, the differences that the method promises, and how they came about."""
    found = {(cell.pretraining, cell.finetuning): cell for cell in cells}
    seeds = ", ".join(map(str, settings.seeds))
    lines = [
        "# The learning table",
        "",
        f"Written by `{command}` ({machine}).",
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
        loss = _losses(settings, cell.pretraining) if cell.finetuning == MOST else ""
        lines.append(
            f"| {cell.pretraining} | {loss} | {cell.finetuning} | {cell.mean:.3f} ± {cell.spread:.3f} | {values} |"
        )
    lines += ["", "| difference | mean | by seed |", "|---|---|---|"]
    for question, left, right in _QUESTIONS:
        pairs = [found[left].accuracy[seed] - found[right].accuracy[seed] for seed in settings.seeds]
        by_seed = " ".join(f"{pair:+.3f}" for pair in pairs)
        lines.append(f"| {question} | {sum(pairs) / len(pairs):+.3f} | {by_seed} |")
    return "\n".join(lines) + "\n"


def _losses(settings: Settings, row: str) -> str:
    if PRETRAININGS[row].overrides is None:
        return ""
    return " ".join(f"{final_loss(pretrained(settings, seed, row)):.3f}" for seed in settings.seeds)
