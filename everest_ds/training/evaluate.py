"""What a model makes of every video of a set, exactly whatever the number of ranks, and how right that is."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from everest_ds.config.errors import UserError
from everest_ds.data.dataset import LOST, ClipDataset
from everest_ds.data.loader import BadCounts, BadSamples, build_loader, evaluation_batches
from everest_ds.data.to_device import DeviceBatches
from everest_ds.training import ranks

TOP = 5
# Passes between two looks at how many videos are unreadable: a wrong data.root ends early, and a look costs nothing.
_LOOK_EVERY = 20

Progress = Callable[[int, int], None]
"""Told the number of videos done and the number in all, over all ranks."""


@dataclass(frozen=True, kw_only=True)
class PerVideo:
    """What a function gave for each readable video, R of them, on the CPU and the same on every rank.

    ``index`` int64 (R,), ascending: places in the manifest; ``values`` float32 (R, D); ``labels`` int64 (R,), -1: none;
    ``unreadable``: the places of the others, and why.
    """

    index: Tensor
    values: Tensor
    labels: Tensor
    unreadable: dict[int, str]


class Predictions(PerVideo):
    """Class probabilities of each readable video."""

    @property
    def probabilities(self) -> Tensor:
        """Float32 (R, classes), each row's sum 1."""
        return self.values

    def ranked(self) -> Tensor:
        """Classes (R, classes), the likeliest first, the lower one first among equals."""
        return self.probabilities.argsort(dim=1, descending=True, stable=True)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Shares of right answers, 0 to 1.

    ``top1`` and ``top5`` (any of the five likeliest, or of all classes if there are fewer) over all videos; by class
    ``accuracy`` float64 (classes,), NaN where there is no video, and ``support`` int64 (classes,), its videos;
    ``confusion`` int64 (classes, classes): videos by label (row) and prediction (column).
    """

    top1: float
    top5: float
    accuracy: Tensor
    support: Tensor
    confusion: Tensor


def predict(
    model: Callable[[Tensor], Tensor],
    dataset: ClipDataset,
    *,
    videos_per_batch: int,
    device: torch.device,
    bad_samples: BadSamples,
    progress: Progress | None = None,
) -> Predictions:
    """Classify every video: softmax in fp32 of each view, averaged over a video's views. A collective call.

    Every rank runs ``model`` equally often on equally many clips, as ZeRO-3 needs, and without gradient. Switching the
    model to its evaluation mode, and back, is the caller's. Arguments and errors as in :func:`average_views`.

    Args:
        model: (B, 3, T, H, W) uint8 on ``device`` to (B, classes) logits.
        dataset: of clips for evaluation, which never substitutes a video for another.
        videos_per_batch: videos per rank and pass, all their views at once.
        device: where the model is.
        bad_samples: names and judges unreadable videos.
        progress: called on rank 0.
    """

    def probabilities(clips: Tensor) -> Tensor:
        return model(clips).float().softmax(dim=1)

    found = average_views(
        probabilities,
        dataset,
        videos_per_batch=videos_per_batch,
        device=device,
        bad_samples=bad_samples,
        progress=progress,
    )
    return Predictions(**vars(found))


@torch.no_grad()
def average_views(
    function: Callable[[Tensor], Tensor],
    dataset: ClipDataset,
    *,
    videos_per_batch: int,
    device: torch.device,
    bad_samples: BadSamples,
    progress: Progress | None = None,
) -> PerVideo:
    """Apply a function to all views of every video and average over a video's views, in fp32. A collective call.

    No video is lost or counted twice: where the ranks don't divide the videos, some come a second time to keep the
    ranks in step, and the repeats are dropped.

    Args:
        function: (B, 3, T, H, W) uint8 on ``device`` to (B, D), each clip by itself.
        dataset: of clips for evaluation, which never substitutes a video for another.
        videos_per_batch: videos per rank and pass, all their views at once.
        device: where the function computes.
        bad_samples: names and judges unreadable videos (``lost_ends=False``); kept from call to call, it names each
            once.
        progress: called on rank 0.

    Raises:
        UserError: more videos are unreadable than ``data.max_bad_share`` allows, or all of them.
    """
    videos, world = len(dataset), ranks.world_size()
    batches = evaluation_batches(videos, batch=videos_per_batch, rank=ranks.rank(), ranks=world)
    values, readable = [], []
    tried = lost = 0
    loader = DeviceBatches.on(device, iter(build_loader(dataset, batches, device=device.type)))
    for turn, (keys, batch) in enumerate(zip(batches, loader, strict=True)):
        by_clip = function(batch.clips).float()
        loader.prefetch()
        values.append(by_clip.unflatten(0, (len(keys), -1)).mean(dim=1))
        readable.append(batch.index.unflatten(0, (len(keys), -1))[:, 0] != LOST)
        bad_samples.add(batch)
        tried, lost = tried + len(keys), lost + batch.lost
        if turn % _LOOK_EVERY == _LOOK_EVERY - 1 and turn < len(batches) - 1:
            _judge(bad_samples, tried * world, sum(ranks.gather(lost)))
        if progress is not None and ranks.is_main():
            progress(min(tried * world, videos), videos)
    index = torch.tensor([video for keys in batches for _, video in keys])
    return _together(index, torch.cat(values), torch.cat(readable), dataset, bad_samples)


def _together(
    index: Tensor, values: Tensor, readable: Tensor, dataset: ClipDataset, bad_samples: BadSamples
) -> PerVideo:
    """Gather the ranks' parts, once each, in the manifest's order; judge the unreadable videos by exact counts."""
    index, found = _gather(torch.stack([index, readable.long()], dim=1).to(values.device)).cpu().unbind(dim=1)
    values = _gather(values).cpu()
    # The first place of each video: what comes again is a repeat.
    order = index.argsort(stable=True)
    first = torch.ones_like(index, dtype=torch.bool)
    first[1:] = index[order][1:] != index[order][:-1]
    order = order[first]
    index, values, readable = index[order], values[order], found[order].bool()
    reasons = _judge(bad_samples, len(index), int((~readable).sum()))
    unreadable = {video: reasons[dataset.path(video)] for video in index[~readable].tolist()}
    if not readable.any():
        video, reason = next(iter(unreadable.items()))
        raise UserError(f"none of {len(index)} videos can be read, such as {dataset.path(video)} ({reason})")
    labels = torch.from_numpy(dataset.labels)[index]
    return PerVideo(index=index[readable], values=values[readable], labels=labels[readable], unreadable=unreadable)


def _judge(bad_samples: BadSamples, tried: int, bad: int) -> Mapping[str, str]:
    """Let rank 0 name what any rank could not read, and every rank decide alike whether that is too much.

    Returns:
        Path and reason of all of them.
    """
    reasons = dict(ChainMap(*ranks.gather(bad_samples.reasons)))
    if ranks.is_main():
        bad_samples.name(reasons)
    bad_samples.check(BadCounts(tried, bad, 0))
    return reasons


def _gather(mine: Tensor) -> Tensor:
    """Return the ranks' tensors, of equal shape, one after the other along the first dimension."""
    if ranks.world_size() == 1:
        return mine
    parts = [torch.empty_like(mine) for _ in range(ranks.world_size())]
    dist.all_gather(parts, mine.contiguous())
    return torch.cat(parts)


def score(predictions: Predictions, classes: int) -> Scores:
    """Compare predictions with labels, which must be in [0, classes)."""
    ranked, labels = predictions.ranked(), predictions.labels
    right = ranked == labels[:, None]
    confusion = torch.bincount(labels * classes + ranked[:, 0], minlength=classes**2).view(classes, classes)
    support = confusion.sum(dim=1)
    return Scores(
        top1=right[:, :1].any(dim=1).double().mean().item(),
        top5=right[:, :TOP].any(dim=1).double().mean().item(),
        accuracy=confusion.diag() / support.double(),
        support=support,
        confusion=confusion,
    )
