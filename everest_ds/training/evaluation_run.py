"""An evaluation, put together: a classifier by its own head, or a probe of what an encoder has learned."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from everest_ds.config.errors import RankError, UserError
from everest_ds.config.finetuning import FinetuneRecipe
from everest_ds.config.progress import CountLine
from everest_ds.data.dataset import ClipDataset
from everest_ds.data.labels import doubtful_labels
from everest_ds.data.loader import BadSamples
from everest_ds.data.manifest import Entry, check_labels, count_classes, read_manifest
from everest_ds.models import VideoClassifier
from everest_ds.training import evaluation_files as files
from everest_ds.training import probes, ranks
from everest_ds.training.evaluate import PerVideo, Predictions, average_views, predict, score
from everest_ds.training.subject import Request, Subject

log = logging.getLogger(__name__)

AnyPerVideo = TypeVar("AnyPerVideo", bound=PerVideo)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What rank 0 has found, for scripts and for people."""

    record: dict[str, Any]
    summary: str


def evaluate(request: Request) -> Outcome | None:
    """Evaluate, and write the results. A collective call; returns the outcome on rank 0, None elsewhere.

    Raises:
        UserError: anything in the request, the weights, the settings or the data that can't be.
    """
    task = TASKS["features" if request.features else "probe" if request.probe else "head"](request)
    with ranks.naming_the_lost():
        ranks.start()
        try:
            return task.run()
        except torch.OutOfMemoryError as error:
            test = task.subject.recipe.test
            raise RankError(
                f"test.micro_batch: {test.micro_batch} videos of {test.clips} x {test.crops} views at once don't fit "
                "into the device's memory; lower it, or use --precision bf16"
            ) from error


class Videos:
    """A manifest's videos, as a model is tested on them.

    Args:
        recipe: of the model.
        split: names the manifest, ``data.<split>``.

    Raises:
        UserError: there is no manifest, it can't be read, or the decoder's library is missing.
    """

    def __init__(self, recipe: FinetuneRecipe, split: str) -> None:
        self.key = f"data.{split}"
        self.manifest = getattr(recipe.data, split)
        if self.manifest is None:
            raise UserError(f"{self.key}: no manifest given; give {self.key}=/path/to/{split}.csv")
        self.entries: list[Entry] = read_manifest(self.manifest, recipe.data.root, key=self.key)
        self._recipe = recipe
        self._dataset = ClipDataset.for_evaluation(
            self.entries,
            recipe.data,
            frames=recipe.model.frames,
            image_size=recipe.model.image_size,
            clips=recipe.test.clips,
            crops=recipe.test.crops,
        )

    def predictions(self, model: VideoClassifier) -> Predictions:
        """Classify the videos; a collective call."""
        with self._options() as options:
            return self._checked(predict(model, self._dataset, **options))

    def features(self, model: VideoClassifier) -> PerVideo:
        """Collect the videos' features; a collective call."""
        with self._options() as options:
            return self._checked(average_views(model.features, self._dataset, **options))

    @contextlib.contextmanager
    def _options(self) -> Iterator[dict[str, Any]]:
        """Give what both calls need, a line of progress among it."""
        share, views = self._recipe.data.max_bad_share, self._dataset.views
        with CountLine(f"videos of {self.key}", speaks=ranks.is_main()) as progress:
            yield {
                "videos_per_batch": self._recipe.test.micro_batch,
                "device": ranks.device(),
                "bad_samples": BadSamples(share, clips_per_video=views, lost_ends=False, key=self.key),
                "progress": progress,
            }

    def _checked(self, found: AnyPerVideo) -> AnyPerVideo:
        wrong = (~found.values.isfinite().all(dim=1)).nonzero()
        if len(wrong):
            path = self.entries[int(found.index[wrong[0]])].path
            raise UserError(
                f"the model gives no finite numbers for {len(wrong)} of {len(found.index)} videos, such as {path}; "
                "the weights are spoilt, or --precision fp16 overflows (bf16 and fp32 don't)"
            )
        return found

    def paths(self, found: PerVideo) -> list[str]:
        """Paths of the readable videos, in their order."""
        return [self.entries[index].path for index in found.index.tolist()]

    def facts(self, found: PerVideo) -> dict[str, Any]:
        """What a report says about the videos."""
        unreadable = ({"path": self.entries[i].path, "reason": reason} for i, reason in found.unreadable.items())
        return {"manifest": str(self.manifest), "videos": len(found.index), "unreadable": list(unreadable)}


def check(*lists: Videos, classes: int) -> None:
    """Check the labels of one manifest, or of one to train on and another, and warn of what looks wrong with them.

    Raises:
        UserError: a label is missing or out of range.
    """
    for videos in lists:
        check_labels(videos.entries, classes, key=videos.key)
    for doubt in doubtful_labels({videos.key: videos.entries for videos in lists}, classes):
        log.warning("%s", doubt)


class HeadTask:
    """Test a classifier by its own head."""

    def __init__(self, request: Request) -> None:
        self.subject = Subject.load(request)
        recipe = self.subject.recipe
        self.classes = recipe.model.classes or 0
        self.videos = Videos(recipe, _split(request, recipe))
        check(self.videos, classes=self.classes)
        self.results = Results(request, "evaluation")

    def run(self) -> Outcome | None:
        """Predict, score and write; a collective call."""
        predictions = self.videos.predictions(self.subject.ready())
        return self.results.write(self.subject, self.videos, predictions, self.classes) if ranks.is_main() else None


class ProbeTask:
    """Fit a probe on the features of one manifest and test it on another's."""

    def __init__(self, request: Request) -> None:
        self.subject = Subject.load(request)
        self.request = request
        recipe = self.subject.recipe
        self.train = Videos(recipe, "train")
        self.classes = count_classes(self.train.entries)
        self.videos = Videos(recipe, _split(request, recipe))
        check(self.train, self.videos, classes=self.classes)
        self.results = Results(request, f"probe-{request.probe}")

    def run(self) -> Outcome | None:
        """Collect features on all ranks; on rank 0 fit, score and write."""
        model = self.subject.ready()
        train, test = (videos.features(model) for videos in (self.train, self.videos))
        if not ranks.is_main():
            return None
        if self.request.probe == "knn":
            probed = probes.nearest_neighbours(train, test, classes=self.classes, neighbours=self.request.neighbours)
        else:
            with CountLine("fits of the linear probe", speaks=True) as progress:
                probed = probes.linear(train, test, classes=self.classes, progress=progress)
        choices = {"probe": {"kind": self.request.probe, **probed.choices}, "train": self.train.facts(train)}
        return self.results.write(self.subject, self.videos, probed.predictions, self.classes, choices)


class FeaturesTask:
    """Write the features of a manifest's videos to a file."""

    def __init__(self, request: Request) -> None:
        assert request.features is not None
        self.file = request.features
        if self.file.exists():
            raise UserError(f"--features: {self.file} is there already; name another file")
        files.check_writable(self.file, "--features")
        self.subject = Subject.load(request)
        recipe = self.subject.recipe
        self.videos = Videos(recipe, _split(request, recipe))

    def run(self) -> Outcome | None:
        """Collect features on all ranks; write them on rank 0."""
        features = self.videos.features(self.subject.ready())
        if not ranks.is_main():
            return None
        record = {**self.subject.facts(), **self.videos.facts(features), "features": str(self.file)}
        probes.write_features(self.file, features, self.videos.paths(features), record)
        videos, width = features.values.shape
        return Outcome(record=record, summary=f"features ({videos}, {width}) of {self.videos.manifest}: {self.file}")


TASKS: dict[str, type[HeadTask] | type[ProbeTask] | type[FeaturesTask]] = {
    "head": HeadTask,
    "probe": ProbeTask,
    "features": FeaturesTask,
}


def _split(request: Request, recipe: FinetuneRecipe) -> str:
    return request.split or ("val" if recipe.data.test is None and recipe.data.val is not None else "test")


class Results:
    """Where the results go.

    Args:
        request: may name the folder.
        name: of a folder beside the weights, where it doesn't.

    Raises:
        UserError: the folder can't be written, or the one asked for holds something.
    """

    def __init__(self, request: Request, name: str) -> None:
        self._numbered = request.out is None
        beside = request.source if request.source.is_dir() else request.source.parent
        self._folder = request.out or beside / name
        files.check_output(self._folder, numbered=self._numbered)

    def write(
        self,
        subject: Subject,
        videos: Videos,
        predictions: Predictions,
        classes: int,
        choices: Mapping[str, Any] | None = None,
    ) -> Outcome:
        """Score predictions and write the files; ``choices`` are a probe's, for the report."""
        scores = score(predictions, classes)
        about = subject.facts()
        settings = about.pop("settings")
        record = {**about, **videos.facts(predictions), "classes": classes, **(choices or {})}
        record |= {**files.as_json(scores), "settings": settings}
        folder = files.make_folder(self._folder, numbered=self._numbered)
        files.write(folder, record, predictions, scores, videos.paths(predictions))
        return Outcome(record=record, summary=files.summary(record, folder))
