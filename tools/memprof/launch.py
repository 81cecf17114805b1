"""Starts the real deepspeed launcher on a list of jobs and collects what every rank measured."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from everest_ds.config.errors import EXIT_USER_ERROR, UserError

_LOG_LINES = 20
# Large blocks go back to the system as soon as they are freed, so that the resident set is what is in use. It costs
# page faults: for comparisons of memory, not of speed (mallopt(3)).
_TRIM = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_MMAP_MAX_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
}


def launch(
    jobs: list[dict[str, Any]], *, ranks: int, trim: bool = False, load_libraries: bool = True
) -> list[list[dict[str, Any]]]:
    """Measure jobs, one after another, in one group of ranks.

    Args:
        jobs: each ``name``, ``phase``, ``recipe`` (nested dictionaries), ``ds_config`` and ``steps``.
        ranks: processes on this machine.
        trim: let the C library return freed memory at once, for the sake of the resident set.
        load_libraries: run tiny models first, for the sake of the resident set too.

    Returns:
        Per job, the measurement of each rank (see :class:`everest_ds.training.measure.Measured`).

    Raises:
        UserError: the ranks ended on a mistake of the user's, or died; the log's end is shown on stderr.
    """
    with tempfile.TemporaryDirectory(prefix="memprof-") as folder:
        jobs_file = Path(folder, "jobs.json")
        asked = {"jobs": jobs, "load_libraries": load_libraries}
        jobs_file.write_text(json.dumps(asked), encoding="utf-8")
        log = Path(folder, "log.txt")
        code = _run(jobs_file, folder, log, ranks, trim)
        results = [Path(folder, f"rank-{rank}.json") for rank in range(ranks)]
        if code or not all(path.is_file() for path in results):
            raise UserError(_explain(log.read_text(encoding="utf-8", errors="replace"), code))
        per_rank = [json.loads(path.read_text(encoding="utf-8")) for path in results]
    return [list(job) for job in zip(*per_rank, strict=True)]


def _run(jobs_file: Path, folder: str, log: Path, ranks: int, trim: bool) -> int:
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks)]
    command += ["--master_port", str(_free_port()), "--module", "everest_ds.training.measure", str(jobs_file), folder]
    with (
        log.open("w", encoding="utf-8") as out,
        subprocess.Popen(
            command, stdout=out, stderr=subprocess.PIPE, text=True, env=os.environ | (_TRIM if trim else {})
        ) as process,
    ):
        assert process.stderr is not None
        for line in process.stderr:
            out.write(line)
            if line.startswith("measuring "):
                print(line, end="", file=sys.stderr, flush=True)
    return process.returncode


def _explain(log: str, code: int) -> str:
    lines = log.splitlines()
    mistakes = [line for line in lines if line.startswith("memprof: error: ")]
    if mistakes:
        return mistakes[-1].removeprefix("memprof: error: ")
    print("\n".join(lines[-_LOG_LINES:]), file=sys.stderr)
    killed = " (killed: out of memory?)" if "exits with return code = -9" in log else ""
    return f"measure: the ranks ended with code {code or EXIT_USER_ERROR}{killed}; the end of their log is above"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
