"""Evaluation's arithmetic: averaging, repeats, unreadable videos, scores, probes; and the files that it writes."""

from __future__ import annotations

import csv
import dataclasses
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from video_files import moving_frames, write_bad_files, write_video

from everest_ds.config.errors import UserError
from everest_ds.config.finetuning import ClassifierConfig
from everest_ds.config.load import to_tree
from everest_ds.config.progress import CountLine
from everest_ds.config.schema import DataConfig, ModelConfig, Recipe
from everest_ds.data import loader
from everest_ds.data.dataset import ClipDataset
from everest_ds.data.loader import BadSamples
from everest_ds.data.manifest import Entry
from everest_ds.models.weights import Weights
from everest_ds.training import evaluate, evaluation_files, probes
from everest_ds.training.evaluate import PerVideo, Predictions, average_views, predict, score
from everest_ds.training.run_dir import RunDir
from everest_ds.training.subject import Request, choose_precision, resolve

CPU = torch.device("cpu")
CLASSES = 4


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[Entry]:
    """Seven videos of 34 to 40 frames, 48 x 64, labels 0 ... 3 in turn."""
    folder = tmp_path_factory.mktemp("evaluated")
    paths = [write_video(folder / f"{i}.mp4", moving_frames(34 + i, seed=i)) for i in range(7)]
    return [Entry(str(path), i % CLASSES) for i, path in enumerate(paths)]


def make(entries: list[Entry], clips: int = 1, crops: int = 1, max_bad_share: float = 1.0) -> ClipDataset:
    data = DataConfig(workers=0, stride=1, max_bad_share=max_bad_share)
    return ClipDataset.for_evaluation(entries, data, frames=4, image_size=32, clips=clips, crops=crops)


def model(clips: Tensor) -> Tensor:
    """Logits (B, 4) that depend on every part of a clip, and are far from linear in it."""
    parts = clips.float().flatten(1).unflatten(1, (CLASSES, -1)).mean(dim=2)
    return (parts - 100) / 4


def options(max_bad_share: float = 1.0, **over: Any) -> dict[str, Any]:
    bad = BadSamples(max_bad_share, lost_ends=False, key="data.test")
    return {"videos_per_batch": 2, "device": CPU, "bad_samples": bad} | over


def test_probabilities_not_logits_are_averaged_over_a_videos_views(videos):
    dataset = make(videos, clips=2, crops=3)
    predictions = predict(model, dataset, **options())
    assert predictions.index.tolist() == list(range(7))
    assert predictions.labels.tolist() == [entry.label for entry in videos]
    for index in range(7):
        views = dataset[0, index].clips
        assert len(views) == 6
        expected = model(views).softmax(dim=1).mean(dim=0)
        torch.testing.assert_close(predictions.probabilities[index], expected)
        assert not torch.allclose(expected, model(views).mean(dim=0).softmax(dim=0), atol=1e-3)


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_repeats_that_keep_ranks_in_step_are_dropped(videos, ranks, monkeypatch):
    """What all ranks would do, done by one of them in turn."""
    expected = predict(model, make(videos), **options())

    def as_ranks(count: int, *, batch: int, **_: int) -> list[list[loader.Key]]:
        shares = [loader.evaluation_batches(count, batch=batch, rank=rank, ranks=ranks) for rank in range(ranks)]
        return [keys for share in shares for keys in share]

    monkeypatch.setattr(evaluate, "evaluation_batches", as_ranks)
    found = predict(model, make(videos), **options())
    assert found.index.tolist() == list(range(7))
    torch.testing.assert_close(found.probabilities, expected.probabilities)
    assert found.labels.tolist() == expected.labels.tolist()


def test_half_precision_logits_are_averaged_in_fp32(videos):
    dataset = make(videos, crops=3)
    found = predict(lambda clips: model(clips).bfloat16(), dataset, **options())
    expected = model(dataset[0, 3].clips).bfloat16().float().softmax(dim=1).mean(dim=0)
    torch.testing.assert_close(found.probabilities[3], expected)


def test_progress_ends_at_the_number_of_videos(videos, capsys):
    told: list[tuple[int, int]] = []
    predict(model, make(videos), **options(progress=lambda *numbers: told.append(numbers)))
    assert told == [(2, 7), (4, 7), (6, 7), (7, 7)]
    with CountLine("videos", speaks=True) as line:
        for done in range(1, 101):
            line(done, 100)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 10
    assert said[-1].startswith("videos: 100 of 100")
    with CountLine("videos", speaks=False) as line:
        line(1, 1)
    assert capsys.readouterr().err == ""


class TestUnreadable:
    @pytest.fixture
    def some_bad(self, videos, tmp_path) -> list[Entry]:
        bad = write_bad_files(tmp_path, Path(videos[0].path))
        return [videos[0], Entry(str(bad["empty"]), 1), *videos[1:3], Entry(str(bad["text"]), 2)]

    def test_are_named_listed_and_left_out(self, some_bad, caplog):
        with caplog.at_level(logging.WARNING):
            found = predict(model, make(some_bad, clips=2), **options(videos_per_batch=3))
        assert found.index.tolist() == [0, 2, 3]
        assert found.labels.tolist() == [0, 1, 2]
        assert len(found.probabilities) == 3
        assert list(found.unreadable) == [1, 4]
        assert found.unreadable[1] == "empty file"
        for entry in (some_bad[1], some_bad[4]):
            assert sum(entry.path in record.getMessage() for record in caplog.records) == 1

    def test_are_named_once_over_several_validations(self, some_bad, caplog):
        shared = options()
        for _ in range(3):
            predict(model, make(some_bad), **shared)
        assert sum("unreadable video" in record.getMessage() for record in caplog.records) == 2

    @pytest.mark.parametrize("look_every", [1, 1000])
    def test_too_many_end_the_evaluation(self, some_bad, look_every, monkeypatch):
        monkeypatch.setattr(evaluate, "_LOOK_EVERY", look_every)
        calls = []

        def counted(clips: Tensor) -> Tensor:
            calls.append(len(clips))
            return model(clips)

        with pytest.raises(UserError, match=r"data\.test: \d+ of \d+ videos tried are unreadable, above .* = 0.3"):
            predict(counted, make(some_bad * 8), **options(max_bad_share=0.3))
        assert (len(calls) < 20) == (look_every == 1)

    def test_nothing_readable_is_a_mistake(self, some_bad):
        with pytest.raises(UserError, match=r"none of 2 videos can be read, such as .*empty.mp4 \(empty file\)"):
            predict(model, make([some_bad[1], some_bad[4]]), **options())


def predictions(probabilities: list[list[float]], labels: list[int]) -> Predictions:
    values, index = torch.tensor(probabilities), torch.arange(len(labels))
    return Predictions(index=index, values=values, labels=torch.tensor(labels), unreadable={})


class TestScores:
    def test_by_hand(self):
        rows = [[0.7, 0.2, 0.1], [0.2, 0.5, 0.3], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1]]
        found = score(predictions(rows, [0, 0, 0, 1]), 3)
        assert found.top1 == 2 / 4 + 1 / 4
        assert found.top5 == 1.0
        assert found.accuracy[:2].tolist() == [2 / 3, 1.0]
        assert math.isnan(found.accuracy[2])
        assert found.support.tolist() == [3, 1, 0]
        assert found.confusion.tolist() == [[2, 1, 0], [0, 1, 0], [0, 0, 0]]

    def test_top5_counts_five_of_seven_classes(self):
        row = [0.3, 0.2, 0.15, 0.12, 0.1, 0.08, 0.05]
        assert score(predictions([row] * 7, list(range(7))), 7).top5 == 5 / 7

    def test_of_equals_the_lower_class_comes_first(self):
        assert predictions([[0.25] * 4], [0]).ranked().tolist() == [[0, 1, 2, 3]]


def features(values: Tensor, labels: list[int]) -> PerVideo:
    return PerVideo(index=torch.arange(len(labels)), values=values, labels=torch.tensor(labels), unreadable={})


class TestProbes:
    @pytest.fixture
    def clusters(self) -> Callable[[int, int], PerVideo]:
        """Features of 3 classes around the corners of a triangle."""

        def draw(seed: int, count: int) -> PerVideo:
            generator = torch.Generator().manual_seed(seed)
            labels = [i % 3 for i in range(count)]
            noise = torch.randn(count, 8, generator=generator)
            return features(noise * 0.3 + 3 * torch.eye(3, 8)[labels], labels)

        return draw

    def test_both_find_what_is_there(self, clusters):
        train, test = clusters(0, 60), clusters(1, 12)
        told: list[tuple[int, int]] = []
        for probed in (
            probes.nearest_neighbours(train, test, classes=5),
            probes.linear(train, test, classes=5, progress=lambda *numbers: told.append(numbers)),
        ):
            assert score(probed.predictions, 5).top1 == 1.0
            shares = probed.predictions.probabilities
            assert shares.shape == (12, 5)
            torch.testing.assert_close(shares.sum(dim=1), torch.ones(12))
            assert not shares[:, 3:].any()
        assert told == [(i, 5) for i in range(1, 6)]

    def test_their_choices_are_told(self, clusters):
        train, test = clusters(0, 60), clusters(1, 12)
        assert probes.nearest_neighbours(train, test, classes=3).choices == {"neighbours": 20}
        assert probes.nearest_neighbours(clusters(0, 9), test, classes=3).choices == {"neighbours": 9}
        choices = probes.linear(train, test, classes=3).choices
        assert choices["held_out_videos"] == 12
        assert choices["held_out_top1"][f"{choices['C']:g}"] == max(choices["held_out_top1"].values())

    def test_neighbours_are_weighted_by_cosine_distance(self):
        near, far = torch.tensor([[1.0, 0.1]]), torch.tensor([[1.0, 1.0], [2.0, 2.1]])
        train = features(torch.cat([near, far]), [1, 0, 0])
        test = features(torch.tensor([[10.0, 0.0]]), [1])
        shares = probes.nearest_neighbours(train, test, classes=2, neighbours=3).predictions.probabilities
        assert shares[0, 1] > 0.95

    def test_mistakes(self, clusters):
        test = clusters(1, 6)
        with pytest.raises(UserError, match="--k: expected 1 to 9, the readable training videos, got 10"):
            probes.nearest_neighbours(clusters(0, 9), test, classes=3, neighbours=10)
        with pytest.raises(UserError, match="at least 2 classes"):
            probes.linear(features(torch.rand(6, 8), [2] * 6), test, classes=3)
        with pytest.raises(UserError, match="2 videos are too few"):
            probes.linear(features(torch.rand(2, 8), [0, 1]), test, classes=3)

    def test_features_are_averaged_over_views(self, videos):
        dataset = make(videos, clips=2)
        found = average_views(model, dataset, **options())
        torch.testing.assert_close(found.values[2], model(dataset[0, 2].clips).mean(dim=0))


class TestFiles:
    def test_predictions_of_few_classes(self, tmp_path):
        found = predictions([[0.2, 0.7, 0.1], [0.5, 0.25, 0.25]], [1, 2])
        evaluation_files.write_predictions(tmp_path / "p.csv", found, ["a, b.mp4", "c.mp4"])
        rows = list(csv.DictReader((tmp_path / "p.csv").open()))
        assert rows[0] == {
            **{"path": "a, b.mp4", "label": "1", "prediction": "1", "class_1": "1", "class_2": "0", "class_3": "2"},
            **{"probability_1": "0.700000", "probability_2": "0.200000", "probability_3": "0.100000"},
        }
        assert [row["prediction"] for row in rows] == ["1", "0"]

    def test_scores_are_json_without_nan(self):
        record = evaluation_files.as_json(score(predictions([[0.7, 0.3]], [0]), 2))
        read = json.loads(evaluation_files.dumps(record), parse_constant=pytest.fail)
        assert read == record
        assert read["per_class"][1] == {"class": 1, "accuracy": None, "videos": 0}

    @pytest.mark.parametrize("classes", [2, 8, 400])
    def test_a_picture_for_any_number_of_classes(self, classes, tmp_path):
        confusion = torch.eye(classes, dtype=torch.int64) * 3
        evaluation_files.draw_confusion(tmp_path / "c.png", confusion, "title")
        assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")

    def test_folders_are_numbered_or_refused(self, tmp_path):
        wanted = tmp_path / "run/evaluation"
        evaluation_files.check_output(wanted, numbered=True)
        assert not wanted.parent.exists()
        made = [evaluation_files.make_folder(wanted, numbered=True).name for _ in range(3)]
        assert made == ["evaluation", "evaluation-2", "evaluation-3"]
        evaluation_files.check_output(wanted, numbered=False)
        (wanted / "notes.txt").touch()
        with pytest.raises(UserError, match=r"--out: .*evaluation is there already and not an empty folder"):
            evaluation_files.check_output(wanted, numbered=False)
        with pytest.raises(UserError, match="--out: cannot write to"):
            evaluation_files.check_output(wanted / "notes.txt/out", numbered=True)


class TestSettings:
    """What a run says, then the command line."""

    HEAD = ClassifierConfig(size="vit_micro", image_size=48, keep_ratio=0.8, classes=8)
    ENCODER = ModelConfig(size="vit_micro", image_size=48, positions="separable", keep_ratio=0.4, attention="eager")

    def classifier(self) -> Weights:
        state = {"head.weight": torch.zeros(8, 96)}
        return Weights(file=Path("model.safetensors"), state=state, settings=to_tree(self.HEAD))

    def autoencoder(self) -> Weights:
        return Weights(file=Path("model.safetensors"), state={}, settings=to_tree(self.ENCODER))

    def test_of_a_classifier(self, tmp_path):
        (tmp_path / "config.yaml").write_text("data: {stride: 2, test: t.csv}\ntest: {clips: 2}\n")
        recipe = resolve(self.classifier(), Request(source=tmp_path, overrides=["test.crops=1", "data.root=/r"]))
        assert recipe.model == self.HEAD
        assert (recipe.data.stride, recipe.data.test, recipe.data.root) == (2, "t.csv", "/r")
        assert (recipe.test.clips, recipe.test.crops) == (2, 1)
        changed = resolve(self.classifier(), Request(source=tmp_path, overrides=["model.keep_ratio=1.0"]))
        assert changed.model == dataclasses.replace(self.HEAD, keep_ratio=1.0)

    def test_of_an_autoencoder(self, tmp_path):
        RunDir(tmp_path).write_facts(
            Recipe(model=self.ENCODER, data=DataConfig(stride=2, train="t.csv")), {}, {}, from_step=0
        )
        recipe = resolve(self.autoencoder(), Request(source=tmp_path, probe="knn", overrides=["data.val=v.csv"]))
        model = recipe.model
        assert (model.size, model.image_size, model.positions, model.attention) == (
            *("vit_micro", 48, "separable", "eager"),
        )
        assert model.keep_ratio == 0.6
        assert (recipe.data.stride, recipe.data.train, recipe.data.val) == (2, "t.csv", "v.csv")
        assert (recipe.test.clips, recipe.test.crops) == (1, 1)

    def test_of_a_file_alone(self):
        request = Request(source=Path("x/model.safetensors"), features=Path("f"), overrides=["test.clips=3"])
        assert resolve(self.classifier(), request).test.clips == 3

    def test_precision_is_the_runs_unless_asked_for(self, tmp_path):
        assert choose_precision(Request(source=tmp_path)) == "fp32"
        (tmp_path / "ds_config.json").write_text('{"bf16": {"enabled": true}}')
        assert choose_precision(Request(source=tmp_path)) == "bf16"
        assert choose_precision(Request(source=tmp_path, precision="fp32")) == "fp32"

    def test_precision_that_the_accelerator_does_not_have(self, tmp_path, monkeypatch, caplog):
        monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: False)
        (tmp_path / "ds_config.json").write_text('{"fp16": {"enabled": true}}')
        assert choose_precision(Request(source=tmp_path)) == "fp32"
        assert "the run's precision, fp16, is not supported" in caplog.text
        with pytest.raises(UserError, match="--precision fp16: this accelerator does not support it"):
            choose_precision(Request(source=tmp_path, precision="fp16"))

    def test_what_does_not_go_together(self):
        with pytest.raises(UserError, match="--features"):
            Request(source=Path("x"), features=Path("f"), probe="knn")
        with pytest.raises(UserError, match="--k"):
            Request(source=Path("x"), probe="linear", neighbours=3)
