"""Two nodes of two ranks, under DeepSpeed's launcher and torch's: one of them is lost, and comes back or is new."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from killing import Case, assert_same_run, checkpoints, pretraining
from launching import DS_CONFIGS, ROOT
from two_nodes import Nodes, NodesConsole, two_nodes

STEPS = 12
# A node that is lost ends the other's launcher within:
LONGEST_END_S = 60


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    with two_nodes() as made:
        yield made


def with_local_storage(case: Case, file: Path) -> Case:
    ds = json.loads((DS_CONFIGS / "zero2.json").read_text())
    file.write_text(json.dumps(ds | {"checkpoint": {"use_node_local_storage": True}}))
    return replace(case, ds=file)


def lose_the_second(nodes: Nodes, command: list[str], folders: list[Path], run_dirs: list[Path]) -> None:
    """Kill all of a node after each node has a run's second checkpoint; the other says so and ends by itself."""
    first, second = nodes.start("deepspeed", command, folders)
    try:
        saved = first.wait_for(lambda: all("step-00000006" in checkpoints(run_dir) for run_dir in run_dirs))
        assert saved, first.text()[-3000:] + second.text()[-3000:]
        second.kill()
        assert first.wait(LONGEST_END_S) == 1, first.text()[-3000:]
    finally:
        first.kill()
        second.kill()
    here, there = nodes.nodes
    # Where the other node can't be told from this one, its first rank alone speaks.
    speakers, lost = ("[01]", rf"{there.host} \(ranks 2, 3\)") if nodes.apart else ("0", "another rank")
    line = rf"error: \[rank {speakers} on {here.host}\] lost contact with {lost}, which has ended\n"
    assert re.search(line, first.text()), first.text()
    assert 'run/pretrain.py", line' not in first.text()  # the launcher's own trace is not ours to avoid
    assert len(checkpoints(run_dirs[0])) < STEPS // 3


def assert_each_holds_all(own: Path, others: Path) -> None:
    """Checkpoints, written by the node's two ranks; what is of the run as a whole, rank 0 alone has written."""
    assert checkpoints(own)[-1] == f"step-{STEPS:08d}"
    for name in checkpoints(own):
        here, there = (sorted((run_dir / "checkpoints" / name).iterdir()) for run_dir in (own, others))
        assert [(file.name, file.read_bytes()) for file in here] == [(file.name, file.read_bytes()) for file in there]
    parts = [f"part-0000{rank}-of-00002.safetensors" for rank in range(2)]
    assert [file.name for file in here if file.name.startswith("part-")] == parts
    assert not (others / "metrics.jsonl").exists()
    assert not (others / "model.safetensors").exists()


def test_a_lost_node(nodes, motion_videos, tmp_path):
    """The run goes on, on each node's own storage or on what they share, and ends with a straight one's bits."""
    case = replace(pretraining(motion_videos, STEPS), script=str(ROOT / "run/pretrain.py"))
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    own, others = (folder / "run" for folder in folders)
    command = with_local_storage(case, tmp_path / "local.json").command(Path("run"))
    lose_the_second(nodes, command, folders, [own, others])
    shutil.copytree(own, tmp_path / "shared")
    with contextlib.closing(NodesConsole(nodes, folders, tmp_path / "console")) as console:
        for run_dir in (tmp_path / "straight", tmp_path / "shared"):
            console.succeed(*case.command(run_dir))
        console.succeed(*command)
        assert_each_holds_all(own, others)
        shutil.rmtree(others)
        done = console.run(*command)
    assert done.returncode == 2
    host = nodes.nodes[1].host
    told = f"train.resume: no run to continue on {host}; copy {nodes.nodes[0].host}:run there"
    for rank, node in zip((0, 2), nodes.nodes, strict=True):
        assert f"pretrain: error: [rank {rank} on {node.host}] {told}\n" in done.stderr
    for run_dir in (tmp_path / "shared", own):
        assert_same_run(tmp_path / "straight", run_dir)
