from __future__ import annotations

from pathlib import Path

import pytest
import torch

from everest_ds.config.errors import UserError
from everest_ds.config.load import load_recipe
from everest_ds.config.schema import DataConfig
from everest_ds.data.dataset import ClipDataset
from everest_ds.data.manifest import Entry, format_manifest
from everest_ds.data.rate import reading_rate, training_rate


def make(entries: list[Entry], clips_per_video: int = 1) -> ClipDataset:
    data = DataConfig(workers=0, stride=2, clips_per_video=clips_per_video)
    return ClipDataset(entries, data, frames=8, image_size=32, tokens=0, seed=3, attempts=1)


def test_clips_are_counted_and_their_parts_are_timed(videos: list[Entry]) -> None:
    dataset = make(videos, clips_per_video=2)
    rate = reading_rate(dataset, [(0, index) for index in range(len(videos))])
    assert rate.videos == len(videos)
    assert rate.seconds.decode > rate.seconds.transform > 0
    assert rate.clips_per_s > 0


def test_it_stops_in_time(videos: list[Entry]) -> None:
    assert reading_rate(make(videos), [(0, 0)] * 50, limit_s=0.0).videos == 1


def test_unreadable_videos_are_not_counted(videos: list[Entry], bad_files: dict[str, Path]) -> None:
    bad = Entry(str(next(iter(bad_files.values()))), None)
    assert reading_rate(make([videos[0], bad]), [(0, 0), (0, 1)]).videos == 1
    with pytest.raises(UserError, match=r"no video could be read \(.*: .+\)"):
        reading_rate(make([bad]), [(0, 0)])


class TestTrainingRate:
    def test_the_recipes_own_data_are_read(self, videos: list[Entry], tmp_path: Path) -> None:
        manifest = tmp_path / "train.csv"
        manifest.write_text(format_manifest(videos))
        threads = torch.get_num_threads()
        recipe = load_recipe(None, [f"data.train={manifest}", "model.image_size=32", "model.size=vit_micro"])
        assert training_rate(recipe).videos == len(videos)
        assert torch.get_num_threads() == threads

    def test_without_a_manifest(self) -> None:
        with pytest.raises(UserError, match=r"data\.train: no training manifest"):
            training_rate(load_recipe(None, []))
