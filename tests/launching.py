"""Starting the project's commands as a user does: real processes, the real deepspeed launcher, loopback only."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
DS_CONFIGS = ROOT / "ds_configs"
Done = subprocess.CompletedProcess[str]


def environment(ranks: int = 1) -> dict[str, str]:
    """What a process finds: nothing of a process group; several ranks share out the cores by themselves."""
    hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK", *(["OMP_NUM_THREADS"] if ranks > 1 else []))
    return {k: v for k, v in os.environ.items() if k not in hidden}


def run(*command: str | Path, timeout_s: float = 300, ranks: int = 1, **variables: str) -> Done:
    """Run a Python script of the project on one rank, without a launcher."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=environment(ranks) | variables,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def launcher(ranks: int) -> list[str]:
    """Return what starts a script under DeepSpeed's launcher, after the name of Python."""
    from everest_ds.training.ranks import free_port  # noqa: PLC0415 - imports DeepSpeed, which most tests don't need

    port = str(free_port())
    return ["-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks), "--master_port", port]


def deepspeed(ranks: int, *command: str | Path, timeout_s: float = 600) -> Done:
    """Run a Python script of the project under DeepSpeed's launcher."""
    return run(*launcher(ranks), *command, timeout_s=timeout_s, ranks=ranks)


class Console:
    """Commands one after another in the same processes, started once: a process takes 5 s to import DeepSpeed.

    Each runs as its script's ``__main__``, with standard output, standard error and exit code of its own. What a
    command leaves in its process the next one finds: whatever must start afresh is for :func:`run`.

    Args:
        ranks: above one, under DeepSpeed's launcher.
        folder: an empty one.
    """

    def __init__(self, ranks: int, folder: Path) -> None:
        self._ranks = ranks
        self._folder = folder
        self._asked = 0
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, *command: str | Path, timeout_s: float = 300) -> Done:
        """Run a Python script of the project; outputs of several ranks stand one after another."""
        self._start()
        number = self._ask([str(word) for word in command])
        places = [self._folder / f"{number}-rank-{rank}" for rank in range(self._ranks)]
        deadline = time.monotonic() + timeout_s
        while not all(place.with_suffix(".code").exists() for place in places):
            if self._process.poll() is not None or time.monotonic() > deadline:
                how = self._abort()
                raise AssertionError(f"{command} did not end ({how}): {self._log()} {_texts(places, '.err')[-3000:]}")
            time.sleep(0.02)
        codes = {int(place.with_suffix(".code").read_text()) for place in places}
        assert len(codes) == 1, f"ranks end {command} with {codes}: {_texts(places, '.err')[-3000:]}"
        return subprocess.CompletedProcess(command, codes.pop(), _texts(places, ".out"), _texts(places, ".err"))

    def succeed(self, *command: str | Path, timeout_s: float = 300) -> Done:
        """Run a script that must end with 0."""
        done = self.run(*command, timeout_s=timeout_s)
        assert done.returncode == 0, done.stderr[-3000:]
        return done

    def close(self) -> None:
        """End the processes."""
        if self._process is None:
            return
        self._ask(None)
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._kill()

    def _start(self) -> None:
        if self._process is not None:
            return
        script = ("tests/console.py", self._folder, self._asked, os.getpid())
        command = [*(launcher(self._ranks) if self._ranks > 1 else ()), *script]
        with (self._folder / "log.txt").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, *map(str, command)],
                cwd=ROOT,
                env=environment(self._ranks),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _ask(self, command: list[str] | None) -> int:
        number, self._asked = self._asked, self._asked + 1
        unfinished = self._folder / "unfinished"
        unfinished.write_text(json.dumps(command))
        unfinished.rename(self._folder / f"{number}.json")
        return number

    def _abort(self) -> str:
        """End the processes and say how they ended: those that still ran leave traces of what they were at."""
        code = self._process.poll()
        if code is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGABRT)
            time.sleep(1)
        self._kill()
        return "was still running" if code is None else f"exit code {code}"

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # it may have died by itself
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None

    def _log(self) -> str:
        return (self._folder / "log.txt").read_text()[-3000:]


@contextlib.contextmanager
def new_console(ranks: int, folder: Path) -> Iterator[Console]:
    """Processes of their own for a while; the folder is made."""
    folder.mkdir()
    console = Console(ranks, folder)
    try:
        yield console
    finally:
        console.close()


def _texts(places: list[Path], suffix: str) -> str:
    files = (place.with_suffix(suffix) for place in places)
    return "".join(file.read_text(errors="replace") for file in files if file.exists())


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def check_memory_record(run_dir: Path) -> dict:
    """See that tensors held came out as predicted, that items sum to them, and return what memory.json holds."""
    record = json.loads((run_dir / "memory.json").read_text())
    held, items = record["difference"]["held"], record["difference"]["items"]["device"]
    assert abs(held["share"]) < 0.01, held
    for side in ("predicted_bytes", "measured_bytes"):
        assert sum(item[side] for item in items.values()) == held[side] > 0
    off = {name: item for name, item in items.items() if abs(item["bytes"]) > 0.01 * held["measured_bytes"]}
    assert not off, items
    peak = record["difference"]["peak"]
    assert peak["measured_bytes"] == max(rank["peak_bytes"] for rank in record["per_rank"]) > 0
    return record


def losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in metrics(run_dir)]
