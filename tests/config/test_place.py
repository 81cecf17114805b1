"""Who this process is: what launchers say, and what SLURM says where there is no launcher."""

import logging
import subprocess
import sys

import pytest

from everest_ds.config import place
from everest_ds.config.errors import RankError, UserError, one_line_errors

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch):
    """No launcher's, and what a test sets is gone afterwards."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(place.socket, "gethostname", lambda: "node2")
    return lambda **variables: [monkeypatch.setenv(name, str(value)) for name, value in variables.items()]


SLURM = ("PROCID", "STEP_NUM_TASKS", "NODEID", "LOCALID", "STEP_TASKS_PER_NODE", "STEP_NODELIST")


def task(*values: int | str) -> dict:
    return {"SLURM_JOB_ID": 1234567} | {f"SLURM_{name}": value for name, value in zip(SLURM, values, strict=True)}


@pytest.mark.parametrize(
    ("asked", "first", "here"),
    [
        (task(3, 4, 1, 1, "2(x2)", "node[0-1]"), "node0", range(2, 4)),  # as SLURM 22.05 has set them
        (task(17, 20, 2, 1, "8(x2),4", "gpu[03-04,07]"), "gpu03", range(16, 20)),
        (task(0, 12, 0, 0, "8,4", "a1,b[2-3]"), "a1", range(8)),
        (task(9, 16, 1, 1, "8(x2)", "r1c[2-3].x"), "r1c2.x", range(8, 16)),
        (task(1, 4, 1, 0, "1(x4)", "rack[3-4]gpu[01,07],other"), "rack3gpu01", range(1, 2)),
    ],
)
def test_tasks_of_srun(environment, asked, first, here):
    environment(**asked)
    place.take_slurm_task()
    assert (place.rank(), place.local_rank()) == (asked["SLURM_PROCID"], asked["SLURM_LOCALID"])
    assert place.on_this_node() == here
    assert place.several_nodes()
    assert (place.os.environ["MASTER_ADDR"], place.os.environ["MASTER_PORT"]) == (first, "24567")


def test_a_launcher_below_srun_and_a_batch_script_say_otherwise(environment):
    environment(**task(1, 2, 1, 0, "1(x2)", "node[0-1]"), RANK=8, WORLD_SIZE=16, LOCAL_SIZE=8)
    place.take_slurm_task()
    assert (place.rank(), place.world_size(), place.on_this_node()) == (8, 16, range(8, 16))


@pytest.mark.parametrize(
    ("said", "too_little"),
    [
        ({}, False),
        ({"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2}, False),
        ({"RANK": 9, "LOCAL_RANK": 1, "WORLD_SIZE": 16}, True),
        ({"RANK": 9, "LOCAL_RANK": 1, "WORLD_SIZE": 16, "LOCAL_SIZE": 8}, False),
        ({"RANK": 9, "LOCAL_RANK": 1, "WORLD_SIZE": 16, "LOCAL_WORLD_SIZE": 8}, False),
    ],
)
def test_a_launcher_that_hides_how_many_ranks_a_node_has(environment, said, too_little):
    environment(**said)
    assert place.says_too_little() is too_little


def test_alone(environment):
    environment(SLURM_JOB_ID=1, SLURM_NTASKS=16, SLURM_PROCID=0)  # a batch script's, of a job of 16 tasks
    place.take_slurm_task()
    assert (place.rank(), place.world_size(), place.on_this_node()) == (0, 1, range(1))
    assert not place.several_nodes()
    assert place.speaker() == ""


def said(error: Exception, capsys) -> str:
    with pytest.raises((SystemExit, type(error))), one_line_errors("prog"):
        raise error
    return capsys.readouterr().err


def test_errors_name_rank_and_host(environment, capsys):
    assert said(UserError("wrong"), capsys) == "prog: error: wrong\n"
    assert said(ValueError("a bug"), capsys) == ""
    environment(RANK=3, LOCAL_RANK=1, WORLD_SIZE=4, LOCAL_WORLD_SIZE=2)
    assert said(UserError("all ranks of the node find it"), capsys) == ""
    assert said(RankError("wrong"), capsys) == "prog: error: [rank 3 on node2] wrong\n"
    assert said(ValueError("a bug"), capsys) == "prog: error: [rank 3 on node2] ValueError, as follows\n"
    environment(RANK=2, LOCAL_RANK=0)
    assert said(UserError("wrong"), capsys) == "prog: error: [rank 2 on node2] wrong\n"


WARN = """
import logging
from everest_ds.config.logs import set_up_logging
set_up_logging()
for name in ("data.watch", "training.job", "training.files"):
    logging.getLogger(f"everest_ds.{name}").warning("%s has trouble", name)
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_warnings_name_rank_and_host(rank):
    """All of them by rank 0; by another those that may be its own."""
    variables = {"RANK": str(rank), "WORLD_SIZE": "2", "PATH": ""}
    paths = {name: place.os.environ[name] for name in ("PYTHONPATH",) if name in place.os.environ}
    done = subprocess.run(
        [sys.executable, "-c", WARN], env=variables | paths, capture_output=True, text=True, check=True
    )
    who = f"[rank {rank} on {place.host()}] {logging.getLevelName(logging.WARNING)}: "
    spoken = ("data.watch", "training.job", "training.files")
    lines = [f"{who}{name} has trouble" for name in spoken if rank == 0 or name != "training.job"]
    assert done.stderr.splitlines() == lines
