from __future__ import annotations

from pathlib import Path

import pytest
from video_files import moving_frames, write_bad_files, write_video

from everest_ds.data.manifest import Entry


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[Entry]:
    """Twelve videos of 34 to 45 frames, 48 x 64, labels 0 ... 11."""
    folder = tmp_path_factory.mktemp("videos")
    paths = [write_video(folder / f"{i}.mp4", moving_frames(34 + i, seed=i)) for i in range(12)]
    return [Entry(str(path), i) for i, path in enumerate(paths)]


@pytest.fixture(scope="session")
def bad_files(tmp_path_factory: pytest.TempPathFactory, videos: list[Entry]) -> dict[str, Path]:
    return write_bad_files(tmp_path_factory.mktemp("bad"), Path(videos[0].path))
