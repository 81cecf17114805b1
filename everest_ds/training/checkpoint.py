"""Saving a run and finding the place to continue from."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from everest_ds.config.errors import UserError
from everest_ds.config.load import to_tree
from everest_ds.config.schema import ModelConfig, Recipe
from everest_ds.training import ranks
from everest_ds.training.average import Average
from everest_ds.training.run_dir import RunDir

log = logging.getLogger(__name__)

_AVERAGE_FILE = "average.safetensors"
# Settings of a model that change nothing about its weights.
_FREE_TO_CHANGE = ("attention", "checkpointing")
# Settings that decide which samples a step number stands for.
_ORDER_OF_SAMPLES = (("data", "train"), ("data", "clips_per_video"), ("train", "global_batch"), ("train", "seed"))


def find_resume(recipe: Recipe) -> RunDir | None:
    """Return the run directory to continue from, or None to start afresh.

    Raises:
        UserError: the output directory holds a run that would be overwritten, there is nothing to continue from, or
            it is a run of another model.
    """
    output, resume = RunDir(Path(recipe.train.output_dir)), recipe.train.resume
    source = output if resume == "auto" else RunDir(Path(resume))
    if (resume == "off" or source != output) and output.has_results():
        raise UserError(
            f"train.output_dir: {output.path} already holds a run; continue it with --resume auto, or choose another "
            "train.output_dir"
        )
    if resume == "off" or (resume == "auto" and not output.has_checkpoint()):
        return None
    found = source.read_recipe(type(recipe))
    if not source.has_checkpoint():
        raise UserError(f"train.resume: {source.path} holds no checkpoint to continue from")
    difference = _first_difference(found.model, recipe.model)
    if difference:
        raise UserError(f"train.resume: {source.path} is a run of another model ({difference})")
    for group, key in _ORDER_OF_SAMPLES:
        old, new = getattr(getattr(found, group), key), getattr(getattr(recipe, group), key)
        if old != new:
            log.warning("%s.%s was %s: samples and schedule do not continue where they stopped", group, key, old)
    return source


def save(engine: Any, run_dir: RunDir, average: Average | None, step: int) -> None:
    """Write a checkpoint of the state after ``step`` steps; a collective call."""
    tag = f"step-{step:08d}"
    if average is not None and ranks.is_main():
        # First: DeepSpeed names the checkpoint in ``latest`` when its own part is written.
        folder = run_dir.checkpoints / tag
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.cpu() for name, value in average.state.items()}, folder / _AVERAGE_FILE)
    engine.save_checkpoint(str(run_dir.checkpoints), tag=tag, client_state={"step": step})


def load(engine: Any, source: RunDir, average: Average | None = None) -> int:
    """Load the latest checkpoint and return the number of steps done; a collective call.

    Args:
        engine: to load into.
        source: the run.
        average: to load into as well.

    Raises:
        UserError: the checkpoint can't be loaded.
    """
    try:
        path, state = engine.load_checkpoint(str(source.checkpoints))
    except Exception as error:  # unpickling a damaged file, or DeepSpeed on other ranks or stages, can raise anything
        reason = " ".join(str(error).split())
        raise UserError(
            f"train.resume: {source.checkpoints / 'latest'} names a checkpoint that does not load ({reason}); resume "
            "with the ranks and ZeRO stage that it was saved with; if it is damaged, name an earlier one in 'latest'"
        ) from error
    if path is None:
        raise UserError(f"train.resume: no loadable checkpoint in {source.checkpoints}")
    done = int(state["step"])
    if average is not None:
        _load_average(average, Path(path).parent / _AVERAGE_FILE, done)
    return done


def _load_average(average: Average, file: Path, steps: int) -> None:
    try:
        average.load(load_file(file), steps)
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"train.resume: {file}: no averaged weights to continue ({error}); was ema_decay 0?") from error


def _first_difference(saved: ModelConfig, asked: ModelConfig) -> str:
    old, new = to_tree(saved), to_tree(asked)
    for key in old:
        if key not in _FREE_TO_CHANGE and old[key] != new[key]:
            return f"model.{key} is {old[key]} there and {new[key]} here"
    return ""
