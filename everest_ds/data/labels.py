"""What looks wrong with labels that a classifier can be trained on all the same."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence

from everest_ds.config.errors import shortened
from everest_ds.data.manifest import Entry
from everest_ds.data.members import is_url

_LONGEST_LIST = 200  # characters


def doubtful_labels(lists: Mapping[str, Sequence[Entry]], classes: int) -> list[str]:
    """Return a line for each kind of doubt: classes without videos, a video with two labels, a video in both lists.

    Args:
        lists: the videos, all with a label, by the setting that names their manifest; those to train on come first.
        classes: labels are 0 ... classes - 1.
    """
    doubts = list(_lacking(lists, classes))
    labels: dict[str, dict[str, int]] = {}
    for key, entries in lists.items():
        labels[key], several = _by_video(entries)
        doubts += _several(key, several)
    train, *tests = labels.items()
    return [*doubts, *(line for test in tests for line in _in_both(train, test))]


def _lacking(lists: Mapping[str, Sequence[Entry]], classes: int) -> Iterator[str]:
    found: list[str] = []
    for key, entries in lists.items():
        lacking = sorted(set(range(classes)).difference(entry.label for entry in entries if entry.label is not None))
        if lacking:
            names = ", ".join(map(str, lacking))
            count = f" ({len(lacking)} classes)" if len(names) > _LONGEST_LIST else ""
            found.append(f"{key} has {'none' if found else 'no video'} of {shortened(names, _LONGEST_LIST)}{count}")
    if found:
        yield f"of {classes} classes, counted from 0, {', '.join(found)}"


def _by_video(entries: Sequence[Entry]) -> tuple[dict[str, int], dict[str, list[int]]]:
    """Return each video's first label, and the labels of the videos that have several."""
    first: dict[str, int] = {}
    several: dict[str, list[int]] = {}
    for entry in entries:
        if entry.label is None:
            continue
        # Of text: to look where links lead takes minutes on shared storage.
        path = entry.path if is_url(entry.path) else os.path.abspath(entry.path)  # noqa: PTH100
        if first.setdefault(path, entry.label) != entry.label:
            several.setdefault(path, [first[path]]).append(entry.label)
    return first, several


def _several(key: str, labels: Mapping[str, Sequence[int]]) -> Iterator[str]:
    if labels:
        path, found = next(iter(labels.items()))
        who = "1 video has" if len(labels) == 1 else f"{len(labels)} videos have"
        yield f"{key}: {who} more than one label, such as {path} ({' and '.join(map(str, dict.fromkeys(found)))})"


def _in_both(train: tuple[str, Mapping[str, int]], test: tuple[str, Mapping[str, int]]) -> Iterator[str]:
    (train_key, known), (test_key, labels) = train, test
    both = [path for path in labels if path in known]
    if both:
        other = sum(labels[path] != known[path] for path in both)
        contradiction = f" ({other} with another label)" if other else ""
        where = f"are in {train_key}, too{contradiction}, such as {both[0]}"
        yield f"{test_key}: {len(both)} of {len(labels)} videos {where}: accuracy on them says little"
