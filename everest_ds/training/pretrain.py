"""A pre-training run."""

from __future__ import annotations

from functools import partial
from typing import Any

from everest_ds.config.errors import UserError
from everest_ds.config.schema import Recipe
from everest_ds.data.dataset import ClipDataset
from everest_ds.data.manifest import read_manifest
from everest_ds.models import MaskedAutoencoder
from everest_ds.tokens import TokenBudget
from everest_ds.training.engine import build_model
from everest_ds.training.job import Job, run
from everest_ds.training.resume import find_resume


def pretrain(recipe: Recipe, raw_ds_config: dict[str, Any], *, preflight: bool = True) -> int:
    """Run pre-training to its end on this rank. Returns the exit code.

    ``preflight``: whether a run that doesn't fit is refused.

    Raises:
        UserError: anything in the recipe, the JSON or the data that can't be, or memory doesn't suffice.
    """
    return run(prepare(recipe, raw_ds_config, preflight=preflight))


def prepare(recipe: Recipe, raw_ds_config: dict[str, Any], *, preflight: bool = True) -> Job:
    """Resolve a pre-training run; raises UserError as :func:`pretrain` does."""
    if recipe.data.train is None:
        raise UserError("data.train: no training manifest; give data.train=/path/to/train.csv")
    if recipe.optim.layer_decay != 1:
        raise UserError("optim.layer_decay: layer-wise decay is for fine-tuning; pre-training wants 1.0")
    source = find_resume(recipe)
    entries = read_manifest(recipe.data.train, recipe.data.root, key="data.train")
    dataset = ClipDataset(
        entries,
        recipe.data,
        frames=recipe.model.candidate_frames,
        image_size=recipe.model.image_size,
        tokens=TokenBudget.for_pretraining(recipe.model).clip_noise,
        seed=recipe.train.seed,
    )
    return Job.prepare(
        recipe,
        raw_ds_config,
        build=partial(build, recipe),
        dataset=dataset,
        source=source,
        preflight=preflight,
    )


def build(recipe: Recipe) -> tuple[MaskedAutoencoder, list[str]]:
    """Return the model, and a line about it."""
    model = build_model(recipe)
    assert isinstance(model, MaskedAutoencoder)
    return model, [describe(model)]


def describe(model: MaskedAutoencoder) -> str:
    """One line: method, size, parameters, tokens."""
    config, budget = model.config, model.budget
    parameters = sum(parameter.numel() for parameter in model.parameters())
    frames = f"{config.frames} of {config.candidate_frames} frames trained on; " if budget.selects_frames else ""
    return (
        f"{config.method} {config.size}: {parameters / 1e6:.1f} M parameters; {frames}of {budget.total} tokens "
        f"{budget.visible} visible, {budget.reconstructed} reconstructed, {budget.dropped} dropped"
    )
