"""Which ranks write a copy, and what is said when nodes don't hold the same: four ranks, as threads, on two nodes."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from everest_ds.config.errors import UserError
from everest_ds.training import ranks, storage
from everest_ds.training.run_dir import RunDir
from everest_ds.training.storage import Writers

RANKS = 4
TOGETHER, APART = [range(4)] * 4, [range(2), range(2), range(2, 4), range(2, 4)]
FLAG = "ds_config checkpoint.use_node_local_storage"


class World:
    """Runs a function on every rank at once; they meet in ``ranks.gather``."""

    def __init__(self, monkeypatch):
        self._barrier, self._own, self._values = threading.Barrier(RANKS, timeout=20), threading.local(), [None] * RANKS
        monkeypatch.setattr(ranks, "rank", lambda: self._own.rank)
        monkeypatch.setattr(ranks, "gather", self._gather)
        monkeypatch.setattr(ranks, "host_of", lambda rank: f"node{rank // 2}")
        monkeypatch.setattr(storage, "several_nodes", lambda: True)

    def run(self, work):
        """Return what each rank returns, or the message of its UserError."""

        def on(rank: int):
            self._own.rank = rank
            try:
                return work(rank)
            except UserError as error:
                return str(error)

        with ThreadPoolExecutor(RANKS) as pool:
            return list(pool.map(on, range(RANKS)))

    def _gather(self, value):
        self._values[self._own.rank] = value
        self._barrier.wait()
        found = list(self._values)
        self._barrier.wait()
        return found


@pytest.fixture
def world(monkeypatch):
    return World(monkeypatch)


@pytest.fixture
def folders(tmp_path):
    """Of each node, and one that both see."""
    names = [tmp_path / name for name in ("own0", "own1", "shared")]
    for name in names:
        name.mkdir()
    return names


def test_who_leads(world):
    assert world.run(lambda rank: (Writers(APART[rank]).index, Writers(APART[rank]).leads)) == [
        (0, True),
        (1, False),
        (0, True),
        (1, False),
    ]
    assert world.run(lambda rank: Writers(TOGETHER[rank]).leads) == [True, False, False, False]


def test_storage_as_it_should_be(world, folders):
    own, shared = folders[:2], folders[2]
    assert world.run(lambda rank: Writers(TOGETHER[rank]).check_storage(shared)) == [None] * RANKS
    assert world.run(lambda rank: Writers(APART[rank]).check_storage(own[rank // 2])) == [None] * RANKS
    assert [list(folder.iterdir()) for folder in folders] == [[], [], []]


def test_storage_that_is_not_what_the_json_says(world, folders):
    own, shared = folders[:2], folders[2]
    lonely = world.run(lambda rank: Writers(TOGETHER[rank]).check_storage(own[rank // 2]))
    assert f"what node0 writes into {own[0]} is not there on node1" in lonely[0]
    assert f"set {FLAG}" in lonely[3]
    crowded = world.run(lambda rank: Writers(APART[rank]).check_storage(shared))
    assert set(crowded) == {
        f"train.output_dir: node0, node1 share {shared}, and would overwrite each other's checkpoints: "
        f"choose storage of each node's own, or remove {FLAG}"
    }


def test_a_node_that_has_nothing_to_continue(world):
    def check(groups, paths):
        sources = [None if path is None else RunDir(Path(path)) for path in paths]
        return world.run(lambda rank: Writers(groups[rank]).check_source(sources[rank]))

    assert check(APART, [None] * RANKS) == [None] * RANKS
    assert check(APART, ["/a", "/a", "/b", "/b"]) == [None] * RANKS
    told = "train.resume: no run to continue on node0; copy node1:/local/run there"
    assert check(APART, [None, None, "/local/run", "/local/run"]) == [told] * RANKS
    told = "train.resume: ranks would continue different runs, /a, /b"
    assert check(TOGETHER, ["/a", "/a", "/b", "/b"]) == [told] * RANKS


def test_the_newest_that_every_node_holds(world):
    def held(groups, *listed):
        folder = Path("/local/run/checkpoints")
        digests = [{name: name if isinstance(names, list) else names[name] for name in names} for names in listed]
        return world.run(lambda rank: Writers(groups[rank]).held_by_all(digests[rank // 2], folder))

    assert held(APART, ["step-9", "step-6", "step-3"], ["step-6", "step-3"]) == [["step-6", "step-3"]] * RANKS
    assert held(TOGETHER, ["step-9", "step-6"], ["step-6"]) == [["step-9", "step-6"]] * RANKS  # rank 0's view
    assert held(TOGETHER, [], []) == [[]] * RANKS
    # A node that was away while the others went back and another way: step 9 is not the same there.
    assert held(APART, {"step-9": "a", "step-6": "c"}, {"step-9": "b", "step-6": "c"}) == [["step-6"]] * RANKS
    told = (
        "train.resume: no checkpoint is on every node: step-9 is not on node0, or is another; copy "
        "node1:/local/run/checkpoints/step-9 there"
    )
    assert held(APART, ["step-6"], ["step-9"]) == [told] * RANKS
