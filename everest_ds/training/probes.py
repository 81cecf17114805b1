"""Probes of frozen features: what a simple classifier makes of them says what the encoder has learned."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from everest_ds.config.errors import UserError
from everest_ds.training.evaluate import PerVideo, Predictions

log = logging.getLogger(__name__)

NEIGHBOURS = 20
# The header entries of a file of features, as JSON: a path per row, and how the features were made.
PATHS_KEY = "everest_ds.paths"
SETTINGS_KEY = "everest_ds.features"

# Inverse strengths of the linear probe's L2 penalty, on standardised features.
_PENALTIES = (0.001, 0.01, 0.1, 1.0)
_HELD_OUT = 0.2  # share of the training videos that chooses among them
_MOST_ITERATIONS = 1000


@dataclass(frozen=True, kw_only=True)
class Probed:
    """What a probe predicts, and the choices it made, for the report."""

    predictions: Predictions
    choices: dict[str, Any]


def nearest_neighbours(train: PerVideo, test: PerVideo, *, classes: int, neighbours: int | None = None) -> Probed:
    """Let each video's nearest training videos vote, weighted by 1 / cosine distance.

    Args:
        train: features and labels, 0 ... classes - 1.
        test: features of what is to be classified.
        classes: columns of the probabilities, which are shares of the votes.
        neighbours: votes; None: 20, or all training videos if there are fewer.

    Raises:
        UserError: there are fewer training videos than ``neighbours``.
    """
    count = min(NEIGHBOURS, len(train.index)) if neighbours is None else neighbours
    if not 1 <= count <= len(train.index):
        raise UserError(f"--k: expected 1 to {len(train.index)}, the readable training videos, got {count}")
    probe = KNeighborsClassifier(count, weights="distance", metric="cosine")
    probe.fit(train.values.numpy(), train.labels.numpy())
    return Probed(predictions=_predictions(probe, test, classes), choices={"neighbours": count})


def linear(
    train: PerVideo, test: PerVideo, *, classes: int, progress: Callable[[int, int], None] | None = None
) -> Probed:
    """Fit a logistic regression on standardised features.

    The strength of its L2 penalty is the one of :data:`_PENALTIES` that is right most often on a fifth of the training
    videos, held out with every class in its share where each has enough; it is then fitted again on all of them.

    Args:
        train: features and labels, 0 ... classes - 1.
        test: features of what is to be classified.
        classes: columns of the probabilities.
        progress: told the number of fits done and the number in all.

    Raises:
        UserError: there are too few training videos, or too few classes among them.
    """
    features, labels = train.values.numpy(), train.labels.numpy()
    fitted, held_out = _split(labels)
    shares: dict[float, float] = {}
    for penalty in _PENALTIES:
        probe = _fit(penalty, features[fitted], labels[fitted])
        shares[penalty] = float(probe.score(features[held_out], labels[held_out]))
        if progress is not None:
            progress(len(shares), len(_PENALTIES) + 1)
    # The first of equals: the strongest penalty.
    best = max(shares, key=lambda penalty: shares[penalty])
    probe = _fit(best, features, labels)
    if progress is not None:
        progress(len(_PENALTIES) + 1, len(_PENALTIES) + 1)
    choices = {
        "C": best,
        "held_out_videos": len(held_out),
        "held_out_top1": {f"{penalty:g}": share for penalty, share in shares.items()},
    }
    return Probed(predictions=_predictions(probe, test, classes), choices=choices)


def write_features(path: Path, features: PerVideo, paths: Sequence[str], settings: dict[str, Any]) -> None:
    """Write features as safetensors, in one move: tensors ``features`` (R, D) float32, ``labels`` and ``index`` (R,).

    Args:
        path: the file.
        features: of the readable videos.
        paths: of these videos, in the same order, for the header.
        settings: how the features were made, for the header.
    """
    tensors = {"features": features.values, "labels": features.labels, "index": features.index}
    unfinished = path.with_suffix(".unfinished")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        unfinished,
        metadata={PATHS_KEY: json.dumps(list(paths)), SETTINGS_KEY: json.dumps(settings)},
    )
    unfinished.replace(path)


def _split(labels: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the places of the training videos to fit and to hold out, the same ones every time."""
    _, counts = np.unique(labels, return_counts=True)
    if len(counts) < 2:
        raise UserError("data.train: a linear probe needs videos of at least 2 classes")
    in_shares = counts.min() >= 2 and len(labels) * _HELD_OUT >= len(counts)
    places = np.arange(len(labels))
    fitted, held_out = train_test_split(
        places, test_size=_HELD_OUT, random_state=0, stratify=labels if in_shares else None
    )
    if len(np.unique(labels[fitted])) < 2:
        raise UserError(f"data.train: {len(labels)} videos are too few to hold some out; a linear probe needs more")
    return fitted, held_out


def _fit(penalty: float, features: NDArray[np.float32], labels: NDArray[np.int64]) -> Pipeline:
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=_MOST_ITERATIONS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        probe.fit(features, labels)
    if probe[-1].n_iter_.max() >= _MOST_ITERATIONS:
        log.warning("the linear probe with C = %g was stopped after %d iterations", penalty, _MOST_ITERATIONS)
    return probe


def _predictions(probe: Any, test: PerVideo, classes: int) -> Predictions:
    """Probabilities of all classes; those that the probe has not met get none."""
    probabilities = torch.zeros(len(test.index), classes)
    met: Tensor = torch.from_numpy(probe.classes_)
    probabilities[:, met] = torch.from_numpy(probe.predict_proba(test.values.numpy())).float()
    return Predictions(index=test.index, values=probabilities, labels=test.labels, unreadable=test.unreadable)
