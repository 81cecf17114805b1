"""What parts are made of: cases, and the rows that come of them."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from everest_ds.config.errors import UserError, shortened

Values = dict[str, Any]
Status = Literal["ok", "failed", "not run"]
OUT_OF_TIME = "no time was left"
_LONGEST_REASON = 300


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the check is asked for.

    ``device``: "cuda" or "cpu"; ``card``: the GPU's name, as the driver has it. ``tiny``: models and batches that a CPU
    is done with in no time. ``folder``: where parts may write while the check lasts; ``out``: where what is kept goes.
    ``deadline`` of the part and ``end`` of the check are as ``time.time()`` counts.
    """

    device: str
    card: str
    tiny: bool
    folder: Path
    out: Path
    deadline: float
    end: float

    def as_json(self) -> str:
        """For the command line of a part's process."""
        return json.dumps(dataclasses.asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> Asked:
        """Undo :meth:`as_json`."""
        values = json.loads(text)
        return cls(**{**values, "folder": Path(values["folder"]), "out": Path(values["out"])})


class NotHereError(Exception):
    """This device, or this machine, doesn't have what a case looks at."""


class WrongError(Exception):
    """What came out isn't what is claimed; ``values`` are the numbers all the same."""

    def __init__(self, reason: str, values: Values) -> None:
        super().__init__(reason)
        self.values = values


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row: ``run`` returns its numbers.

    It raises :class:`NotHereError` where there is nothing to look at, :class:`WrongError` where a claim doesn't hold;
    whatever else it raises is a failure, too. ``least_s``: how much time its part must have left for it to begin;
    ``always``: it takes none, and is run when there is no time left, too.
    """

    name: str
    run: Callable[[], Values]
    least_s: float = 0.0
    always: bool = False

    def may_begin(self, deadline: float) -> bool:
        """Say whether there is time for it."""
        return self.always or time.time() + self.least_s <= deadline


@dataclass(frozen=True, kw_only=True)
class Row:
    """How a case ended; ``reason`` says why it isn't ok."""

    part: str
    case: str
    status: Status
    reason: str = ""
    seconds: float = 0.0
    values: Values = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)


def run_case(part: str, case: Case) -> Row:
    """Run a case. Whatever it raises becomes a row; a bug's trace goes to stderr as well."""
    start = time.monotonic()
    status: Status = "ok"
    reason, values = "", {}
    try:
        values = case.run()
    except NotHereError as error:
        status, reason = "not run", str(error)
    except WrongError as error:
        status, reason, values = "failed", str(error), error.values
    except UserError as error:
        status, reason = "failed", str(error)
    except Exception as error:
        traceback.print_exc()
        status, reason = "failed", f"{type(error).__name__}: {' '.join(str(error).split())}"
    seconds = time.monotonic() - start
    reason = shortened(reason, _LONGEST_REASON)
    return Row(part=part, case=case.name, status=status, reason=reason, seconds=seconds, values=_plain(values))


def _plain(value: Any) -> Any:
    """Return a value as JSON can hold it: what isn't a finite number is a word."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a part has written: its rows, a case that has begun and not ended (else ""), and if it came to its end."""

    rows: list[Row]
    begun: str
    ended: bool


class RowsFile:
    """A file of rows, one JSON object a line, each on disk before the next case begins.

    A case's first line says that it has begun, the last of all that the part has ended: if its process ends in between,
    :meth:`read` knows where.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, case: str) -> None:
        """Note that a case begins."""
        self._append({"begun": case})

    def write(self, row: Row) -> None:
        """Write a case's row."""
        self._append(row.as_json())

    def end(self) -> None:
        """Note that the part is done."""
        self._append({"ended": True})

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> Written:
        """Return what is there so far."""
        rows, begun, ended = [], "", False
        lines: Iterable[str] = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else ()
        for line in lines:
            try:
                values = json.loads(line)
            except ValueError:  # not written to its end
                continue
            begun, ended = values.get("begun", ""), "ended" in values
            if "case" in values:
                rows.append(Row(**values))
        return Written(rows=rows, begun=begun, ended=ended)
