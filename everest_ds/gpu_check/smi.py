"""What NVIDIA's driver says of the first GPU, asked by a process that doesn't use it: a context would take memory."""

from __future__ import annotations

import subprocess

_PATIENCE_S = 20.0


def card() -> str:
    """Return the card's name, as torch has it too; "" where it isn't known."""
    return next(iter(_ask("--query-gpu=name")), "")


def processes() -> list[str]:
    """Return the ids of processes that compute on it."""
    return _ask("--query-compute-apps=pid")


def _ask(query: str) -> list[str]:
    command = ["nvidia-smi", query, "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []
