"""What is evaluated: a model with its weights, and the settings that it is tested with."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from everest_ds.config.ds_config import precision as precision_of
from everest_ds.config.ds_config import read_ds_config
from everest_ds.config.errors import UserError
from everest_ds.config.finetuning import ClassifierConfig, FinetuneRecipe
from everest_ds.config.load import build, group, read_tree, to_tree
from everest_ds.models import VideoClassifier
from everest_ds.models.weights import Weights, load_encoder, read_weights
from everest_ds.training import ranks
from everest_ds.training.run_dir import RunDir

log = logging.getLogger(__name__)

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PROBES = ("knn", "linear")
# Of frozen features: one centre view, and about as many views per pass as in testing with 5 clips x 3 crops.
_FROZEN_TEST = {"clips": 1, "crops": 1, "micro_batch": 16}
# An autoencoder brings no head and no norm after pooling: features need the first not, and the second as it starts.
_NOT_PRETRAINED = ("head.", "fc_norm.")
_UNUSED_CLASSES = 2


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to evaluate.

    Args:
        source: a run directory, or a file of weights.
        overrides: ``key=value`` settings over the run's.
        split: which manifest, ``data.<split>``; None: test where there is one, else val.
        precision: a key of :data:`PRECISIONS`, or ``auto``: the run's.
        out: folder for the results; None: one beside the weights that isn't taken.
        probe: one of :data:`PROBES`, fitted on ``data.train``; None: the classifier's own head.
        neighbours: of the nearest-neighbours probe; None: its default.
        features: write features to this file, and nothing else.

    Raises:
        UserError: some of these don't go together.
    """

    source: Path
    overrides: Sequence[str] = ()
    split: str | None = None
    precision: str = "auto"
    out: Path | None = None
    probe: str | None = None
    neighbours: int | None = None
    features: Path | None = None

    def __post_init__(self) -> None:
        if self.features is not None and (self.probe or self.out):
            raise UserError("--features: writes that file alone; leave out --probe and --out")
        if self.neighbours is not None and self.probe != "knn":
            raise UserError("--k: only --probe knn has neighbours")

    @property
    def frozen(self) -> bool:
        """Whether features are wanted, not the head's answers."""
        return self.probe is not None or self.features is not None


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model with its weights, not yet on the device, and the settings to test it with."""

    model: VideoClassifier
    recipe: FinetuneRecipe
    file: Path
    precision: str

    @classmethod
    def load(cls, request: Request) -> Subject:
        """Read weights and settings; raises UserError if they, or the request, can't be."""
        weights = read_weights(request.source, key="--from")
        if weights.classes is None and not request.frozen:
            raise UserError(
                f"{request.source} holds a pre-trained autoencoder without a head: fine-tune it first with "
                "run/finetune.py, or use --probe"
            )
        recipe = resolve(weights, request)
        if weights.classes not in (None, recipe.model.classes):
            raise UserError(
                f"model.classes: {recipe.model.classes}, but the head in {weights.file} has {weights.classes} classes; "
                "leave model.classes out"
            )
        model = VideoClassifier(recipe.model, device_type=ranks.device().type)
        match = load_encoder(model, weights, key="--from")
        new = _NOT_PRETRAINED if weights.classes is None else ()
        lacking = [name for name in match.missing if not name.startswith(new)]
        if lacking:
            raise UserError(f"--from: {weights.file} lacks {len(lacking)} tensors of this model, such as {lacking[0]}")
        return cls(model=model, recipe=recipe, file=weights.file, precision=choose_precision(request))

    def ready(self) -> VideoClassifier:
        """Return the model on the device, for inference, its parameters in the chosen precision.

        Buffers stay fp32, as in training.
        """
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(PRECISIONS[self.precision])
        return self.model.to(ranks.device()).eval().requires_grad_(False)

    def facts(self) -> dict[str, Any]:
        """What a report says about the model and how it was tested."""
        settings = to_tree(self.recipe)
        return {
            "weights": str(self.file),
            "precision": self.precision,
            "ranks": ranks.world_size(),
            "views": {key: settings["test"][key] for key in ("clips", "crops")},
            "settings": {group: settings[group] for group in ("model", "data", "test")},
        }


def resolve(weights: Weights, request: Request) -> FinetuneRecipe:
    """Return the settings to test with: those of the weights and their run, then the overrides.

    Raises:
        UserError: an override is wrong.
    """
    run = RunDir(request.source)
    found = read_tree(run.config) if run.holds_run() else {}
    if weights.classes is None:
        # Pre-training's settings of the autoencoder, the optimizer and the schedule mean nothing here.
        settings = weights.settings or {}
        kept = {key: settings[key] for key in ("attention",) if key in settings}
        tree = {"data": found.get("data"), "model": {**weights.inherited, **kept, "classes": _UNUSED_CLASSES}}
    else:
        tree = {**found, "model": {**(weights.settings or {}), "classes": weights.classes}}
    asked = read_tree(None, request.overrides)
    if weights.settings is None and "keep_ratio" not in group(asked, "model"):
        log.warning(
            "%s doesn't say its settings: model.keep_ratio=%g is taken", weights.file, ClassifierConfig.keep_ratio
        )
    if request.frozen:
        tree["test"] = _FROZEN_TEST
    recipe: FinetuneRecipe = build(FinetuneRecipe, _merged(tree, asked))
    return recipe


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def choose_precision(request: Request) -> str:
    """Return the precision to test in, a key of :data:`PRECISIONS`; the run's own where it is supported here.

    Raises:
        UserError: the one asked for isn't.
    """
    run = RunDir(request.source)
    asked = request.precision
    if asked == "auto":
        asked = precision_of(read_ds_config(run.ds_config)) if run.ds_config.is_file() else "fp32"
    accelerator = get_accelerator()
    supported = {"bf16": accelerator.is_bf16_supported, "fp16": accelerator.is_fp16_supported}
    if asked == "fp32" or supported[asked]():
        return asked
    if request.precision == "auto":
        log.warning("the run's precision, %s, is not supported by this accelerator: fp32 is used", asked)
        return "fp32"
    raise UserError(f"--precision {asked}: this accelerator does not support it; use another precision")
