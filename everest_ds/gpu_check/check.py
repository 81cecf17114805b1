"""Runs the parts, whatever becomes of any of them, and writes page and JSON after each."""

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

from everest_ds.gpu_check import cards, page
from everest_ds.gpu_check.cases import Asked, Row, RowsFile
from everest_ds.gpu_check.parts import CONSTANTS, MACHINE, MACHINE_S, Part
from everest_ds.training import files

# A case that has begun may take this much longer than its part has; then its process is ended.
_GRACE_S = 45.0
# On one machine: names of hosts need not resolve.
_LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True, kw_only=True)
class Check:
    """A check: on which device, for how long once DeepSpeed's op is built, which parts, and where its results go."""

    device: str
    tiny: bool
    minutes: float
    out: Path
    command: str
    parts: Sequence[Part]
    say: Callable[[str], None]

    def run(self) -> list[Row]:
        """Run every part; return all rows."""
        rows: list[Row] = []
        with tempfile.TemporaryDirectory(prefix="gpu-check-") as scratch:
            planner = self._start_planner(Path(scratch))
            try:
                end = time.time() + MACHINE_S
                for place, part in enumerate(self.parts):
                    if place == 1:
                        end = time.time() + 60 * self.minutes
                    rows += self._run_part(part, Path(scratch), deadline=_deadline(self.parts[place:], end), end=end)
                    self._write(rows)
            finally:
                _end(planner)
        if self.device == "cuda":
            self._keep_constants(rows)
        return rows

    def _asked(self, folder: Path, *, deadline: float, end: float) -> Asked:
        return Asked(device=self.device, tiny=self.tiny, folder=folder, out=self.out, deadline=deadline, end=end)

    def _start_planner(self, scratch: Path) -> subprocess.Popen[bytes]:
        """Plan all cases beside the first parts: that takes a minute of a core, and no GPU."""
        asked = self._asked(scratch, deadline=0, end=0)
        command = [sys.executable, "-m", "everest_ds.gpu_check.plans", asked.as_json()]
        return _start(command, {"CUDA_VISIBLE_DEVICES": ""})

    def _run_part(self, part: Part, scratch: Path, *, deadline: float, end: float) -> list[Row]:
        self.say(f"{part.name}: until {time.strftime('%H:%M:%S', time.localtime(deadline))}")
        path, start = scratch / f"{part.name}.jsonl", time.time()
        asked = self._asked(scratch, deadline=deadline, end=end)
        command = [sys.executable, "-m", "everest_ds.gpu_check.child", part.name, asked.as_json(), str(path)]
        process = _start(command, part.environment)
        try:
            code = process.wait(max(deadline, start) - start + _GRACE_S)
            how = f"its process ended with exit code {code}"
        except subprocess.TimeoutExpired:
            how = f"it was ended after {time.time() - start:.0f} s: too long for its part"
        finally:
            _end(process)
        rows, begun = RowsFile(path).read()
        if begun:
            rows.append(Row(part=part.name, case=begun, status="failed", reason=how, seconds=time.time() - start))
        return rows

    def _write(self, rows: Sequence[Row]) -> None:
        name = page.file_name(rows, self.device, tiny=self.tiny)
        numbers = {"command": self.command, "device": self.device, "rows": [row.as_json() for row in rows]}
        texts = {
            ".json": json.dumps(numbers, indent=1) + "\n",
            ".md": page.markdown(rows, command=self.command, tiny=self.tiny),
        }
        for suffix, text in texts.items():
            path = self.out / f"{name}{suffix}"
            if len({row.part for row in rows}) == 1:
                self._set_aside(path)
            files.write(path, text)

    def _set_aside(self, path: Path) -> None:
        """Keep what an earlier check wrote, under the time at which it did."""
        if path.exists():
            written = time.strftime("%Y%m%d-%H%M%S", time.localtime(path.stat().st_mtime))
            path.replace(path.with_name(f"{path.stem}-{written}{path.suffix}"))
            self.say(f"{path} was there: it is now {path.stem}-{written}{path.suffix}")

    def _keep_constants(self, rows: Sequence[Row]) -> None:
        values = {row.case: row.values for row in rows if row.part in (MACHINE, CONSTANTS) and row.status == "ok"}
        self.say(cards.keep(values))


def _start(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command, env={**os.environ, **_LOOPBACK, **environment}, stdin=subprocess.DEVNULL, start_new_session=True
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process with all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def failed(rows: Sequence[Row]) -> list[Row]:
    """Return what went wrong."""
    return [row for row in rows if row.status == "failed"]


def _deadline(parts: Sequence[Part], end: float) -> float:
    """When the first of these parts shall be done, for the others to have their shares."""
    now, shares = time.time(), sum(part.share for part in parts)
    return end if not parts[0].share else now + (end - now) * parts[0].share / shares
