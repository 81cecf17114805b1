"""Does it learn? Pre-training and fine-tuning on synthetic motion videos, several seeds, arms that differ by a setting.

Each run is the command that a user would type (run/pretrain.py, run/finetune.py), on one rank with one thread; several
run side by side. A run that is there already is not repeated, so an interrupted benchmark continues.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everest_ds.config.errors import UserError
from everest_ds.config.finetuning import FinetuneRecipe
from everest_ds.config.load import load_as, load_recipe
from everest_ds.config.schema import check
from everest_ds.data.synthetic import write_set
from everest_ds.models import MaskedAutoencoder, forward_backward_macs

ROOT = Path(__file__).parents[2]
PRETRAIN, FINETUNE = Path("run/recipes/motion.yaml"), Path("run/recipes/motion_finetune.yaml")
DS_CONFIG = Path("ds_configs/zero0.json")
UNLABELLED, LABELLED, HELD_OUT = 2000, 100, 400
MARGIN = 8  # pixels around training videos: crops shift them
_LOG_LINES = 15
_POLL_S = 1.0


MOST, ALL, LEAST = "most-changing 0.6", "all tokens", "least-changing 0.6"
# Learning rates per 256 clips that are tried, for each method's pre-training and for fine-tuning from scratch.
_RATES = (8e-3, 1.6e-2, 3.2e-2)


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """A row of the table: what the encoder comes from, and how it is fine-tuned.

    ``overrides`` of the pre-training recipe, None for no pre-training; ``shape``: overrides of both recipes;
    ``equal_compute``: as many steps as EVEREST's arithmetic pays for.
    """

    overrides: tuple[str, ...] | None = ()
    shape: tuple[str, ...] = ()
    equal_compute: bool = False
    finetunings: tuple[str, ...] = (MOST, ALL)


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows, and the fine-tunings that they name: overrides of the fine-tuning recipe."""

    pretrainings: dict[str, Pretraining]
    finetunings: dict[str, tuple[str, ...]]

    @property
    def cells(self) -> list[tuple[str, str]]:
        """Every pre-training with every fine-tuning that follows it."""
        return [(name, finetuning) for name, row in self.pretrainings.items() for finetuning in row.finetunings]


_VIDEOMAE = ("model.method=videomae",)
SCRATCH = "from scratch"
LEARNING = Table(
    pretrainings={
        SCRATCH: Pretraining(overrides=None),
        "from scratch, 3 times as long": Pretraining(
            overrides=None, shape=("train.max_steps=900", "optim.warmup_steps=90"), finetunings=(MOST,)
        ),
        "EVEREST": Pretraining(finetunings=(MOST, ALL, LEAST)),
        # The controls: Table 16 of the paper in small, and the official positions.
        "EVEREST, least-changing tokens": Pretraining(overrides=("model.selector=least",), finetunings=(MOST,)),
        "EVEREST, flattened positions": Pretraining(shape=("model.positions=flattened",), finetunings=(MOST,)),
        "VideoMAE, same steps": Pretraining(overrides=_VIDEOMAE),
        "VideoMAE, same compute": Pretraining(overrides=_VIDEOMAE, equal_compute=True, finetunings=(MOST,)),
    },
    finetunings={MOST: (), ALL: ("model.keep_ratio=1.0",), LEAST: ("model.selector=least",)},
)
_FINETUNING_RATES = {f"{MOST}, rate {rate:g}": (f"optim.base_lr={rate}",) for rate in _RATES}
TUNING = Table(
    pretrainings={
        SCRATCH: Pretraining(overrides=None, finetunings=tuple(_FINETUNING_RATES)),
        **{
            f"{name}, rate {rate:g}": Pretraining(overrides=(*method, f"optim.base_lr={rate}"), finetunings=(MOST,))
            for name, method in (("EVEREST", ()), ("VideoMAE", ("model.method=videomae",)))
            for rate in _RATES
        },
    },
    finetunings={MOST: (), **_FINETUNING_RATES},
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a benchmark is asked for.

    ``table`` of runs; ``folder`` takes videos and runs; ``side_by_side`` runs, one thread each; ``pretrain`` and
    ``finetune`` override the recipes of all arms.
    """

    table: Table
    folder: Path
    seeds: tuple[int, ...]
    side_by_side: int
    pretrain: tuple[str, ...] = ()
    finetune: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # Twice the same seed would be two processes in one run directory.
        check(len(set(self.seeds)) == len(self.seeds), "--seeds", f"each once, got {', '.join(map(str, self.seeds))}")
        check(self.side_by_side > 0, "--side-by-side", f"must be positive, got {self.side_by_side}")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Held-out top-1 accuracy of a pre-training and a fine-tuning, by seed."""

    pretraining: str
    finetuning: str
    accuracy: dict[int, float]

    @property
    def mean(self) -> float:
        """Over seeds."""
        return statistics.fmean(self.accuracy.values())

    @property
    def spread(self) -> float:
        """Standard deviation over seeds; 0 for a single one."""
        return statistics.stdev(self.accuracy.values()) if len(self.accuracy) > 1 else 0.0


def run(settings: Settings, say: Callable[[str], None]) -> list[Cell]:
    """Run what isn't there yet and read every accuracy.

    Args:
        settings: seeds, folder, runs side by side.
        say: told what is done, a line at a time.

    Raises:
        UserError: a run failed; its log is named.
    """
    resolve(settings)
    for seed in settings.seeds:
        write_videos(settings, seed)
    steps = equal_compute_steps(settings)
    say(f"VideoMAE with EVEREST's compute: {steps} steps")
    started = time.monotonic()
    stop = threading.Event()
    tasks = [(seed, row) for row in settings.table.pretrainings for seed in settings.seeds]
    with concurrent.futures.ThreadPoolExecutor(settings.side_by_side) as pool:
        futures = {pool.submit(run_row, settings, seed, row, steps, stop): (seed, row) for seed, row in tasks}
        try:
            for done, future in enumerate(concurrent.futures.as_completed(futures), start=1):
                future.result()
                seed, row = futures[future]
                elapsed = time.monotonic() - started
                left = elapsed * (len(tasks) - done) / done
                say(f"{done} of {len(tasks)}: {row}, seed {seed}; {elapsed / 60:.0f} min, about {left / 60:.0f} left")
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return [
        Cell(pretraining=p, finetuning=f, accuracy={s: accuracy(finetuned(settings, s, p, f)) for s in settings.seeds})
        for p, f in settings.table.cells
    ]


def resolve(settings: Settings) -> None:
    """Resolve every row's recipes.

    Raises:
        UserError: a key or a value that can't be, before anything has run.
    """
    for row in settings.table.pretrainings.values():
        load_recipe(ROOT / PRETRAIN, [*settings.pretrain, *(row.overrides or ()), *row.shape])
        for finetuning in row.finetunings:
            keys = [*settings.finetune, *row.shape, *settings.table.finetunings[finetuning]]
            load_as(FinetuneRecipe, ROOT / FINETUNE, keys)


def write_videos(settings: Settings, seed: int) -> None:
    """Write the videos of a seed, and the list of the few whose labels are used."""
    folder = videos(settings, seed)
    write_set(folder, train=UNLABELLED, val=HELD_OUT, margin=MARGIN, seed=seed, workers=settings.side_by_side)
    header, *lines = (folder / "train.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "labelled.csv").write_text("".join([header, *lines[:LABELLED]]), encoding="utf-8")


def equal_compute_steps(settings: Settings) -> int:
    """VideoMAE's steps for the multiply-accumulates of EVEREST's, forward and backward, counted on the models."""
    configs = [load_recipe(ROOT / PRETRAIN, [*settings.pretrain, *method]) for method in ((), _VIDEOMAE)]
    ours, theirs = (forward_backward_macs(MaskedAutoencoder, config.model) for config in configs)
    return round((configs[0].train.max_steps or 0) * ours / theirs)


def run_row(settings: Settings, seed: int, row: str, equal_steps: int, stop: threading.Event) -> None:
    """Pre-train one seed of one row, if it needs it, and fine-tune in every way that the table has."""
    folder = videos(settings, seed)
    common = [f"train.seed={seed}", f"data.root={folder}"]
    source: list[str] = []
    what = settings.table.pretrainings[row]
    if what.overrides is not None:
        output = pretrained(settings, seed, row)
        steps = [f"train.max_steps={equal_steps}"] if what.equal_compute else []
        place = [f"data.train={folder / 'train.csv'}", f"train.output_dir={output}"]
        overrides = [*settings.pretrain, *what.overrides, *what.shape, *steps]
        launch("pretrain", PRETRAIN, output, [*common, *place, *overrides], stop)
        source = ["--from", str(output)]
    for finetuning in what.finetunings:
        output = finetuned(settings, seed, row, finetuning)
        place = [
            f"data.train={folder / 'labelled.csv'}",
            f"data.val={folder / 'val.csv'}",
            f"train.output_dir={output}",
        ]
        overrides = [*common, *place, *settings.finetune, *what.shape, *settings.table.finetunings[finetuning]]
        launch("finetune", FINETUNE, output, [*source, *overrides], stop)


def launch(command: str, recipe: Path, output: Path, arguments: list[str], stop: threading.Event) -> None:
    """Run a training command to its end, unless it has ended before; its log goes beside the run directory.

    Once ``stop`` is set, the command is ended, and another isn't started.

    Raises:
        UserError: it failed, or an earlier one there had other settings.
    """
    log, asked, ended = (output.with_name(f"{output.name}.{suffix}") for suffix in ("log", "asked.json", "ended"))
    asking = json.dumps({"recipe": (ROOT / recipe).read_text(encoding="utf-8"), "arguments": arguments}, indent=1)
    if asked.is_file() and asked.read_text(encoding="utf-8") != asking:
        raise UserError(f"learning: {output} was made with other settings ({asked}); choose another --folder")
    log.parent.mkdir(parents=True, exist_ok=True)
    asked.write_text(asking, encoding="utf-8")
    if ended.is_file():
        return
    script = [sys.executable, f"run/{command}.py", "--ds_config", str(DS_CONFIG), "--recipe", str(recipe)]
    with log.open("a", encoding="utf-8") as out:
        code = wait(
            [*script, "--resume", "auto", *arguments],
            stop,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    if stop.is_set():
        return
    if code:
        end = "\n".join(log.read_text(encoding="utf-8").splitlines()[-_LOG_LINES:])
        raise UserError(f"learning: {command} ended with code {code}; the end of {log}:\n{end}")
    ended.touch()


def wait(command: list[str], stop: threading.Event, **options: Any) -> int:
    """Run a command and return its exit code; it is terminated once ``stop`` is set."""
    if stop.is_set():
        return 0
    with subprocess.Popen(command, **options) as process:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(_POLL_S)
            if stop.is_set():
                process.terminate()


def videos(settings: Settings, seed: int) -> Path:
    """The folder of a seed's videos."""
    return settings.folder / f"seed-{seed}" / "videos"


def pretrained(settings: Settings, seed: int, row: str) -> Path:
    """The run directory of a pre-training."""
    return settings.folder / f"seed-{seed}" / slug(row) / "pretrain"


def finetuned(settings: Settings, seed: int, row: str, finetuning: str) -> Path:
    """The run directory of a fine-tuning."""
    return settings.folder / f"seed-{seed}" / slug(row) / slug(finetuning)


def slug(text: str) -> str:
    """A name for a folder."""
    return "-".join("".join(c if c.isalnum() or c == "." else " " for c in text.lower()).split())


def accuracy(run_dir: Path) -> float:
    """Top-1 accuracy of a run's last validation, 0 to 1."""
    return json.loads((run_dir / "validation.jsonl").read_text(encoding="utf-8").splitlines()[-1])["top1"]


def final_loss(run_dir: Path) -> float:
    """Loss of a run's last logged step."""
    return json.loads((run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])["loss"]
