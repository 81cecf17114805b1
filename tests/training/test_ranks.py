"""A rank that is gone: what is said of it, and by whom. tests/resilience/test_two_nodes.py really loses one."""

import pytest
import torch

from everest_ds.config.errors import one_line_errors
from everest_ds.training import ranks

H100 = "NVIDIA H100 80GB HBM3"
NODES = [("node0", "10.0.0.1")] * 2 + [("node1", "10.0.0.2")] * 2


def said(address: str) -> None:
    """Meet a lost peer as a run does."""
    with one_line_errors("pretrain"), ranks.naming_the_lost():
        raise RuntimeError(f"[pair.cc:553] Connection closed by peer [{address}]:4321")


@pytest.fixture(params=[0, 1])
def local_rank(request, monkeypatch):
    """Of the first node's two ranks, in a run of two nodes."""
    monkeypatch.setattr(ranks, "_nodes", NODES)
    monkeypatch.setattr(ranks.LostRankError, "linger_s", 0.0)
    for name, value in {
        "WORLD_SIZE": 4,
        "LOCAL_WORLD_SIZE": 2,
        "RANK": request.param,
        "LOCAL_RANK": request.param,
    }.items():
        monkeypatch.setenv(name, str(value))
    return request.param


def test_a_lost_node_is_named_by_whichever_rank_meets_it(local_rank, capsys):
    with pytest.raises(SystemExit) as ended:
        said("10.0.0.2")
    assert ended.value.code == 1
    assert "lost contact with node1 (ranks 2, 3), which has ended\n" in capsys.readouterr().err


def test_a_lost_neighbour_is_spoken_of_by_the_first_alone(local_rank, capsys):
    with pytest.raises(SystemExit) as ended:
        said("10.0.0.1")
    assert ended.value.code == 1
    assert capsys.readouterr().err.count("lost contact with another rank, which has ended") == (local_rank == 0)


def test_a_device_is_called_by_its_model(monkeypatch):
    class Cuda:
        def device_name(self, index: int | None = None) -> str:
            return "cuda" if index is None else f"cuda:{index}"

    monkeypatch.setattr(ranks, "get_accelerator", Cuda)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"{H100} number {index}")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert ranks.device_name() == f"{H100} number 3"
    assert ranks.device_name(1) == f"{H100} number 1"
