"""Fixtures that several folders of tests share, and how tests are shared out among workers."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import Console, new_console

from everest_ds.data.synthetic import write_motion_videos

# Models here are too small for threads, and workers beside each other have none to spare. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Tests that start several ranks run one after another: ranks wait for each other by spinning, and two groups of ranks
# on the cores of one mostly spin.
RANKS = "ranks"
ORDER = (RANKS, "tests/tools", "tests/memory", "tests/e2e")


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in a hook of its own
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Say which tests stay in one worker (`make test` runs two), and begin with what takes longest."""

    def group(item: pytest.Item) -> str:
        if {"two_ranks", "three_ranks"} & set(item.fixturenames) or item.get_closest_marker("several_ranks"):
            return RANKS
        return str(item.path.relative_to(config.rootpath))

    items.sort(key=lambda item: [not group(item).startswith(start) for start in ORDER])
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            item.add_marker(pytest.mark.xdist_group(group(item)))


@pytest.fixture(scope="session")
def motion_videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of 64 small motion videos, real H.264 files."""
    folder = tmp_path_factory.mktemp("motion")
    return write_motion_videos(folder, 64, seed=7, size=64)


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Console]:
    """A process for commands on one rank, without a launcher."""
    with new_console(1, tmp_path_factory.mktemp("consoles") / "one_rank") as console:
        yield console


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Console]:
    """Two processes for commands on two ranks, under the launcher."""
    with new_console(2, tmp_path_factory.mktemp("consoles") / "two_ranks") as console:
        yield console
