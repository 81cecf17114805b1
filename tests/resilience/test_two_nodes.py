"""Two nodes of two ranks under each launcher, on shared storage and each on its own: one of them is lost, twice."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

from killing import Case, assert_same_run, checkpoints, pretraining, steps_logged
from launching import DS_CONFIGS, ROOT
from two_nodes import Nodes, NodesConsole, OnNode, two_nodes

STEPS = 15
# A node that is lost ends the other's run within:
LONGEST_END_S = 60


def lose_the_second(running: list[OnNode], run_dir: Path, saved: int) -> None:
    """Kill all of a node once a step has been saved."""
    first, second = running
    newest = f"step-{saved:08d}"
    seen = first.wait_for(lambda: newest in checkpoints(run_dir))
    assert seen, "".join(node.text()[-3000:] for node in running)
    second.kill()


def assert_names_the_lost(nodes: Nodes, said: str) -> None:
    first, second = nodes.nodes
    lost = f"{second.host} (ranks 2, 3)" if nodes.apart else "another rank"
    assert f"error: [rank 0 on {first.host}] lost contact with {lost}, which has ended\n" in said
    assert 'run/pretrain.py", line' not in said  # the launcher's own trace is not ours to avoid


def with_local_storage(case: Case, folder: Path) -> Case:
    ds = json.loads((DS_CONFIGS / "zero2.json").read_text())
    file = folder / "local.json"
    file.write_text(json.dumps(ds | {"checkpoint": {"use_node_local_storage": True}}))
    return replace(case, ds=file)


def straight_and_lost(nodes: Nodes, case: Case, folders: list[Path], tmp_path: Path) -> None:
    """A run that nothing happens to, and one whose storage both nodes share, until one of them is lost."""
    console = NodesConsole(nodes, folders, tmp_path / "console")
    try:
        console.succeed(*case.command(tmp_path / "straight"))
        place = console.begin(case.command(tmp_path / "shared"))
        lose_the_second(console.running, tmp_path / "shared", 3)
        console.running[0].wait_for(place.with_suffix(".code").exists, LONGEST_END_S)
        assert place.with_suffix(".code").read_text() == "1"
        assert_names_the_lost(nodes, place.with_suffix(".err").read_text())
    finally:
        for node in console.running:
            node.kill()


def lost_and_resumed(nodes: Nodes, command: list[str], folders: list[Path], run_dir: Path) -> None:
    """On each node's own storage; ``run_dir`` is the first one's."""
    running = nodes.start("deepspeed", command, folders)
    try:
        lose_the_second(running, run_dir, 9)
        assert running[0].wait(LONGEST_END_S) == 1, running[0].text()[-3000:]
        assert_names_the_lost(nodes, running[0].text())
        running += nodes.start("torchrun", command, folders)
        assert [node.wait() for node in running[2:]] == [0, 0], "".join(node.text()[-3000:] for node in running)
    finally:
        for node in running:
            node.kill()


def test_a_lost_node_comes_back(motion_videos, tmp_path):
    """The run ends like one that nothing happened to, to the last bit."""
    case = replace(pretraining(motion_videos, STEPS), script=str(ROOT / "run/pretrain.py"))
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    own, others = (folder / "run" for folder in folders)
    with two_nodes() as nodes:
        straight_and_lost(nodes, case, folders, tmp_path)
        for run_dir in (own, others):
            shutil.copytree(tmp_path / "shared", run_dir)
        (others / "metrics.jsonl").unlink()
        command = with_local_storage(case, tmp_path).command(Path("run"))
        lost_and_resumed(nodes, command, folders, own)
    assert_same_run(tmp_path / "straight", own)
    assert steps_logged(own)[-1] == STEPS
    # Each node holds all of it, written by its two ranks; what is of the run as a whole, rank 0 alone writes.
    assert checkpoints(own)[-1] == f"step-{STEPS:08d}"
    for name in checkpoints(own):
        here, there = (sorted((run_dir / "checkpoints" / name).iterdir()) for run_dir in (own, others))
        assert [(file.name, file.read_bytes()) for file in here] == [(file.name, file.read_bytes()) for file in there]
    assert [file.name for file in here if file.name.startswith("part-")] == [
        "part-00000-of-00002.safetensors",
        "part-00001-of-00002.safetensors",
    ]
    assert not (others / "metrics.jsonl").exists()
    assert not (others / "model.safetensors").exists()
