"""Fixtures that several folders of tests share."""

from pathlib import Path

import pytest

from everest_ds.data.synthetic import write_motion_videos


@pytest.fixture(scope="session")
def motion_videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of 64 small motion videos, real H.264 files."""
    folder = tmp_path_factory.mktemp("motion")
    return write_motion_videos(folder, 64, seed=7, size=64)
