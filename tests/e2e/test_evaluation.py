"""Evaluation and probes as they are run: any number of ranks gives the same answers; mistakes are one line."""

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from launching import Console, new_console, run
from safetensors import safe_open
from safetensors.torch import save_file

from everest_ds.config.errors import UserError
from everest_ds.config.finetuning import ClassifierConfig, FinetuneRecipe
from everest_ds.config.load import dump, to_tree
from everest_ds.config.schema import DataConfig, ModelConfig, Recipe
from everest_ds.data.synthetic import render_motion, write_motion_videos
from everest_ds.models import MaskedAutoencoder, VideoClassifier, load_pretrained
from everest_ds.models.weights import CONFIG_KEY
from everest_ds.training.evaluation_run import evaluate
from everest_ds.training.probes import PATHS_KEY, SETTINGS_KEY
from everest_ds.training.subject import Request

VIDEOS = 17
CLASSES = 8
SHAPE = {"size": "vit_micro", "image_size": 48, "positions": "separable"}
DATA = {"stride": 1, "workers": 1}


class Runs(NamedTuple):
    """Run directories of untrained models, and manifests: a few videos to fit, 17 and an empty file to test."""

    classifier: Path
    autoencoder: Path
    train: Path
    test: Path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("evaluation")
    found = Runs(*(folder / name for name in ("classifier", "autoencoder", "train.csv", "test.csv")))
    write_motion_videos(folder / "train", 32, seed=3)
    write_motion_videos(folder / "test", VIDEOS, seed=3, first_index=100)
    (folder / "empty.mp4").touch()
    lines = found.test.read_text().splitlines()
    found.test.write_text("\n".join([*lines[:6], "empty.mp4,5", *lines[6:]]) + "\n")
    torch.manual_seed(0)
    head = ClassifierConfig(**SHAPE, classes=CLASSES)
    classifier = VideoClassifier(head)
    recognise_videos(classifier)
    write_run(found.classifier, classifier, FinetuneRecipe(model=head))
    # Its recipe says how to read videos, in a setting that no later command line repeats.
    encoder = ModelConfig(**SHAPE)
    write_run(found.autoencoder, MaskedAutoencoder(encoder), Recipe(model=encoder, data=DataConfig(**DATA)))
    return found


@torch.no_grad()
def recognise_videos(classifier: VideoClassifier) -> None:
    """Give the head the features of one tested video per class: untrained, it would predict one class of them all."""
    videos = np.stack([render_motion(3, 104 + label)[0][: classifier.config.frames] for label in range(CLASSES)])
    features = classifier.eval().features(torch.from_numpy(videos)[:, None].expand(-1, 3, -1, -1, -1))
    differences = features - features.mean(dim=0)
    classifier.head.weight.copy_(10 * differences / differences.square().sum(dim=1, keepdim=True))
    classifier.head.bias.copy_(-classifier.head.weight @ features.mean(dim=0))


def write_run(folder: Path, model: torch.nn.Module, recipe: Recipe) -> None:
    folder.mkdir()
    header = {CONFIG_KEY: json.dumps(to_tree(recipe.model))}
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors", header)
    (folder / "config.yaml").write_text(dump(recipe))


def rows(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "predictions.csv").open()))


def scores(folder: Path) -> dict:
    return json.loads((folder / "scores.json").read_text())


def assert_same_answers(one: Path, other: Path) -> None:
    assert [row["prediction"] for row in rows(one)] == [row["prediction"] for row in rows(other)]
    for a, b in zip(rows(one), rows(other), strict=True):
        assert (a["path"], a["label"]) == (b["path"], b["label"])
        for place in range(1, 6):
            assert float(a[f"probability_{place}"]) == pytest.approx(float(b[f"probability_{place}"]), abs=1e-5)
    for key in ("top1", "top5", "per_class", "confusion", "videos", "unreadable"):
        assert scores(one)[key] == scores(other)[key], key


@pytest.fixture(scope="module")
def three_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Console]:
    with new_console(3, tmp_path_factory.mktemp("consoles") / "three_ranks") as console:
        yield console


def test_three_ranks_test_a_classifier_as_one_does(runs, tmp_path, three_ranks, one_rank):
    settings = (f"data.test={runs.test}", "data.stride=1", "data.workers=1", "test.clips=2", "test.crops=2")
    command = ("run/evaluate.py", "--from", runs.classifier, *settings)
    three = three_ranks.succeed(*command, "--out", tmp_path / "three")
    assert sum("unreadable video" in line for line in three.stderr.splitlines()) == 1
    assert "top-1" in three.stdout
    # Another number of videos per pass, too; and the default folder.
    alone = one_rank.succeed(*command, "test.micro_batch=4", "--json")
    folder = runs.classifier / "evaluation"
    assert json.loads(alone.stdout) == scores(folder)
    assert_same_answers(folder, tmp_path / "three")

    assert [row["path"] for row in rows(folder)] == sorted(row["path"] for row in rows(folder))
    found = scores(folder)
    assert (found["videos"], found["classes"], found["views"]) == (VIDEOS, CLASSES, {"clips": 2, "crops": 2})
    assert [(Path(bad["path"]).name, bad["reason"]) for bad in found["unreadable"]] == [("empty.mp4", "empty file")]
    right = [row["label"] == row["prediction"] for row in rows(folder)]
    assert found["top1"] == sum(right) / VIDEOS >= CLASSES / 2 / VIDEOS
    assert len({row["prediction"] for row in rows(folder)}) > 3
    assert sum(map(sum, found["confusion"])) == VIDEOS
    assert found["settings"]["model"]["keep_ratio"] == 0.6
    assert (folder / "confusion.png").read_bytes().startswith(b"\x89PNG")

    # Again, of the file alone, with all tokens and in bfloat16: beside the first, not over it.
    weights = runs.classifier / "model.safetensors"
    all_tokens = ("model.keep_ratio=1.0", "--precision", "bf16")
    one_rank.succeed("run/evaluate.py", "--from", weights, *settings, *all_tokens)
    second = scores(runs.classifier / "evaluation-2")
    assert (second["precision"], second["settings"]["model"]["keep_ratio"]) == ("bf16", 1.0)
    assert scores(folder) == found


def test_labels_that_look_wrong_are_told(runs, tmp_path, one_rank):
    """Of a list to test on, and of the two lists of a probe."""
    few = tmp_path / "few.csv"
    few.write_text("\n".join(str(runs.train.parent / line) for line in runs.train.read_text().splitlines()[1:3]))
    views = ("data.stride=1", "data.workers=0", "test.clips=1", "test.crops=1")
    command = ("run/evaluate.py", "--out", tmp_path / "head", "--from", runs.classifier, f"data.test={few}", *views)
    assert "WARNING: of 8 classes, counted from 0, data.test has no video of " in one_rank.succeed(*command).stderr
    probe = ("run/evaluate.py", "--out", tmp_path / "probe", "--from", runs.autoencoder, "--probe", "knn")
    told = one_rank.succeed(*probe, f"data.train={runs.train}", f"data.val={few}").stderr
    assert "WARNING: of 8 classes, counted from 0, data.val has no video of " in told
    assert "WARNING: data.val: 2 of 2 videos are in data.train, too, such as " in told


def test_three_ranks_probe_an_encoder_as_one_does(runs, tmp_path, three_ranks, one_rank):
    manifests = (f"data.train={runs.train}", f"data.val={runs.test}")
    command = ("run/evaluate.py", "--from", runs.autoencoder, "--probe", "knn", *manifests)
    three_ranks.succeed(*command)
    one_rank.succeed(*command, "--out", tmp_path / "one")
    assert_same_answers(runs.autoencoder / "probe-knn", tmp_path / "one")
    found = scores(tmp_path / "one")
    assert found["probe"] == {"kind": "knn", "neighbours": 20}
    assert (found["train"]["videos"], found["videos"]) == (32, VIDEOS)
    assert found["settings"]["data"]["stride"] == DATA["stride"]
    assert found["views"] == {"clips": 1, "crops": 1}


def test_linear_probe(runs):
    """In a process of its own: libraries warn but once in each."""
    manifests = (f"data.train={runs.train}", f"data.val={runs.test}")
    done = run("run/evaluate.py", "--from", runs.autoencoder, "--probe", "linear", *manifests)
    assert done.returncode == 0, done.stderr
    found = scores(runs.autoencoder / "probe-linear")
    assert found["probe"]["kind"] == "linear"
    assert set(found["probe"]["held_out_top1"]) == {"0.001", "0.01", "0.1", "1"}
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr


def test_features_are_read_back(runs, tmp_path, one_rank):
    file = tmp_path / "deep/features.safetensors"
    command = (
        "run/evaluate.py",
        "--from",
        runs.classifier,
        f"data.val={runs.test}",
        "data.stride=1",
        "--features",
        file,
    )
    done = one_rank.succeed(*command, "--json")
    assert json.loads(done.stdout)["features"] == str(file)
    with safe_open(file, framework="pt") as opened:
        features, labels, index = (opened.get_tensor(name) for name in ("features", "labels", "index"))
        header = opened.metadata()
    assert features.dtype == torch.float32
    assert features.shape == (VIDEOS, load_pretrained(runs.classifier).config.row.width)
    assert index.tolist() == [*range(5), *range(6, VIDEOS + 1)]
    paths = json.loads(header[PATHS_KEY])
    assert [Path(path).name for path in paths] == [f"{i:07d}.mp4" for i in range(100, 100 + VIDEOS)]
    assert labels.tolist() == [i % CLASSES for i in range(100, 100 + VIDEOS)]
    assert json.loads(header[SETTINGS_KEY])["settings"]["data"]["val"] == str(runs.test)
    again = one_rank.run(*command)
    assert again.returncode == 2
    assert "is there already" in again.stderr


def test_a_mistake_is_one_line(runs):
    done = run("run/evaluate.py", "--from", runs.autoencoder, f"data.test={runs.test}")
    assert done.returncode == 2
    reports = [line for line in done.stderr.splitlines() if line.startswith("evaluate: error: ")]
    assert reports == [
        f"evaluate: error: {runs.autoencoder} holds a pre-trained autoencoder without a head: fine-tune it first with "
        "run/finetune.py, or use --probe"
    ]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("overrides", "options", "told"),
    [
        ([], {}, "data.test: no manifest given; give data.test=/path/to/test.csv"),
        ([], {"split": "val"}, "data.val: no manifest given"),
        (["data.test={folder}/nothing.csv"], {}, "lists no video"),
        (["data.test={folder}/large.csv"], {}, "has label 8, but the classifier knows classes 0 ... 7"),
        (["data.test={folder}/unlabelled.csv"], {}, "has no label"),
        (["data.test={test}", "model.classes=10"], {}, "model.classes: 10, but the head in"),
        (["data.test={test}", "model.size=vit_small"], {}, "model.size"),
        (["data.test={test}", "test.clip=2"], {}, "unknown key 'test.clip'; did you mean 'test.clips'?"),
        (["data.test={test}"], {"out": "{folder}"}, "--out:"),
        (["data.val={test}"], {"probe": "knn"}, "data.train: no manifest given"),
        (["data.train={test}"], {"probe": "knn", "split": "val"}, "data.val: no manifest given"),
        (["data.train={folder}/unlabelled.csv", "data.val={test}"], {"probe": "knn"}, "has no label"),
        (["data.val={test}"], {"features": "{folder}/nothing.csv"}, "--features: "),
    ],
)
def test_mistakes(runs, tmp_path, overrides, options, told):
    (tmp_path / "nothing.csv").write_text("# nothing\n")
    (tmp_path / "large.csv").write_text("a.mp4,7\nb.mp4,8\n")
    (tmp_path / "unlabelled.csv").write_text("a.mp4\nb.mp4\n")
    places = {"folder": tmp_path, "test": runs.test}
    asked = {key: value.format(**places) for key, value in options.items()}
    asked |= {key: Path(asked[key]) for key in ("out", "features") if key in asked}
    with pytest.raises(UserError) as caught:
        evaluate(Request(source=runs.classifier, overrides=[text.format(**places) for text in overrides], **asked))
    assert told in str(caught.value)


def test_weights_that_are_not_there_or_not_whole(runs, tmp_path):
    with pytest.raises(UserError, match=r"--from: .* no model.safetensors here"):
        evaluate(Request(source=tmp_path))
    shutil.copytree(runs.classifier, tmp_path / "run")
    with safe_open(runs.classifier / "model.safetensors", framework="pt") as opened:
        part = {name: opened.get_tensor(name) for name in opened.keys() if "blocks.3" not in name}  # noqa: SIM118
        save_file(part, tmp_path / "run/model.safetensors", opened.metadata())
    with pytest.raises(UserError, match=r"--from: .* lacks \d+ tensors of this model, such as blocks\.3\."):
        evaluate(Request(source=tmp_path / "run", overrides=[f"data.test={runs.test}"]))
