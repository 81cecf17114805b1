"""Runs the parts, whatever becomes of any of them, and writes page and JSON after every case."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from everest_ds.gpu_check import cards, page, smi
from everest_ds.gpu_check.cases import OUT_OF_TIME, Asked, Row, RowsFile
from everest_ds.gpu_check.parts import CONSTANTS, MACHINE, MACHINE_S, Part
from everest_ds.gpu_check.settings import ROOT, plain_name
from everest_ds.training import files

# A case that has begun may take this much longer than its part has; then its process is ended.
_GRACE_S = 45.0
_POLL_S = 0.5
# On one machine names of hosts need not resolve.
_LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
_NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
_SUFFIXES = (".json", ".md")


@dataclass(frozen=True, kw_only=True)
class Check:
    """A check.

    ``card``: as the driver calls it; ``minutes``: once DeepSpeed's op is built; ``out``: the folder of page and JSON;
    ``command``: that started it; ``say`` is told how far it has got.
    """

    device: str
    card: str
    tiny: bool
    minutes: float
    out: Path
    command: str
    parts: Sequence[Part]
    say: Callable[[str], None]

    def run(self) -> list[Row]:
        """Run every part; return all rows."""
        rows: list[Row] = []
        self._set_aside()
        others = smi.processes() if self.device == "cuda" else []
        if others:
            self.say(
                f"other processes use this GPU ({', '.join(others)}): memory and speed are not those of the card alone"
            )
        with tempfile.TemporaryDirectory(prefix="gpu-check-") as scratch:
            planner = self._start_planner(Path(scratch))
            try:
                end = time.time() + MACHINE_S
                for place, part in enumerate(self.parts):
                    if place == 1:
                        end = time.time() + 60 * self.minutes
                    deadline = _deadline(self.parts[place:], end)
                    rows = self._run_part(part, Path(scratch), rows, deadline=deadline, end=end)
                    if part.name == CONSTANTS and self.device == "cuda" and not others:
                        self._keep_constants(rows)
            finally:
                _end(planner)
        return rows

    def _start_planner(self, scratch: Path) -> subprocess.Popen[bytes]:
        """Plan all cases beside the first parts: that takes a minute of a core, and no GPU."""
        return _start("plans", self._asked(scratch, deadline=0, end=0).as_json(), environment=_NO_GPU)

    def _asked(self, folder: Path, *, deadline: float, end: float) -> Asked:
        return Asked(
            device=self.device,
            card=self.card,
            tiny=self.tiny,
            folder=folder,
            out=self.out,
            deadline=deadline,
            end=end,
        )

    def _run_part(self, part: Part, scratch: Path, before: list[Row], *, deadline: float, end: float) -> list[Row]:
        """Run a part; return the rows of those before it, and its own. They are on disk as soon as they are there."""
        if time.time() > end:
            return self._write([*before, Row(part=part.name, case="all", status="not run", reason=OUT_OF_TIME)])
        self.say(f"{part.name}: until {time.strftime('%H:%M:%S', time.localtime(deadline))}")
        rows_file, start = RowsFile(scratch / f"{part.name}.jsonl"), time.time()
        asked = self._asked(scratch, deadline=deadline, end=end)
        environment = {**part.environment, **(_NO_GPU if self.device == "cpu" else {})}
        process = _start("child", part.name, asked.as_json(), str(rows_file.path), environment=environment)
        count = 0
        try:
            while process.poll() is None and time.time() < deadline + _GRACE_S:
                time.sleep(_POLL_S)
                if len(rows := rows_file.read().rows) > count:
                    count = len(rows)
                    self._write([*before, *rows])
            code = process.poll()
        finally:
            _end(process)
        written = rows_file.read()
        rows = [*before, *written.rows]
        if not written.ended:
            seconds = time.time() - start
            how = (
                f"ended with exit code {code}"
                if code is not None
                else f"was ended after {seconds:.0f} s, too long for its part"
            )
            case, reason = written.begun or "between two cases", f"the part's process {how}"
            rows.append(Row(part=part.name, case=case, status="failed", reason=reason, seconds=seconds))
        return self._write(rows)

    @property
    def _name(self) -> str:
        return plain_name(self.card or self.device) + ("-tiny" if self.tiny else "")

    def _write(self, rows: list[Row]) -> list[Row]:
        numbers = {"command": self.command, "device": self.device, "rows": [row.as_json() for row in rows]}
        texts = (json.dumps(numbers, indent=1) + "\n", page.markdown(rows, command=self.command, tiny=self.tiny))
        for suffix, text in zip(_SUFFIXES, texts, strict=True):
            files.write(self.out / f"{self._name}{suffix}", text)
        return rows

    def _set_aside(self) -> None:
        """Keep what an earlier check wrote, under the time at which it did."""
        for path in (self.out / f"{self._name}{suffix}" for suffix in _SUFFIXES):
            if path.exists():
                written = time.strftime("%Y%m%d-%H%M%S", time.localtime(path.stat().st_mtime))
                path.replace(path.with_name(f"{path.stem}-{written}{path.suffix}"))
                self.say(f"{path} was there: it is now {path.stem}-{written}{path.suffix}")

    def _keep_constants(self, rows: Sequence[Row]) -> None:
        values = {row.case: row.values for row in rows if row.part in (MACHINE, CONSTANTS) and row.status == "ok"}
        self.say(cards.keep(values))


def failed(rows: Sequence[Row]) -> list[Row]:
    """Return what went wrong."""
    return [row for row in rows if row.status == "failed"]


def _start(module: str, *arguments: str, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a module of this package, of this checkout, as the leader of a process group."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-u", "-m", f"{__package__}.{module}", *arguments],
        cwd=ROOT,
        env={**os.environ, **_LOOPBACK, "PYTHONPATH": path, **environment},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process with all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _deadline(parts: Sequence[Part], end: float) -> float:
    """When the first of these parts shall be done, for the others to have their shares."""
    now, shares = time.time(), sum(part.share for part in parts)
    return end if not parts[0].share else now + (end - now) * parts[0].share / shares
