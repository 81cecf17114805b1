"""How fast videos are read: clips per second of processor time, which is what one core of data workers gives."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from everest_ds.config.errors import UserError
from everest_ds.config.finetuning import FinetuneRecipe
from everest_ds.config.schema import Recipe
from everest_ds.data.augment import ClipAugment
from everest_ds.data.dataset import ClipDataset, ReadingTime
from everest_ds.data.loader import epoch_order
from everest_ds.data.manifest import read_manifest

_LIMIT_S = 10.0


@dataclass(frozen=True, kw_only=True)
class ReadingRate:
    """``clips_per_s`` per core; ``seconds`` by the clock per clip, decoding and the rest; ``videos`` that were read."""

    clips_per_s: float
    seconds: ReadingTime
    videos: int


def training_rate(recipe: Recipe, *, limit_s: float = _LIMIT_S) -> ReadingRate:
    """Read videos of ``data.train`` as the recipe's training would, for a while.

    Raises:
        UserError: there is no manifest, or nothing readable in it.
    """
    if recipe.data.train is None:
        raise UserError("data.train: no training manifest to read from; give data.train=/path/to/train.csv")
    entries = read_manifest(recipe.data.train, recipe.data.root, key="data.train")
    dataset = ClipDataset(
        entries,
        recipe.data,
        frames=recipe.model.candidate_frames,
        image_size=recipe.model.image_size,
        tokens=0,
        seed=recipe.train.seed,
        transform=ClipAugment(recipe.augment) if isinstance(recipe, FinetuneRecipe) else None,
    )
    keys = ((0, int(video)) for video in epoch_order(len(entries), recipe.train.seed, 0))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as data workers have it
    try:
        return reading_rate(dataset, keys, limit_s=limit_s)
    finally:
        torch.set_num_threads(threads)


def reading_rate(dataset: ClipDataset, keys: Iterable[tuple[int, int]], *, limit_s: float = math.inf) -> ReadingRate:
    """Read samples in this process and time them.

    Counted is the processor's time of all threads: decord decodes in a thread of its own.

    Args:
        dataset: whose samples are read.
        keys: (epoch, index) of the samples.
        limit_s: stop after so many seconds.

    Raises:
        UserError: none could be read.
    """
    clips, videos, decode, transform = 0, 0, 0.0, 0.0
    started, used = time.monotonic(), time.process_time()
    reason = "no videos"
    for key in keys:
        sample = dataset[key]
        if sample.bad:
            reason = f"{sample.bad[0].path}: {sample.bad[0].reason}"
        if sample.index >= 0:
            clips, videos = clips + len(sample.clips), videos + 1
            decode, transform = decode + sample.seconds.decode, transform + sample.seconds.transform
        if time.monotonic() - started > limit_s:
            break
    if not clips:
        raise UserError(f"no video could be read ({reason})")
    return ReadingRate(
        clips_per_s=clips / (time.process_time() - used),
        seconds=ReadingTime(decode=decode / clips, transform=transform / clips),
        videos=videos,
    )
