"""How many clips a second does a core read? Storage forms in turn, in one process, as ratios.

Counted are seconds of the processor, of all threads together: decord decodes in a thread of its own, and a core is what
a data worker costs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from everest_ds.benchmarks.footage import write_footage
from everest_ds.benchmarks.reference_data import read_clip
from everest_ds.benchmarks.tables import Spread
from everest_ds.config.errors import UserError
from everest_ds.config.schema import DataConfig, Decoder, ModelConfig, check
from everest_ds.data.dataset import NO_TIME, ClipDataset
from everest_ds.data.manifest import Entry, read_manifest
from everest_ds.data.members import Member
from everest_ds.data.prepare.rewrite import MANIFEST, Encoding, rewrite
from everest_ds.data.prepare.scan import BAD, Limits
from everest_ds.data.prepare.shards import write_shards
from everest_ds.data.prepare.sources import read_source
from everest_ds.data.randomness import Stream, generator
from everest_ds.data.rate import ReadingRate, reading_rate

REFERENCE = "decord and PIL, frame by frame: originals"
_SEED = 0
_LIMIT_S = 600.0
_SHARD_BYTES = 2**30


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a benchmark is asked for.

    ``folder`` takes videos and their copies; ``videos`` of generated footage, unless ``manifest`` lists some; ``views``
    clips per opened file where several are read; ``pairs`` rounds, each of which reads every video in every form.
    """

    folder: Path
    manifest: Path | None = None
    videos: int = 6
    views: int = 4
    pairs: int = 5
    decoder: Decoder = "decord"

    def __post_init__(self) -> None:
        for key in ("videos", "views", "pairs"):
            check(getattr(self, key) > 0, f"--{key}", f"must be positive, got {getattr(self, key)}")


@dataclass(kw_only=True, eq=False)
class Form:
    """A storage form; ``read`` reads every video once, in the way that it has in a round."""

    name: str
    read: Callable[[int], ReadingRate]
    rounds: list[ReadingRate] = field(default_factory=list)

    @property
    def clips_per_s(self) -> list[float]:
        """Of each round."""
        return [rate.clips_per_s for rate in self.rounds]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A form's clips per second and core; wall milliseconds per clip of decoding and of the rest."""

    form: str
    clips_per_s: Spread
    decode_ms: float
    transform_ms: float


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Clips per second of one form over those of another, round by round."""

    numerator: str
    denominator: str
    spread: Spread


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came out."""

    rows: list[Row]
    ratios: list[Ratio]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def measure(settings: Settings, say: Callable[[str], None]) -> Result:
    """Read every video in every form; ``say`` is told what is done, a line at a time.

    Raises:
        UserError: a setting that can't be, or videos that can't be read.
    """
    torch.set_num_threads(1)
    originals, prepared, shards = storage(settings, say)
    several = settings.views
    forms = [
        Form(name=REFERENCE, read=reference(originals)),
        Form(name="originals", read=ours(originals, settings, views=1)),
        Form(name=f"originals, {several} clips a file", read=ours(originals, settings, views=several)),
        Form(name="prepared", read=ours(prepared, settings, views=1)),
        Form(name=f"prepared, {several} clips a file", read=ours(prepared, settings, views=several)),
        Form(name=f"prepared, in shards, {several} clips a file", read=ours(shards, settings, views=several)),
    ]
    for form in forms:
        form.read(0)  # warm
    for number in range(1, settings.pairs + 1):
        for form in forms:
            form.rounds.append(form.read(number))
        say(f"round {number} of {settings.pairs}: {', '.join(f'{form.clips_per_s[-1]:.1f}' for form in forms)} clips/s")
    return Result(rows=[_row(form) for form in forms], ratios=compare(forms))


def storage(settings: Settings, say: Callable[[str], None]) -> tuple[list[Entry], list[Entry], list[Entry]]:
    """Return the videos as they come, prepared copies of them, and these in shards; made where they are not there."""
    folder = settings.folder
    if settings.manifest is None:
        say(f"originals: {settings.videos} videos in {folder / 'originals'}")
        write_footage(folder / "originals", settings.videos)
    source = read_source(settings.manifest or folder / "originals/videos.csv", None)
    if any(Member.named(path) for path in source.paths):
        raise UserError("--manifest: the baseline reads plain files, not members of shards")
    say(f"prepared copies in {folder / 'prepared'}")
    rewrite(source, folder / "prepared", Limits(workers=1, limit_s=_LIMIT_S), Encoding())
    copies = folder / "prepared" / MANIFEST
    write_shards(read_source(copies, None), folder / "shards", shard_bytes=_SHARD_BYTES)
    forms = list(source.entries), read_manifest(copies), read_manifest(folder / "shards" / MANIFEST)
    missing = len(forms[0]) - len(forms[1])
    if missing:
        raise UserError(f"--manifest: {missing} of {len(forms[0])} videos can't be read: {folder / 'prepared' / BAD}")
    return forms


def reference(entries: Sequence[Entry]) -> Callable[[int], ReadingRate]:
    """Return how the baseline reads."""
    data, model = DataConfig(), ModelConfig()

    def read(epoch: int) -> ReadingRate:
        start = time.process_time()
        for video, entry in enumerate(entries):
            rng = generator(Stream.VIEW, _SEED, epoch, video, 0)
            read_clip(entry.path, data, frames=model.frames, image_size=model.image_size, rng=rng)
        rate = len(entries) / (time.process_time() - start)
        return ReadingRate(clips_per_s=rate, seconds=NO_TIME, videos=len(entries))

    return read


def ours(entries: Sequence[Entry], settings: Settings, *, views: int) -> Callable[[int], ReadingRate]:
    """Return how the project reads: what a data worker does for a sample of pre-training."""
    data, model = replace(DataConfig(), clips_per_video=views, workers=0, decoder=settings.decoder), ModelConfig()
    dataset = ClipDataset(
        entries, data, frames=model.frames, image_size=model.image_size, tokens=0, seed=_SEED, attempts=1
    )
    return lambda epoch: reading_rate(dataset, [(epoch, video) for video in range(len(entries))])


def compare(forms: Sequence[Form]) -> list[Ratio]:
    """Each form against the baseline; the prepared copies against the originals; the shards against files."""
    baseline, single, several, prepared, prepared_several, shards = forms
    pairs = [(form, baseline) for form in forms[1:]]
    pairs += [(prepared, single), (prepared_several, several), (shards, prepared_several)]
    return [
        Ratio(
            numerator=a.name,
            denominator=b.name,
            spread=Spread.of([x / y for x, y in zip(a.clips_per_s, b.clips_per_s, strict=True)]),
        )
        for a, b in pairs
    ]


def _row(form: Form) -> Row:
    decode, transform = zip(*(rate.seconds for rate in form.rounds), strict=True)
    return Row(
        form=form.name,
        clips_per_s=Spread.of(form.clips_per_s),
        decode_ms=1000 * statistics.median(decode),
        transform_ms=1000 * statistics.median(transform),
    )
