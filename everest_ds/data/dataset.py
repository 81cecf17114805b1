"""Clips of videos: a sample is a pure function of (seed, epoch, index, view), whoever asks for it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, get_worker_info

from everest_ds.config.schema import DataConfig
from everest_ds.data.decode import DecodeError, decode, require_decoder
from everest_ds.data.manifest import Entry
from everest_ds.data.members import require_storage
from everest_ds.data.randomness import Stream, generator
from everest_ds.data.sampling import SAMPLINGS
from everest_ds.data.transforms import RANDOM_CROPS, cut, square_crops

# Videos tried for one sample, itself included. With a tenth of them unreadable, ten in a row fail once in 1e10.
MAX_ATTEMPTS = 10
NO_LABEL = -1
LOST = -1

Key = tuple[int, int]
"""(epoch, index) of a sample."""
ClipTransform = Callable[[torch.Tensor, np.random.Generator], torch.Tensor]
"""Maps a clip, uint8 (3, T, S, S), to another; all it draws comes from the generator."""


class Failure(NamedTuple):
    """A video that could not be read, and why."""

    path: str
    reason: str


class ReadingTime(NamedTuple):
    """Seconds that a worker spent on clips: opening and decoding the file; cropping, flipping, augmenting."""

    decode: float = 0.0
    transform: float = 0.0


NO_TIME = ReadingTime()


@dataclass(frozen=True)
class Sample:
    """The views of one video.

    ``clips`` uint8 (V, 3, T, S, S); ``noise`` float32 (V, N), uniform in [0, 1); ``label`` of the video or -1;
    ``index`` of the video that was read, or -1 if none could be (the clips are black then); ``bad`` the videos that
    failed on the way; ``seconds`` what reading took.
    """

    clips: torch.Tensor
    noise: torch.Tensor
    label: int
    index: int
    bad: list[Failure]
    seconds: ReadingTime = NO_TIME


class ClipDataset(Dataset[Sample]):
    """Clips by (epoch, index), decoded from one opened file per item.

    Args:
        entries: the videos.
        data: sampling and stride, clips_per_video, decoder, crop and flip.
        frames: T, frames of a clip.
        image_size: S, pixels.
        tokens: N, the length of the uniform noise that travels with each clip; may be 0.
        seed: the run's.
        augment: random frames, crop and flip, then ``transform``; False: evenly spread clips and squares.
        transform: what else is done to a random clip.
        crops: squares of each clip where nothing is random, spread along the long side; 1: the centre.
        attempts: videos tried for one sample; 1 never substitutes, as evaluation must.

    Raises:
        UserError: the decoder's library is missing, or one that URLs need.
        ValueError: several crops of a random clip.
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
        transform: ClipTransform | None = None,
        crops: int = 1,
        attempts: int = MAX_ATTEMPTS,
    ) -> None:
        require_decoder(data.decoder)
        require_storage(entry.path for entry in entries)
        if augment and crops != 1:
            raise ValueError("a random clip has one crop")
        self.data = data
        self._frames, self._size, self._tokens = frames, image_size, tokens
        self._seed, self._augment, self._attempts = seed, augment, attempts
        self._sampling = SAMPLINGS[data.sampling](data, frames)
        self._draw_crop = RANDOM_CROPS[data.crop](data, image_size)
        self._transform, self._crops = transform, crops
        self._paths = _PackedText(entry.path for entry in entries)
        labels = (NO_LABEL if entry.label is None else entry.label for entry in entries)
        self._labels = np.fromiter(labels, dtype=np.int64, count=len(entries))
        # Per worker, the video that it is reading, -1 between samples, and since when: who is to blame for what hangs.
        self._reading = torch.full((max(1, data.workers),), LOST).share_memory_()
        self._since = torch.zeros(max(1, data.workers), dtype=torch.float64).share_memory_()
        self._aside: dict[int, str] = {}

    @classmethod
    def for_evaluation(
        cls,
        entries: Sequence[Entry],
        data: DataConfig,
        *,
        frames: int,
        image_size: int,
        clips: int = 1,
        crops: int = 1,
    ) -> ClipDataset:
        """Return a dataset without randomness and noise: ``clips * crops`` views of every video, clip by clip.

        Args:
            entries: the videos; none stands in for another.
            data: as for training, but for clips_per_video, crop and flip, which don't matter here.
            frames: T, frames of a clip.
            image_size: S, pixels.
            clips: clips of a video, spread over its length; 1: the middle.
            crops: squares of a clip, spread along the long side; 1: the centre.

        Raises:
            UserError: the decoder's library is missing.
        """
        return cls(
            entries,
            replace(data, clips_per_video=clips),
            frames=frames,
            image_size=image_size,
            tokens=0,
            seed=0,
            augment=False,
            crops=crops,
            attempts=1,
        )

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def views(self) -> int:
        """V, views of one video in a sample."""
        return self.data.clips_per_video * self._crops

    @property
    def sample_bytes(self) -> int:
        """Of a sample's clips."""
        return math.prod(self._shape)

    @property
    def _shape(self) -> tuple[int, ...]:
        return self.views, 3, self._frames, self._size, self._size

    @property
    def labels(self) -> NDArray[np.int64]:
        """Labels of the videos (len,), -1 where the manifest has none."""
        return self._labels

    def path(self, index: int) -> str:
        """Return the path of a video."""
        return self._paths[index]

    def set_aside(self, reasons: Mapping[str, str]) -> None:
        """Take videos for unreadable from now on, for workers that start later; ``reasons`` by path."""
        if not reasons:
            return
        for video in range(len(self)):
            if (path := self.path(video)) in reasons:
                self._aside[video] = reasons[path]

    def reading_for(self, limit_s: float) -> list[int]:
        """Return the videos that workers have been reading for more than ``limit_s`` seconds; 0: all being read."""
        for_s = time.monotonic() - self._since
        return self._reading[(self._reading != LOST) & (for_s > limit_s)].tolist()

    def reading_by(self, worker: int) -> int | None:
        """Return the video that a worker is reading, or died over."""
        video = int(self._reading[worker])
        return None if video == LOST else video

    def forget_reading(self) -> None:
        """Forget what workers that are no more were reading."""
        self._reading.fill_(LOST)

    def __getitem__(self, key: Key) -> Sample:
        epoch, index = key
        try:
            return self._sample(epoch, index)
        finally:
            self._mark(LOST)

    def _sample(self, epoch: int, index: int) -> Sample:
        noise = torch.from_numpy(np.stack([self._noise(epoch, index, view) for view in range(self.views)]))
        bad: list[Failure] = []
        for video in self._candidates(epoch, index):
            if video in self._aside:
                bad.append(Failure(self.path(video), self._aside[video]))
                continue
            self._mark(video)
            try:
                clips, seconds = self._clips(epoch, index, video)
            except DecodeError as error:
                bad.append(Failure(error.path, error.reason))
            else:
                return Sample(clips, noise, int(self._labels[video]), video, bad, seconds)
        # Said in the sample, not raised: the loader would wrap an exception in a worker's trace.
        black = torch.zeros(self._shape, dtype=torch.uint8)
        return Sample(black, noise, NO_LABEL, LOST, bad)

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
        place = 0 if worker is None else worker.id
        self._since[place] = time.monotonic()
        self._reading[place] = video

    def _substitute(self, epoch: int, index: int, attempt: int) -> int:
        return int(generator(Stream.SUBSTITUTE, self._seed, epoch, index, attempt).integers(len(self)))

    def _clips(self, epoch: int, index: int, video: int) -> tuple[torch.Tensor, ReadingTime]:
        """Return the views uint8 (V, 3, T, S, S) of ``video``, drawn as those of sample ``index``, and the time."""
        read = self._drawn(epoch, index) if self._augment else self._spread()
        start = time.perf_counter()
        frames = self._decode(video, read.choose)
        decoded = time.perf_counter()
        clips = read.cut(frames)
        return clips, ReadingTime(decode=decoded - start, transform=time.perf_counter() - decoded)

    def _drawn(self, epoch: int, index: int) -> _Views:
        keys = [(self._seed, epoch, index, view) for view in range(self.views)]
        rngs = [generator(Stream.VIEW, *key) for key in keys]
        return _Views(
            choose=lambda length: [self._sampling.draw(length, rng) for rng in rngs],
            cut=lambda clips: torch.stack([self._augmented(*view) for view in zip(clips, rngs, keys, strict=True)]),
        )

    def _augmented(
        self, frames: NDArray[np.uint8], rng: np.random.Generator, key: tuple[int, int, int, int]
    ) -> torch.Tensor:
        height, width = frames.shape[1:3]
        clip = cut(frames, self._draw_crop(height, width, rng=rng), self._size)
        return clip if self._transform is None else self._transform(clip, generator(Stream.AUGMENT, *key))

    def _spread(self) -> _Views:
        views = self.data.clips_per_video

        def cut_squares(clips: list[NDArray[np.uint8]]) -> torch.Tensor:
            height, width = clips[0].shape[1:3]
            crops = square_crops(height, width, self._crops)
            return torch.stack([cut(clip, crop, self._size) for clip in clips for crop in crops])

        return _Views(
            choose=lambda length: [self._sampling.spread(length, view, views) for view in range(views)],
            cut=cut_squares,
        )

    def _decode(self, video: int, choose: Callable[[int], list[NDArray[np.int64]]]) -> list[NDArray[np.uint8]]:
        """Return the frames (T, H, W, 3) of each of the clips that ``choose`` picks knowing the number of frames."""
        path, decoder = self.path(video), self.data.decoder
        frames = decode(path, lambda length: np.concatenate(choose(length)), decoder)
        return np.split(frames, self.data.clips_per_video)


class _Views(NamedTuple):
    """How the views of a video come about: which frames each takes, knowing their number, and what is cut from them."""

    choose: Callable[[int], list[NDArray[np.int64]]]
    cut: Callable[[list[NDArray[np.uint8]]], torch.Tensor]


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
