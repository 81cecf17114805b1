"""What parts are made of: cases, and the rows that come of them."""

from __future__ import annotations

import dataclasses
import json
import os
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from everest_ds.config.errors import UserError, shortened
from everest_ds.config.json_text import parse_json

Values = dict[str, Any]
Status = Literal["ok", "failed", "not run"]
OUT_OF_TIME = "no time was left"
_LONGEST_REASON = 300


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the check is asked for.

    ``device``: "cuda" or "cpu". ``tiny``: models and batches that a CPU is done with in no time. ``folder``: where
    parts may write while the check lasts; ``out``: where what is kept goes. ``deadline`` of the part and ``end`` of the
    check are as ``time.time()`` counts.
    """

    device: str
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
    whatever else it raises is a failure, too.
    """

    name: str
    run: Callable[[], Values]


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
    return Row(part=part, case=case.name, status=status, reason=reason, seconds=seconds, values=values)


class RowsFile:
    """A file of rows, one JSON object a line, each on disk before the next case begins.

    A case's first line says that it has begun; if the process ends before the second, :meth:`read` knows where.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def begin(self, case: str) -> None:
        """Note that a case begins."""
        self._append({"begun": case})

    def write(self, row: Row) -> None:
        """Write a case's row."""
        self._append(row.as_json())

    def _append(self, line: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> tuple[list[Row], str]:
        """Return the rows, and the name of a case that began and never ended ("" if there is none)."""
        rows, begun = [], ""
        lines: Iterable[str] = self._path.read_text(encoding="utf-8").splitlines() if self._path.is_file() else ()
        for line in lines:
            try:
                values = parse_json(line)
            except ValueError:  # the process ended while it wrote
                continue
            if "begun" in values:
                begun = values["begun"]
            else:
                rows.append(Row(**values))
                begun = ""
        return rows, begun
