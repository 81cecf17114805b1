"""Clips of videos: a sample is a pure function of (seed, epoch, index, view), whoever asks for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, get_worker_info

from everest_ds.config.schema import DataConfig
from everest_ds.data.decode import DecodeError, decode, require_decoder
from everest_ds.data.manifest import Entry
from everest_ds.data.randomness import Stream, generator
from everest_ds.data.sampling import draw_start, even_start, frame_ids
from everest_ds.data.transforms import centre_crop, cut, draw_crop

# Videos tried for one sample, itself included. With a tenth of them unreadable, ten in a row fail once in 1e10.
MAX_ATTEMPTS = 10
NO_LABEL = -1
LOST = -1


class Failure(NamedTuple):
    """A video that could not be read, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Sample:
    """The views of one video.

    ``clips`` uint8 (V, 3, T, S, S); ``noise`` float32 (V, N), uniform in [0, 1); ``label`` of the video or -1;
    ``index`` of the video that was read, or -1 if none could be (the clips are black then); ``bad`` the videos that
    failed on the way.
    """

    clips: torch.Tensor
    noise: torch.Tensor
    label: int
    index: int
    bad: list[Failure]


class ClipDataset(Dataset[Sample]):
    """Clips by (epoch, index), decoded from one opened file per item.

    Args:
        entries: the videos.
        data: stride, clips_per_video, decoder, crops and flip.
        frames: T, frames of a clip.
        image_size: S, pixels.
        tokens: N, the length of the uniform noise that travels with each clip.
        seed: the run's.
        augment: random start, crop and flip; False: evenly spread starts and the centre square, for evaluation.
        attempts: videos tried for one sample; 1 never substitutes, as evaluation must.

    Raises:
        UserError: the decoder's library is missing.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        data: DataConfig,
        *,
        frames: int,
        image_size: int,
        tokens: int,
        seed: int,
        augment: bool = True,
        attempts: int = MAX_ATTEMPTS,
    ) -> None:
        require_decoder(data.decoder)
        self.data = data
        self._frames, self._size, self._tokens = frames, image_size, tokens
        self._seed, self._augment, self._attempts = seed, augment, attempts
        self._paths = _PackedText(entry.path for entry in entries)
        labels = (NO_LABEL if entry.label is None else entry.label for entry in entries)
        self._labels = np.fromiter(labels, dtype=np.int64, count=len(entries))
        # Per worker, the video that it is reading, -1 between samples: the name to give when one hangs or dies.
        self.reading = torch.full((max(1, data.workers),), LOST).share_memory_()

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def labels(self) -> NDArray[np.int64]:
        """Labels of the videos (len,), -1 where the manifest has none."""
        return self._labels

    def path(self, index: int) -> str:
        """Return the path of a video."""
        return self._paths[index]

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        try:
            return self._sample(epoch, index)
        finally:
            self._mark(LOST)

    def _sample(self, epoch: int, index: int) -> Sample:
        noise = torch.from_numpy(np.stack([self._noise(epoch, index, view) for view in range(self._views)]))
        bad: list[Failure] = []
        for video in self._candidates(epoch, index):
            self._mark(video)
            try:
                clips = self._clips(epoch, index, video)
            except DecodeError as error:
                bad.append(Failure(error.path, error.reason))
            else:
                return Sample(clips, noise, int(self._labels[video]), video, bad)
        # Said in the sample, not raised: the loader would wrap an exception in a worker's trace.
        black = torch.zeros((self._views, 3, self._frames, self._size, self._size), dtype=torch.uint8)
        return Sample(black, noise, NO_LABEL, LOST, bad)

    @property
    def _views(self) -> int:
        return self.data.clips_per_video

    def _noise(self, epoch: int, index: int, view: int) -> NDArray[np.float32]:
        return generator(Stream.NOISE, self._seed, epoch, index, view).random(self._tokens, dtype=np.float32)

    def _candidates(self, epoch: int, index: int) -> Iterator[int]:
        """Yield the video itself, then its substitutes, none twice."""
        tried = set()
        for attempt in range(self._attempts):
            video = index if attempt == 0 else self._substitute(epoch, index, attempt)
            if video not in tried:
                tried.add(video)
                yield video

    def _mark(self, video: int) -> None:
        worker = get_worker_info()
        self.reading[0 if worker is None else worker.id] = video

    def _substitute(self, epoch: int, index: int, attempt: int) -> int:
        return int(generator(Stream.SUBSTITUTE, self._seed, epoch, index, attempt).integers(len(self)))

    def _clips(self, epoch: int, index: int, video: int) -> torch.Tensor:
        """Return the views uint8 (V, 3, T, S, S) of ``video``, drawn as those of sample ``index``."""
        rngs = [generator(Stream.VIEW, self._seed, epoch, index, view) for view in range(self._views)]

        def choose(length: int) -> NDArray[np.int64]:
            starts = [self._start(length, view, rng) for view, rng in enumerate(rngs)]
            return np.concatenate([frame_ids(length, s, self._frames, self.data.stride) for s in starts])

        frames = decode(self.path(video), choose, self.data.decoder)
        views = np.split(frames, self._views)
        return torch.stack([self._view(view, rng) for view, rng in zip(views, rngs, strict=True)])

    def _start(self, length: int, view: int, rng: np.random.Generator) -> int:
        if self._augment:
            return draw_start(length, self._frames, self.data.stride, rng)
        return even_start(length, self._frames, self.data.stride, view, self._views)

    def _view(self, frames: NDArray[np.uint8], rng: np.random.Generator) -> torch.Tensor:
        height, width = frames.shape[1:3]
        if self._augment:
            scales, flip = self.data.crop_scales, self.data.flip
            crop = draw_crop(height, width, self._size, scales=scales, flip=flip, rng=rng)
        else:
            crop = centre_crop(height, width)
        return cut(frames, crop, self._size)


class _PackedText:
    """Many strings in two arrays.

    Workers are forked, and reading a Python string writes its reference count: a list of a million paths would slowly
    be copied into every worker of every rank.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        encoded = [string.encode() for string in strings]
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._ends = np.cumsum([len(string) for string in encoded], dtype=np.int64)

    def __getitem__(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        return self._bytes[start : self._ends[index]].tobytes().decode()
