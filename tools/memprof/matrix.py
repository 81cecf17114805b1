"""The accuracy matrix: predicted against measured over many configurations, as a Markdown table."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everest_ds.config.ds_config import load_ds_config, with_precision
from everest_ds.config.finetuning import PHASES
from everest_ds.config.load import load_as
from everest_ds.config.schema import Recipe
from everest_ds.memory.plan import device_type_here, name_of, plan
from everest_ds.memory.traffic import message_bytes
from tools.memprof import asking
from tools.memprof.launch import launch
from tools.memprof.measure import job

DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"
# Size, image side, and clips per rank: enough of them that a step needs hundreds of MiB, so that what the resident set
# holds besides tensors doesn't drown it.
SIZES = (("vit_micro", 48, 64), ("vit_small", 224, 2))
# The phase, the network, and its checkpointing.
NETWORKS = (
    ("pretrain", ("model.method=everest",), ("none", "full")),
    ("pretrain", ("model.method=videomae",), ("none", "full")),
    ("finetune", ("model.classes=400", "model.keep_ratio=0.6"), ("none",)),
    ("finetune", ("model.classes=400", "model.keep_ratio=1.0"), ("none",)),
)
STAGES = ("zero0", "zero2", "zero3")
_TITLE = "# Predicted against measured memory"
_MIB = 2**20


@dataclass(frozen=True)
class Cell:
    """One configuration of the matrix."""

    recipe: Recipe
    ds_name: str
    precision: str

    @property
    def name(self) -> str:
        """What it is, in words."""
        model = self.recipe.model
        words = (name_of(model), model.attention, model.checkpointing, self.ds_name, self.precision)
        return " ".join(words)

    @property
    def ds_config(self) -> dict[str, Any]:
        """The DeepSpeed JSON, with its precision."""
        return with_precision(load_ds_config(DS_CONFIGS / f"{self.ds_name}.json"), self.precision)


@dataclass(frozen=True)
class Row:
    """A cell's result on the rank that needed most, bytes."""

    cell: Cell
    predicted: int
    measured: int
    states_predicted: int
    states_measured: int
    rss: int
    messages_predicted: int
    messages: int

    @property
    def error(self) -> float:
        """(predicted - measured) / measured peak."""
        return self.predicted / self.measured - 1

    @property
    def states_error(self) -> float:
        """The same for what is held between steps."""
        return self.states_predicted / self.states_measured - 1

    @property
    def rss_error(self) -> float:
        """The predicted peak against the growth of the resident set."""
        return self.predicted / self.rss - 1


def cells(sizes: tuple[tuple[str, int, int], ...] = SIZES, precision: str = "fp32") -> Iterator[Cell]:
    """Every combination of the matrix."""
    for (size, side, batch), (phase, network, modes) in itertools.product(sizes, NETWORKS):
        shape = (f"model.size={size}", f"model.image_size={side}", f"train.micro_batch={batch}")
        for attention, checkpointing, ds_name in itertools.product(("fused", "eager"), modes, STAGES):
            choice = (f"model.attention={attention}", f"model.checkpointing={checkpointing}")
            yield Cell(load_as(PHASES[phase], None, [*shape, *network, *choice]), ds_name, precision)


def measure_cells(chosen: list[Cell], ranks: int, *, resident: bool = True) -> list[Row]:
    """Run cells in one launch and predict them; faster without care for the ``resident`` set."""
    jobs = [job(cell.recipe, cell.ds_config, steps=1, name=cell.name) for cell in chosen]
    measured = launch(jobs, ranks=ranks, trim=resident, load_libraries=resident)
    return [_row(cell, per_rank) for cell, per_rank in zip(chosen, measured, strict=True)]


def _row(cell: Cell, per_rank: list[dict[str, Any]]) -> Row:
    worst = max(per_rank, key=lambda m: m["measured_peak_bytes"])
    planned = plan(cell.recipe, cell.ds_config, ranks=len(per_rank), device_type=device_type_here(), rank=worst["rank"])
    return Row(
        cell=cell,
        predicted=planned.process_peak_bytes,
        measured=worst["measured_peak_bytes"],
        states_predicted=planned.states_bytes,
        states_measured=worst["states_bytes"],
        rss=worst["rss_growth_bytes"],
        messages_predicted=message_bytes(planned),
        messages=sum(worst["messages"].values()),
    )


def run(path: Path, *, ranks: int) -> int:
    """Measure the whole matrix and write it."""
    asking.check_page(path, _TITLE)
    asking.write_page(path, as_markdown(measure_cells(list(cells()), ranks), ranks))
    return 0


def as_markdown(rows: list[Row], ranks: int) -> str:
    """The matrix as a document."""
    lines = [
        _TITLE,
        "",
        f"One training step on {ranks} CPU ranks, through the deepspeed launcher; the rank that needed most.",
        f"Written by `python tools/memprof measure --ranks {ranks} --matrix FILE`.",
        "MiB; errors are (predicted - measured) / measured.",
        "*Peak* and *held* (between steps) are tensor storages; *RSS* is the growth of the process's resident set,",
        "with a C library that returns freed memory at once, against the predicted peak.",
        "",
        *(f"- {line}" for line in summary(rows)),
        "",
        "| model | clips | attention | checkpointing | DeepSpeed "
        "| predicted | peak | error | held | error | RSS | error |",
        "|---|---|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        model = row.cell.recipe.model
        batch = row.cell.recipe.train.micro_batch
        lines.append(
            f"| {name_of(model)} | {batch} x {model.image_size} px | {model.attention} | "
            f"{model.checkpointing} | {row.cell.ds_name} {row.cell.precision} | {_mib(row.predicted)} | "
            f"{_mib(row.measured)} | {row.error:+.2%} | {_mib(row.states_measured)} | {row.states_error:+.2%} | "
            f"{_mib(row.rss)} | {row.rss_error:+.1%} |"
        )
    return "\n".join([*lines, ""])


def summary(rows: list[Row]) -> Iterator[str]:
    """The worst and the median error of each column."""
    for name, errors in (
        ("peak of a step", [abs(row.error) for row in rows]),
        ("held between steps", [abs(row.states_error) for row in rows]),
        ("resident set growth", [abs(row.rss_error) for row in rows]),
    ):
        yield f"{name}: worst {max(errors):.2%}, median {statistics.median(errors):.2%}"


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / _MIB:.1f}"
