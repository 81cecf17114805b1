"""Which run a command continues, and whether it may: read on each rank before any talks to another."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from everest_ds.config.batches import largest_divisor
from everest_ds.config.errors import UserError
from everest_ds.config.load import AnyRecipe, to_tree
from everest_ds.config.schema import ModelConfig, Recipe
from everest_ds.training import checkpoint_files as files
from everest_ds.training import ranks
from everest_ds.training.run_dir import RunDir

log = logging.getLogger(__name__)

# Settings of a model that change nothing about its weights.
_FREE_TO_CHANGE = ("attention", "checkpointing")
# Settings that decide which samples a step number stands for.
_ORDER_OF_SAMPLES = (("data", "train"), ("data", "clips_per_video"), ("train", "seed"))


def find_resume(recipe: Recipe) -> RunDir | None:
    """Return the run directory to continue from, or None to start afresh.

    Raises:
        UserError: the output directory holds a run that would be overwritten, there is nothing to continue from, or
            it is a run of another model.
    """
    output, resume = RunDir(Path(recipe.train.output_dir)), recipe.train.resume
    source = output if resume == "auto" else RunDir(Path(resume))
    # What was logged and not saved is no reason: a run that was killed early is started by the same command again.
    saved = output.has_checkpoint() or output.weights.is_file()
    if output.has_results() if resume == "off" else source != output and saved:
        raise UserError(
            f"train.output_dir: {output.path} already holds a run; continue it with --resume auto, or choose another "
            "train.output_dir"
        )
    if resume == "auto" and output.has_results() and not output.has_checkpoint():
        log.warning("train.resume: the run in %s was not saved: it starts from step 0", output.path)
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


def keep_global_batch(recipe: AnyRecipe, source: RunDir | None) -> AnyRecipe:
    """Return the recipe with the global batch of the run that it continues, where it says the micro-batch alone.

    On other ranks the same micro-batch would make another global batch: the number of passes changes in its place,
    and where that doesn't come out even, the micro-batch becomes smaller. One that is "auto" is chosen for it later.
    """
    micro, world = recipe.train.micro_batch, ranks.world_size()
    if source is None or recipe.train.global_batch is not None or micro is None:
        return recipe
    total = saved_batch(source)
    if isinstance(micro, int):
        micro = 0 if total % world else largest_divisor(total // world, micro, recipe.data.clips_per_video)
    if total <= 0 or not micro:
        return recipe
    return replace(recipe, train=replace(recipe.train, global_batch=total, micro_batch=micro))


def saved_batch(source: RunDir) -> int:
    """Return the global batch of a saved run, 0 where it isn't known."""
    for folder in files.newest_first(source.checkpoints):
        try:
            return int(files.read_state(folder)["global_batch"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return 0


def _first_difference(saved: ModelConfig, asked: ModelConfig) -> str:
    old, new = to_tree(saved), to_tree(asked)
    for key in old:
        if key not in _FREE_TO_CHANGE and old[key] != new[key]:
            return f"model.{key} is {old[key]} there and {new[key]} here"
    return ""
