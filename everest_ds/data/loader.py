"""Batches for one rank over a whole run: which samples, in which order, by which processes, and what was unreadable."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler, get_worker_info

from everest_ds.config.errors import UserError
from everest_ds.config.schema import DataConfig
from everest_ds.data import shared_memory
from everest_ds.data.ahead import batches_ahead, pinned_bytes
from everest_ds.data.dataset import LOST, NO_TIME, ClipDataset, Failure, Key, ReadingTime, Sample
from everest_ds.data.randomness import Stream, generator
from everest_ds.data.watch import POLL_S, ClipLoader, Report, start_worker

# Below this many tried videos a share says little: one bad file among the first three is no tenth of anything.
JUDGED_FROM = 20
_NAMED_PATHS = 10

_log = logging.getLogger(__name__)


class Batch(NamedTuple):
    """Clips of one rank and one pass; B counts clips, the views of a video side by side.

    ``clips`` uint8 (B, 3, T, H, W); ``noise`` float32 (B, N), in evaluation N is 0; ``labels`` int64 (B,), -1: none;
    ``index`` int64 (B,) of the videos, -1: lost; ``bad`` the videos that failed on the way; ``lost`` the samples for
    which no video could be read; ``seconds`` of workers, over all clips.
    """

    clips: torch.Tensor
    noise: torch.Tensor
    labels: torch.Tensor
    index: torch.Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody misses on a batch
    bad: list[Failure]
    lost: int
    seconds: ReadingTime = NO_TIME


class StepSampler(Sampler[list[Key]]):
    """The micro-batches of one rank, from ``first_step`` on: for every optimizer step, one list per accumulation pass.

    A step takes the next ``global_batch / clips_per_video`` videos of its epoch's permutation. Pass by pass and in it
    rank by rank, each takes its share, so a step's samples are the same for any split into ranks and passes. The
    incomplete last step of an epoch is left out. Iterating again starts at ``first_step`` again.

    Args:
        videos: videos in the manifest.
        seed: the run's; the order of an epoch is a function of (seed, epoch) alone.
        micro_batch: clips per rank and pass.
        clips_per_video: views per video, in one micro-batch.
        accumulation: passes per step.
        rank: this rank, of ``ranks``.
        ranks: data-parallel ranks.
        first_step: optimizer steps already done, over all epochs.
        last_step: stop before this step; None: never stop.
        key: the setting that named the manifest, for messages.

    Raises:
        UserError: fewer videos than one step takes, or a video's clips don't fit in a micro-batch evenly.
    """

    def __init__(
        self,
        videos: int,
        *,
        seed: int,
        micro_batch: int,
        clips_per_video: int = 1,
        accumulation: int = 1,
        rank: int = 0,
        ranks: int = 1,
        first_step: int = 0,
        last_step: int | None = None,
        key: str = "data.train",
    ) -> None:
        if micro_batch % clips_per_video:
            raise UserError(
                f"train.micro_batch: {micro_batch} clips do not divide into videos of data.clips_per_video = "
                f"{clips_per_video}; make it a multiple"
            )
        self._videos, self._seed = videos, seed
        self._share, self._passes = micro_batch // clips_per_video, accumulation
        self._rank, self._ranks = rank, ranks
        self._first, self._last = first_step, last_step
        if videos < self._per_step:
            clips = self._per_step * clips_per_video
            raise UserError(
                f"{key}: {videos} videos are fewer than the {self._per_step} that one step of {clips} clips takes; "
                f"lower the global batch (train.global_batch, or train.micro_batch x ranks) to "
                f"{videos * clips_per_video} or less, or list more videos"
            )

    @property
    def _per_step(self) -> int:
        return self._share * self._passes * self._ranks

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the manifest."""
        return self._videos // self._per_step

    def __iter__(self) -> Iterator[list[Key]]:
        step, order_of = self._first, -1
        order = np.empty(0, dtype=np.int64)
        while self._last is None or step < self._last:
            epoch, place = divmod(step, self.steps_per_epoch)
            if epoch != order_of:
                order, order_of = epoch_order(self._videos, self._seed, epoch), epoch
            for turn in range(self._passes):
                start = place * self._per_step + (turn * self._ranks + self._rank) * self._share
                yield [(epoch, int(video)) for video in order[start : start + self._share]]
            step += 1


def epoch_order(videos: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order (videos,) in which an epoch takes the videos."""
    return generator(Stream.ORDER, seed, epoch).permutation(videos)


def evaluation_batches(videos: int, *, batch: int, rank: int = 0, ranks: int = 1) -> list[list[Key]]:
    """Return batches of up to ``batch`` videos for one rank, every video once over all ranks.

    The ranks have equally many batches of equal sizes, as collectives need: where the videos don't divide, the first
    ones come a second time. ``Batch.index`` tells the repeats.
    """
    per_rank = -(-videos // ranks)
    mine = [(0, (rank + ranks * i) % videos) for i in range(per_rank)]
    return [mine[i : i + batch] for i in range(0, per_rank, batch)]


def collate(samples: list[Sample]) -> Batch:
    """Return the samples' views as one batch; in a worker, one that is where it is handed over.

    Left to torch, that is done in a thread of its own, and a batch for which there is no room is lost without an error.
    """
    repeats = torch.tensor([len(sample.clips) for sample in samples])
    place = torch.Tensor.share_memory_ if get_worker_info() is not None else lambda tensor: tensor
    return Batch(
        clips=place(torch.cat([sample.clips for sample in samples])),
        noise=place(torch.cat([sample.noise for sample in samples])),
        labels=place(torch.tensor([sample.label for sample in samples]).repeat_interleave(repeats)),
        index=place(torch.tensor([sample.index for sample in samples]).repeat_interleave(repeats)),
        bad=[failure for sample in samples for failure in sample.bad],
        lost=sum(sample.index == LOST for sample in samples),
        seconds=ReadingTime(*map(sum, zip(*(sample.seconds for sample in samples), strict=True))),
    )


def handed_over_bytes(dataset: ClipDataset, samples: int, device: str) -> int:
    """Return what /dev/shm must have room for, for a rank's loader of batches of so many samples."""
    data, batch_bytes = dataset.data, samples * dataset.sample_bytes
    if not data.workers:
        return 0
    # For a GPU, torch takes batches from there as they come.
    ahead = _ahead(data, batch_bytes, device) if device == "cpu" else 1
    return shared_memory.needed_bytes(data.workers, batch_bytes, ahead)


def _ahead(data: DataConfig, batch_bytes: int, device: str) -> int:
    return batches_ahead(data, batch_bytes if device == "cpu" else pinned_bytes(batch_bytes))


def build_loader(
    dataset: ClipDataset,
    batches: Iterable[list[Key]],
    *,
    device: str = "cpu",
    report: Report | None = None,
    beside_bytes: int = 0,
) -> ClipLoader:
    """Return the loader of one rank over all of ``batches`` (a :class:`StepSampler`: one iterator across epochs).

    Args:
        dataset: where samples come from, with its ``data`` settings (workers, prefetch, timeout_s).
        batches: keys of each batch, the first the longest; iterated once per iteration of the loader.
        device: the accelerator's name, such as ``cuda``; anything but ``cpu`` makes batches in pinned memory.
        report: told each video that is set aside for hanging or crashing, and why.
        beside_bytes: of /dev/shm, for another loader while this one is there (:func:`handed_over_bytes`).

    Raises:
        UserError: /dev/shm has no room for the batches.
    """
    data = dataset.data
    samples = len(next(iter(batches), ()))
    shared_memory.check(handed_over_bytes(dataset, samples, device) + beside_bytes)

    def start(keys: Iterable[list[Key]]) -> DataLoader[Sample]:
        return DataLoader(
            dataset,
            batch_sampler=keys,
            num_workers=data.workers,
            prefetch_factor=_ahead(data, samples * dataset.sample_bytes, device) if data.workers else None,
            timeout=POLL_S if data.workers else 0,
            collate_fn=collate,
            worker_init_fn=start_worker,
            pin_memory=device != "cpu",
            # Its own: the loader draws a seed when it starts, which would shift the global generator's later draws.
            generator=torch.Generator().manual_seed(0),
        )

    return ClipLoader(dataset, batches, start, report)


class BadCounts(NamedTuple):
    """How many videos were tried, how many of them were unreadable, and how many samples found no readable one.

    On one rank of a run that continues on other ranks than before, shares of them.
    """

    tried: float
    bad: float
    lost: float


class BadSamples:
    """Counts unreadable videos over a run, names each once, and says when there are too many.

    The rule: a lost sample ends the run at once, since there is nothing to train on in its place. Otherwise the share
    of bad among tried videos counts, from the run's start, once :data:`JUDGED_FROM` videos were tried.

    Args:
        max_share: data.max_bad_share.
        clips_per_video: views per video (``ClipDataset.views``), to count videos in a batch.
        lost_ends: False for evaluation, which never substitutes and where a lost sample is just a bad one.
        key: the setting that named the manifest, for messages.
    """

    def __init__(
        self, max_share: float, *, clips_per_video: int = 1, lost_ends: bool = True, key: str = "data.train"
    ) -> None:
        self._max_share, self._views, self._lost_ends, self._key = max_share, clips_per_video, lost_ends, key
        self._reasons: dict[str, str] = {}
        self._named: set[str] = set()
        self.counts = BadCounts(0, 0, 0)

    @property
    def reasons(self) -> dict[str, str]:
        """Every bad path met so far, with its first reason."""
        return dict(self._reasons)

    def sums(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return dict(self.counts._asdict())

    def restore(self, sums: Mapping[str, float]) -> None:
        """Take over what a checkpoint kept."""
        self.counts = BadCounts(*(sums.get(name, 0) for name in BadCounts._fields))

    def add(self, batch: Batch) -> None:
        """Count a batch, and remember its bad paths."""
        read = len(batch.index) // self._views - batch.lost
        tried, bad, lost = self.counts
        self.counts = BadCounts(tried + read + len(batch.bad), bad + len(batch.bad), lost + batch.lost)
        for path, reason in batch.bad:
            self._reasons.setdefault(path, reason)

    def name(self, elsewhere: Mapping[str, str] | None = None) -> None:
        """Log the bad paths that were not logged before, those that other ranks met among them."""
        self._reasons = {**(elsewhere or {}), **self._reasons}
        for path, reason in self._reasons.items():
            if path not in self._named:
                _log.warning("unreadable video %s: %s", path, reason)
        self._named.update(self._reasons)

    def check(self, counts: BadCounts | None = None) -> None:
        """Raise if too many videos are unreadable.

        Args:
            counts: sums over all ranks, so that all ranks decide alike; None: this rank's own.

        Raises:
            UserError: a sample was lost, or the share is above ``max_share``; lists paths and reasons.
        """
        tried, bad, lost = self.counts if counts is None else counts
        if lost and self._lost_ends:
            what = f"no readable video was found for {lost} sample(s), after {bad} of {tried} tried failed"
        elif tried >= JUDGED_FROM and bad > self._max_share * tried:
            what = f"{bad} of {tried} videos tried are unreadable, above data.max_bad_share = {self._max_share:g}"
        else:
            return
        raise UserError(f"{self._key}: {what}: {self._listed()}; repair them or take them out of the manifest")

    def _listed(self) -> str:
        named = [f"{path} ({reason})" for path, reason in list(self._reasons.items())[:_NAMED_PATHS]]
        more = len(self._reasons) - len(named)
        return ", ".join(named + [f"... and {more} more"] * (more > 0)) or "see the other ranks' logs"
