"""The process of one part: ``python -m everest_ds.gpu_check.child PART ASKED ROWS``."""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path

from everest_ds.config.logs import set_up_logging
from everest_ds.gpu_check.cases import OUT_OF_TIME, Asked, Row, RowsFile, run_case
from everest_ds.gpu_check.parts import BY_NAME


def main(name: str, asked_json: str, rows_path: str) -> None:
    """Run a part's cases until its time is over; write each row at once."""
    set_up_logging()
    asked, rows = Asked.from_json(asked_json), RowsFile(Path(rows_path))
    rows.begin("start")
    module = importlib.import_module(f"everest_ds.gpu_check.{BY_NAME[name].module}")
    for case in module.cases(asked):
        if not case.may_begin(asked.deadline):
            rows.write(Row(part=name, case=case.name, status="not run", reason=OUT_OF_TIME))
            continue
        rows.begin(case.name)
        row = run_case(name, case)
        rows.write(row)
        left = max(0, round(asked.end - time.time()))
        told = row.reason or json.dumps(row.values)[:120]
        print(
            f"{name}: {case.name}: {row.status}, {row.seconds:.1f} s; {told} ({left // 60}:{left % 60:02d} left)",
            file=sys.stderr,
            flush=True,
        )
    rows.end()


if __name__ == "__main__":
    main(*sys.argv[1:4])
