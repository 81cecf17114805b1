"""Starting the project's commands as a user does: real processes, the real deepspeed launcher, loopback only."""

import json
import os
import subprocess
import sys
from pathlib import Path

from everest_ds.training.ranks import free_port

ROOT = Path(__file__).parent.parent
DS_CONFIGS = ROOT / "ds_configs"


def run(*command: str | Path, timeout_s: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a Python script of the project on one rank, without a launcher."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | environment
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def deepspeed(ranks: int, *command: str | Path, timeout_s: float = 600, **environment: str):
    """Run a Python script of the project under DeepSpeed's launcher."""
    launcher = ("-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks), "--master_port", str(free_port()))
    return run(*launcher, *command, timeout_s=timeout_s, **environment)


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in metrics(run_dir)]
