"""Runs under the real launcher that are killed at chosen moments, and what must be equal afterwards."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from launching import DS_CONFIGS, ROOT, environment, launcher, metrics
from safetensors.torch import load_file

START_S = 240  # a launch takes 15 s, and longer beside others


@dataclass(frozen=True, kw_only=True)
class Case:
    """A command and its settings but for the run directory."""

    script: str
    ds: Path
    settings: tuple[str, ...]

    def command(self, run_dir: Path, *more: str) -> list[str]:
        """Of one run, which continues what is there."""
        place = f"train.output_dir={run_dir}"
        return [self.script, "--ds_config", str(self.ds), *self.settings, place, "--resume", "auto", *more]


SMALL = (
    "data.stride=1 data.workers=1 data.prefetch=1 data.crop_scales=[0.75] model.size=vit_micro model.image_size=48 "
    "train.global_batch=4 train.log_every_steps=5 train.save_every_steps=3 optim.base_lr=0.03 optim.warmup_steps=2"
).split()


def pretraining(manifest: Path, steps: int, ds: Path = DS_CONFIGS / "zero2.json") -> Case:
    settings = (*SMALL, "model.decoder_depth=1", f"data.train={manifest}", f"train.max_steps={steps}")
    return Case(script="run/pretrain.py", ds=ds, settings=settings)


def finetuning(manifest: Path, steps: int, ds: Path) -> Case:
    """With everything that has a state of its own or draws: averaged weights, drop path, mixing, validation."""
    extra = (
        f"data.train={manifest}",
        f"data.val={manifest}",
        f"train.max_steps={steps}",
        "train.ema_decay=0.9",
        "train.validate_every_epochs=0.5",
        "model.drop_path=0.2",
    )
    return Case(script="run/finetune.py", ds=ds, settings=(*SMALL, *extra))


class Running:
    """A started launcher with its whole family."""

    def __init__(self, command: list[str], ranks: int, log: Path, **variables: str) -> None:
        start = launcher(ranks)
        self.port = start[-1]
        self.begin([sys.executable, *start, *command], ranks, log, ROOT, **variables)

    def begin(self, words: list[str], ranks: int, log: Path, folder: Path, **variables: str) -> None:
        """Start a launcher of some ranks in a folder."""
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                words,
                cwd=folder,
                env=environment(ranks) | variables,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self.log = log

    def ranks(self) -> list[psutil.Process]:
        """The training processes there are, in order of their start."""
        found = [p for p in self._family() if _runs_training(p)]
        return sorted(found, key=lambda process: process.pid)

    def workers(self) -> list[psutil.Process]:
        """The decoding processes."""
        return [child for rank in self.ranks() for child in rank.children()]

    def wait(self, timeout_s: float = START_S) -> int:
        """Wait for the end; returns the launcher's exit code."""
        try:
            return self.process.wait(timeout_s)
        finally:
            self.kill()

    def wait_for(self, seen: Callable[[], bool], timeout_s: float = START_S) -> bool:
        """Wait for something; False if the run ended before."""
        deadline = time.monotonic() + timeout_s
        while not seen():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < deadline, f"waited in vain: {self.text()[-3000:]}"
            time.sleep(0.002)
        return True

    def kill(self) -> None:
        """Kill whatever there still is of it, at once."""
        family = self._family()
        for process in (*family, psutil.Process(self.process.pid) if self.process.poll() is None else None):
            with contextlib.suppress(psutil.NoSuchProcess, AttributeError):
                process.kill()
        psutil.wait_procs(family, timeout=30)
        self.process.wait()

    def left_behind(self) -> list[str]:
        """Names in shared memory, which nobody would free."""
        return [path.name for path in Path("/dev/shm").glob(f"*_{self.port}_*")]

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def _family(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []


def _runs_training(process: psutil.Process) -> bool:
    try:
        line = process.cmdline()
        parent = process.parent()
        return any(word.startswith("--local_rank=") for word in line) and (
            parent is not None and "deepspeed.launcher.launch" in " ".join(parent.cmdline())
        )
    except psutil.Error:
        return False


@dataclass(frozen=True)
class Moment:
    """When to kill, and how many: ``while_`` loading, stepping or saving; one rank or all."""

    while_: str
    all_ranks: bool
    delay_s: float

    def __str__(self) -> str:
        return f"{'all ranks' if self.all_ranks else 'one rank'} while {self.while_}, {1000 * self.delay_s:.0f} ms in"


def moments(seed: int, number: int) -> Iterator[Moment]:
    """Random moments, each kind in its turn."""
    draw = random.Random(seed)
    longest_s = {"stepping": 0.4, "saving": 0.05, "loading": 3.0}
    for i in range(number):
        kind = ("stepping", "saving", "loading")[i % 3]
        yield Moment(kind, draw.random() < 0.5, draw.random() * longest_s[kind])


def kill_at(moment: Moment, running: Running, run_dir: Path, draw: random.Random) -> bool:
    """Kill ranks of a run at a moment; False if it had ended before."""
    before = len(steps_logged(run_dir))
    saved, begun = set(checkpoints(run_dir)), set(unfinished(run_dir))
    if not running.wait_for(lambda: len(running.ranks()) == 2):
        return False
    victims = running.ranks()  # now: looking for them takes as long as saving does
    seen = {
        "loading": lambda: True,
        "stepping": lambda: len(steps_logged(run_dir)) > before or set(checkpoints(run_dir)) - saved,
        "saving": lambda: set(unfinished(run_dir)) - begun,
    }[moment.while_]
    if not running.wait_for(seen):
        return False
    time.sleep(moment.delay_s + (5.0 if moment.while_ == "loading" else 0.0))  # importing takes 5 s at least
    for victim in victims if moment.all_ranks else [draw.choice(victims)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.send_signal(signal.SIGKILL)
    return True


def steps_logged(run_dir: Path) -> list[int]:
    """Steps in metrics.jsonl, whose last line may be half written."""
    try:
        return [record["step"] for record in metrics(run_dir)]
    except (FileNotFoundError, ValueError):
        return []


def checkpoints(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").glob("step-*"))


def unfinished(run_dir: Path) -> list[tuple[str, int]]:
    """Checkpoints being written, or left so by a kill: names with what tells two of a name apart."""
    found = []
    for path in (run_dir / "checkpoints").glob(".unfinished-step-*"):
        with contextlib.suppress(FileNotFoundError):
            found.append((path.name, path.stat().st_ino))
    return found


def assert_same_run(one: Path, other: Path) -> None:
    """Equal to the last bit: weights, what was logged of losses and rates, validations."""
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    kept = ("step", "epoch", "loss", "lr", "grad_norm", "bad_samples", "bad_steps")
    curves = ([tuple(record[key] for key in kept) for record in metrics(folder)] for folder in (one, other))
    assert next(curves) == next(curves)
    validations = [folder / "validation.jsonl" for folder in (one, other)]
    if validations[0].exists():
        assert validations[0].read_text() == validations[1].read_text()


def orphans(run_dir: Path) -> list[str]:
    """Command lines of processes that still work on a run."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and f"train.output_dir={run_dir}" in process.cmdline():
                found.append(" ".join(process.cmdline()))
    return found
