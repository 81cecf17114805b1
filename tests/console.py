"""Runs the project's commands one after another in this process: see ``launching.Console``, which starts it.

``python tests/console.py FOLDER FIRST WATCHED``: waits for FOLDER/FIRST.json and the numbers after it, each the
arguments of a Python command, and leaves standard output, standard error and exit code of each beside it, per rank.
``null`` ends it, and so does the end of the process WATCHED. A crash, or SIGABRT, leaves every thread's trace there.
"""

import contextlib
import faulthandler
import gc
import itertools
import json
import os
import runpy
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from torch.nn import functional

POLL_S = 0.02
MANY_RANKS = 4


def main(folder: Path, first: int, watched: int) -> None:
    rank, linear = os.environ.get("RANK", "0"), functional.linear
    for number in itertools.count(first):
        asked = wait_for(folder / f"{number}.json", watched)
        if asked is None:
            if int(os.environ.get("WORLD_SIZE", "1")) > MANY_RANKS:
                flush()
                os._exit(0)  # clearing up after eight takes two cores 10 s
            return
        place = folder / f"{number}-rank-{rank}"
        with redirected(place):
            code = run(*asked)
        functional.linear = linear  # ZeRO-3 puts its own there for good, whose last bits are others
        place.with_suffix(".unfinished").write_text(str(code))
        place.with_suffix(".unfinished").rename(place.with_suffix(".code"))
        gc.collect()


def wait_for(file: Path, watched: int) -> list[str] | None:
    while not file.exists():
        if not Path(f"/proc/{watched}").exists():
            return None
        time.sleep(POLL_S)
    return json.loads(file.read_text())


@contextlib.contextmanager
def redirected(place: Path) -> Iterator[None]:
    """Send what this process, its libraries and its children write to PLACE.out and PLACE.err."""
    flush()
    saved = [os.dup(descriptor) for descriptor in (1, 2)]
    for descriptor, name in ((1, ".out"), (2, ".err")):
        file = os.open(place.with_suffix(name), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    try:
        yield
    finally:
        flush()
        for descriptor, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, descriptor)
            os.close(copy)


def flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def run(script: str, *arguments: str) -> int:
    """Run a script as ``python SCRIPT ...`` does, down to the trace of an error and the exit code."""
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ending:
        if ending.code is None or isinstance(ending.code, int):
            return ending.code or 0
        print(ending.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    faulthandler.enable()
    main(Path(sys.argv[-3]), *map(int, sys.argv[-2:]))
