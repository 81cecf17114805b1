"""Fixtures that several folders of tests share, and how tests are shared out among workers."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from launching import Console, new_console

from everest_ds.data.synthetic import write_motion_videos

# Models here are too small for threads, and workers beside each other have none to spare. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A file's tests stay in one worker (`make test` runs two), which makes the file's fixtures once; those that take
# longest come first. Runs of several ranks stay in one worker, whose processes they share; but for eight ranks, two
# nodes and a batch script, which have their own, so that both workers have as much to do.
EIGHT_RANKS = "tests/e2e/test_eight_ranks"
SEVERAL_RANKS = (
    "tests/e2e/",
    "tests/resilience/test_bad_numbers",
    "tests/resilience/test_kills",
    "tests/resilience/test_nvme",
    "tests/resilience/test_other_worlds",
    "tests/resilience/test_requests_to_stop",
    "tests/resilience/test_trouble",
)
ORDER = ("tests/e2e", "tests/resilience", "tests/tools", "tests/memory", "tests/benchmarks")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with what takes longest."""

    def later(item: pytest.Item) -> list[bool]:
        return [not item.path.is_relative_to(config.rootpath / folder) for folder in ORDER]

    def at_once(item: pytest.Item) -> bool:
        return item.nodeid.startswith(SEVERAL_RANKS)

    items.sort(key=lambda item: (not at_once(item), item.nodeid.startswith(EIGHT_RANKS), later(item)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Share tests out by file, the runs of several ranks together."""
    from xdist.scheduler import LoadScopeScheduling  # noqa: PLC0415 - only where tests are shared out

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            shared = nodeid.startswith(SEVERAL_RANKS) and not nodeid.startswith(EIGHT_RANKS)
            return "several ranks" if shared else nodeid.partition("::")[0]

    return ByFile(config, log)


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
