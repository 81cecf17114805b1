"""A fine-tuning run: a classifier from a pre-trained encoder, through the same engine and loop as pre-training."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

from everest_ds.config.ds_config import zero_stage
from everest_ds.config.errors import UserError
from everest_ds.config.finetuning import FinetuneRecipe, FinetuneTrainConfig
from everest_ds.config.load import build, group
from everest_ds.data.augment import ClipAugment
from everest_ds.data.dataset import ClipDataset
from everest_ds.data.labels import doubtful_labels
from everest_ds.data.manifest import Entry, check_labels, count_classes, read_manifest
from everest_ds.models import VideoClassifier
from everest_ds.models.weights import Weights, load_encoder, read_weights
from everest_ds.training.engine import build_model
from everest_ds.training.job import Job, run
from everest_ds.training.resume import find_resume

log = logging.getLogger(__name__)

_KEY = "train.pretrained"
_FEWEST_CLASSES, _MOST_CLASSES = 2, 100_000


def finetune(tree: Mapping[str, Any], raw_ds_config: dict[str, Any], *, preflight: bool = True) -> int:
    """Run fine-tuning to its end on this rank. Returns the exit code.

    Args:
        tree: what the recipe and its overrides say, see :func:`everest_ds.config.load.read_tree`; the clip's and the
            encoder's shape is the pre-trained model's where the tree doesn't say.
        raw_ds_config: a DeepSpeed JSON as loaded.
        preflight: whether a run that doesn't fit is refused.

    Raises:
        UserError: anything in the recipe, the JSON, the weights or the data that can't be, or memory doesn't suffice.
    """
    return run(prepare(tree, raw_ds_config, preflight=preflight))


def prepare(tree: Mapping[str, Any], raw_ds_config: dict[str, Any], *, preflight: bool = True) -> Job:
    """Resolve a fine-tuning run; raises UserError as :func:`finetune` does."""
    train = build(FinetuneTrainConfig, group(tree, "train"), "train.")
    weights = read_weights(train.pretrained, key=_KEY) if train.pretrained else None
    recipe = build(FinetuneRecipe, inherit(tree, weights))
    if recipe.train.ema_decay and zero_stage(raw_ds_config) == 3:
        raise UserError("train.ema_decay: no rank has whole parameters to average under ZeRO-3; use stage 2")
    if recipe.data.train is None:
        raise UserError("data.train: no training manifest; give data.train=/path/to/train.csv")
    entries = read_manifest(recipe.data.train, recipe.data.root, key="data.train")
    classes = count(recipe, entries, weights)
    lists = {"data.train": entries, **validation_list(recipe)}
    for key, listed in lists.items():
        check_labels(listed, classes, key=key)
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, classes=classes))
    source = find_resume(recipe)
    for doubt in doubtful_labels(lists, classes):
        log.warning("%s", doubt)
    dataset, validation = datasets(recipe, lists)
    return Job.prepare(
        recipe,
        raw_ds_config,
        build=partial(load, recipe, weights),
        dataset=dataset,
        source=source,
        validation=validation,
        preflight=preflight,
    )


def load(recipe: FinetuneRecipe, weights: Weights | None) -> tuple[VideoClassifier, list[str]]:
    """Return the classifier with the weights in it, and lines about both.

    Raises:
        UserError: the weights are another model's.
    """
    model = build_model(recipe)
    assert isinstance(model, VideoClassifier)
    return model, [describe(model, recipe), describe_weights(model, recipe, weights)]


def inherit(tree: Mapping[str, Any], weights: Weights | None) -> dict[str, Any]:
    """Put the settings that weights come with beneath those of a recipe."""
    if weights is None:
        return dict(tree)
    return {**tree, "model": {**weights.inherited, **group(tree, "model")}}


def count(recipe: FinetuneRecipe, entries: list[Entry], weights: Weights | None) -> int:
    """Count the classes: as told, as the weights' head has, or as the training labels need.

    Raises:
        UserError: a label looks like something else.
    """
    head = None if weights is None or recipe.train.new_head else weights.classes
    if recipe.model.classes or head:
        return recipe.model.classes or head or 0
    classes = max(count_classes(entries), _FEWEST_CLASSES)
    if classes > _MOST_CLASSES:
        raise UserError(
            f"data.train: the largest label is {classes - 1}; if that is right, say model.classes={classes}"
        )
    return classes


def validation_list(recipe: FinetuneRecipe) -> dict[str, list[Entry]]:
    """Return the videos of ``data.val`` by that name; nothing without a manifest.

    Raises:
        UserError: the manifest can't be read, or lists nothing.
    """
    if recipe.data.val is None:
        log.warning("data.val is not set: nothing is validated")
        return {}
    return {"data.val": read_manifest(recipe.data.val, recipe.data.root, key="data.val")}


def datasets(recipe: FinetuneRecipe, lists: Mapping[str, list[Entry]]) -> tuple[ClipDataset, ClipDataset | None]:
    """Return clips to train on, and one view of each video to validate on, if there are any."""
    shape: dict[str, Any] = {"frames": recipe.model.frames, "image_size": recipe.model.image_size}
    train = ClipDataset(
        lists["data.train"],
        recipe.data,
        **shape,
        tokens=0,
        seed=recipe.train.seed,
        transform=ClipAugment(recipe.augment),
    )
    held_out = lists.get("data.val")
    return train, None if held_out is None else ClipDataset.for_evaluation(held_out, recipe.data, **shape)


def describe(model: VideoClassifier, recipe: FinetuneRecipe) -> str:
    """One line: size, parameters, tokens, classes."""
    budget, parameters = model.budget, sum(parameter.numel() for parameter in model.parameters())
    return (
        f"{recipe.model.size} classifier: {parameters / 1e6:.1f} M parameters, {recipe.model.classes} classes; of "
        f"{budget.total} tokens {budget.visible} enter"
    )


def describe_weights(model: VideoClassifier, recipe: FinetuneRecipe, weights: Weights | None) -> str:
    """Load the weights, and say in one line what of them was a match.

    Raises:
        UserError: they are another model's.
    """
    if weights is None:
        return "weights: from scratch (no train.pretrained)"
    return f"weights: {weights.file}: {load_encoder(model, weights, new_head=recipe.train.new_head, key=_KEY)}"
