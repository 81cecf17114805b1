"""Stateless randomness: every draw of the data layer comes from a generator named by what it is for.

A stream and integers such as (seed, epoch, index, view) give the same numbers in any process, at any time, so a run
resumes from a step number alone. NumPy promises this within a release; between releases its draws may change.
"""

from __future__ import annotations

import enum

import numpy as np


class Stream(enum.IntEnum):
    """What the numbers are for. The value is part of the seed: never renumber."""

    ORDER = 0  # (seed, epoch): the epoch's permutation of the videos
    VIEW = 1  # (seed, epoch, index, view): start frame, crop, flip
    NOISE = 2  # (seed, epoch, index, view): the noise that travels with the clip
    SUBSTITUTE = 3  # (seed, epoch, index, attempt): which video replaces an unreadable one
    SYNTHETIC = 4  # (seed, index): a synthetic video
    AUGMENT = 5  # (seed, epoch, index, view): RandAugment, random erasing
    STEP = 6  # (seed, step, rank): what is drawn on the device, drop path and mixing
    EXAMINE = 7  # (length): where a file is looked at before training


def generator(stream: Stream, *key: int) -> np.random.Generator:
    """Return the generator of ``key`` (non-negative integers, always the same number of them for one stream).

    The stream goes first: SeedSequence fills short keys with zeros at the end, so that (1, 2) and (1, 2, 0) are one.
    """
    return np.random.default_rng([int(stream), *key])
