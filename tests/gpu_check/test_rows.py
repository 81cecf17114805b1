"""Whatever becomes of a case or of its process, a row says so."""

import json
import math
import os
import time

import pytest

from everest_ds.config.errors import UserError
from everest_ds.gpu_check import golden, page
from everest_ds.gpu_check.cases import Asked, Case, NotHereError, Row, RowsFile, Written, WrongError, run_case


def raising(error: Exception) -> Case:
    def run():
        raise error

    return Case(name="a case", run=run)


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (NotHereError("no GPU"), "not run", "no GPU"),
        (WrongError("off by one", {"error": 1.0}), "failed", "off by one"),
        (UserError("data.train: nothing there"), "failed", "data.train: nothing there"),
        (ZeroDivisionError("division\nby zero"), "failed", "ZeroDivisionError: division by zero"),
    ],
)
def test_what_a_case_raises_becomes_its_row(error, status, reason):
    row = run_case("memory", raising(error))
    assert (row.status, row.reason) == (status, reason)
    assert row.values == ({"error": 1.0} if isinstance(error, WrongError) else {})


def test_a_process_that_dies_leaves_its_rows_and_the_name_of_the_case(tmp_path):
    rows = RowsFile(tmp_path / "rows.jsonl")
    rows.begin("first")
    done = Row(part="memory", case="first", status="ok", values={"clips": 3})
    rows.write(done)
    assert rows.read() == Written(rows=[done], begun="", ended=False)
    rows.begin("second")
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"part": "mem')  # cut off in the middle of a line
    assert rows.read() == Written(rows=[done], begun="second", ended=False)
    rows.path.unlink()
    assert rows.read() == Written(rows=[], begun="", ended=False)
    rows.end()
    assert rows.read() == Written(rows=[], begun="", ended=True)


def test_numbers_that_are_none_are_rows_all_the_same(tmp_path):
    """A page in which a loss of NaN has no line would say that all is well."""
    row = run_case(
        "parity", raising(WrongError("off", {"errors": {"loss": math.nan, "output": 0.5}, "all": [math.inf]}))
    )
    assert row.values == {"errors": {"loss": "nan", "output": 0.5}, "all": ["inf"]}
    rows = RowsFile(tmp_path / "rows.jsonl")
    rows.write(row)
    assert rows.read().rows == [row]
    assert golden.largest([0.1, math.nan, 0.2]) == math.inf
    assert golden.Comparison(errors={"loss": math.nan, "output": 0.1}).worst == math.inf


@pytest.mark.parametrize(("left_s", "case", "begins"), [(5, {}, True), (-1, {}, False), (-1, {"always": True}, True)])
def test_a_case_begins_while_there_is_time(left_s, case, begins):
    assert Case(name="a case", run=dict, **case).may_begin(time.time() + left_s) is begins
    assert not Case(name="a long one", run=dict, least_s=90.0).may_begin(time.time() + 60)


def test_what_is_asked_reaches_another_process(tmp_path):
    out = tmp_path / "out"
    asked = Asked(device="cpu", card="a card", tiny=True, folder=tmp_path, out=out, deadline=1.5, end=2.5)
    assert Asked.from_json(asked.as_json()) == asked


def test_the_page_shows_every_row_and_counts_them():
    rows = [
        Row(part="machine", case="description", status="ok", values={"card": "NVIDIA H100 80GB HBM3", "device": "x"}),
        Row(part="memory", case="ViT-B", status="ok", values={"predicted_bytes": 2**30, "allocated_bytes": 2**31}),
        Row(part="memory", case="ViT-L", status="failed", reason="CUDA error | 700"),
        Row(part="speed", case="ViT-H", status="not run", reason="no time was left"),
    ]
    text = page.markdown(rows, command="python tools/gpu_check.py")
    assert "2 cases ok, 1 failed, 1 not run" in text
    assert "| ViT-B | 1.000 | 2.000 |  |" in text
    assert "- ViT-L: **failed**: CUDA error / 700" in text
    assert "- ViT-H: **not run**: no time was left" in text


def test_rows_are_on_disk_before_the_next_case_begins(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    rows = RowsFile(tmp_path / "rows.jsonl")
    rows.write(Row(part="memory", case="one", status="ok"))
    assert len(synced) == 1
    assert json.loads((tmp_path / "rows.jsonl").read_text())["case"] == "one"
