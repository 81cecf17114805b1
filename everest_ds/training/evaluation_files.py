"""What an evaluation leaves behind: scores.json, predictions.csv, confusion.png, and a few lines to read."""

from __future__ import annotations

import csv
import itertools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
from matplotlib.colors import PowerNorm
from torch import Tensor

from everest_ds.config.errors import UserError
from everest_ds.training.evaluate import TOP, Predictions, Scores

SCORES_FILE = "scores.json"
PREDICTIONS_FILE = "predictions.csv"
CONFUSION_FILE = "confusion.png"

# Up to so many classes each cell of the picture shows its number of videos, and each class its tick.
_NUMBERED_CLASSES = 20
_MOST_TICKS = 20
_TICK_STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
_CELL_INCHES = 0.5
_SMALLEST_INCHES, _LARGEST_INCHES = 3.0, 12.0
_WORST_CLASSES = 3
_DARK = 0.3  # share from which a number on a cell is white


def as_json(scores: Scores) -> dict[str, Any]:
    """Return scores as plain values; the accuracy of a class without videos is null."""
    by_class = zip(scores.accuracy.tolist(), scores.support.tolist(), strict=True)
    return {
        "top1": scores.top1,
        "top5": scores.top5,
        "per_class": [
            {"class": label, "accuracy": accuracy if videos else None, "videos": videos}
            for label, (accuracy, videos) in enumerate(by_class)
        ],
        "confusion": scores.confusion.tolist(),
    }


def dumps(record: dict[str, Any]) -> str:
    """Return JSON with one line per entry of the record: a confusion matrix has thousands of numbers."""
    entries = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in record.items())
    return "{\n" + ",\n".join(entries) + "\n}"


def check_output(folder: Path, *, numbered: bool) -> None:
    """Look, before the work, whether its results can be written.

    Args:
        folder: that will hold them.
        numbered: if it is taken, another name will do.

    Raises:
        UserError: it can't be made, or holds something.
    """
    if not numbered and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out: {folder} is there already and not an empty folder; name another one")
    check_writable(folder, "--out")


def check_writable(path: Path, key: str) -> None:
    """Look whether a file or folder can be made, without making it.

    Raises:
        UserError: it can't.
    """
    there = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(f"{key}: cannot write to {there} ({error.strerror})") from error


def make_folder(folder: Path, *, numbered: bool) -> Path:
    """Make the folder and return it; if it is taken and ``numbered``, the first free one of NAME-2, NAME-3, ..."""
    if not numbered:
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    for number in itertools.count(1):
        free = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        try:
            free.mkdir(parents=True)
        except FileExistsError:
            continue
        return free
    raise AssertionError("itertools.count ends never")


def write(folder: Path, record: dict[str, Any], predictions: Predictions, scores: Scores, paths: Sequence[str]) -> None:
    """Write the three files, scores.json last, so that where it is, all are.

    Args:
        folder: an existing one.
        record: what scores.json holds.
        predictions: of the readable videos.
        scores: of these predictions.
        paths: of the predicted videos, in the same order.
    """
    write_predictions(folder / PREDICTIONS_FILE, predictions, paths)
    title = f"top-1 {100 * scores.top1:.1f} % of {len(predictions.index)} videos"
    draw_confusion(folder / CONFUSION_FILE, scores.confusion, title)
    (folder / SCORES_FILE).write_text(dumps(record) + "\n", encoding="utf-8")


def write_predictions(path: Path, predictions: Predictions, paths: Sequence[str]) -> None:
    """Write one row per readable video in the manifest's order: path, label, prediction, five likeliest classes.

    Their probabilities have 6 digits. A model of fewer classes has fewer columns.
    """
    ranked = predictions.ranked()[:, :TOP]
    shares = predictions.probabilities.gather(1, ranked)
    places = range(1, ranked.shape[1] + 1)
    header = ["path", "label", "prediction", *(f"class_{i}" for i in places), *(f"probability_{i}" for i in places)]
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(header)
        columns = (paths, predictions.labels.tolist(), ranked.tolist(), shares.tolist())
        for video, label, classes, probabilities in zip(*columns, strict=True):
            rows.writerow([video, label, classes[0], *classes, *(f"{share:.6f}" for share in probabilities)])


def draw_confusion(path: Path, confusion: Tensor, title: str) -> None:
    """Draw a confusion matrix (classes, classes), each row as shares of its class; few classes with their counts."""
    classes = len(confusion)
    counts = confusion.numpy()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = min(max(classes * _CELL_INCHES, _SMALLEST_INCHES), _LARGEST_INCHES)
    figure = matplotlib.figure.Figure(figsize=(side + 2, side + 1), layout="constrained")
    axes = figure.subplots()
    # Square roots, so that a confusion of a few per cent is seen.
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    step = next(step for step in _TICK_STEPS if classes <= step * _MOST_TICKS)
    ticks = range(0, classes, step)
    axes.set_xticks(ticks, map(str, ticks), rotation=90 if step > 1 else 0)
    axes.set_yticks(ticks, map(str, ticks))
    axes.set(xlabel="prediction", ylabel="label", title=title)
    figure.colorbar(image, ax=axes, label="share of the label's videos", shrink=0.8)
    if classes <= _NUMBERED_CLASSES:
        for row, column in np.argwhere(counts):
            colour = "white" if shares[row, column] > _DARK else "black"
            axes.text(column, row, counts[row, column], ha="center", va="center", color=colour, fontsize=8)
    figure.savefig(path, dpi=160, bbox_inches="tight")


def summary(record: dict[str, Any], folder: Path) -> str:
    """Say what came out, in a few lines."""
    views = record["views"]
    lines = [
        f"{record['weights']} on {record['videos']} videos of {record['manifest']}, "
        f"{views['clips']} x {views['crops']} views each (clips x crops), {record['precision']}",
        f"top-1 {100 * record['top1']:.2f} %   top-5 {100 * record['top5']:.2f} %",
    ]
    if "probe" in record:
        choices = (f"{key} {value}" for key, value in record["probe"].items() if not isinstance(value, dict))
        lines.insert(1, f"probe of frozen features: {', '.join(choices)}")
    tested = [row for row in record["per_class"] if row["videos"]]
    worst = sorted(tested, key=lambda row: row["accuracy"])[:_WORST_CLASSES]
    rows = (f"{row['class']} ({100 * row['accuracy']:.1f} % of {row['videos']})" for row in worst)
    lines.append(f"worst classes: {', '.join(rows)}")
    if record["unreadable"]:
        lines.append(f"{len(record['unreadable'])} unreadable videos don't count; {SCORES_FILE} lists them")
    lines.append(f"written to {folder}: {SCORES_FILE}, {PREDICTIONS_FILE}, {CONFUSION_FILE}")
    return "\n".join(lines)
