"""``tools/gpu_check.py`` on a CPU, where it takes the same path with small models; and where something goes wrong."""

import json

import pytest
from launching import run

from everest_ds.gpu_check.parts import PARTS

TINY = ("tools/gpu_check.py", "--device", "cpu", "--tiny", "--minutes", "15")


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu-check")
    done = run(*TINY, "--out", out, timeout_s=1200)
    return done, json.loads((out / "cpu-tiny.json").read_text())["rows"], (out / "cpu-tiny.md").read_text()


def test_every_part_reports(checked):
    done, rows, page = checked
    assert done.returncode == 0, done.stderr[-3000:]
    for part in PARTS:
        assert "ok" in {row["status"] for row in rows if row["part"] == part.name}, part.name
        assert f"## {part.title}" in page
    assert not [row for row in rows if row["status"] == "failed"]
    # What a CPU lacks is a row, too.
    assert {"first products", "first collective", "memory of a process"} <= {
        row["case"] for row in rows if row["status"] == "not run"
    }


def test_predictions_stand_beside_measurements_that_agree(checked):
    _, rows, _ = checked
    measured = {row["case"]: row["values"] for row in rows if row["part"].startswith("memory") and row["values"]}
    assert len(measured) >= 12
    for case, values in measured.items():
        if "official" not in case:  # planned for a GPU, whose autocast differs
            assert abs(values["error"]) < 0.02, case
            assert values["predicted_held_bytes"] == pytest.approx(values["held_bytes"], rel=0.02), case


def test_eight_ranks_hold_less_than_one(checked):
    _, rows, _ = checked
    held = {row["case"]: row["values"].get("held_bytes") for row in rows}
    for zero in ("zero1", "zero2", "zero3"):
        assert held[f"ViT-B EVEREST 32 {zero} rank 0 of 8"] < held[f"ViT-B EVEREST 32 {zero}"]


def test_the_edge_is_where_memory_ends(checked):
    _, rows, _ = checked
    largest = next(row["values"] for row in rows if (row["part"], row["case"]) == ("edge", "largest"))
    assert largest["named"] <= largest["largest_that_ran"] < largest["smallest_that_did_not"]


def test_a_part_that_fails_is_a_row_and_exit_code_1(tmp_path):
    (tmp_path / "fixtures").mkdir()
    out = tmp_path / "out"
    done = run(*TINY, "--parts", "constants,parity", "--out", out, PARITY_DIR=str(tmp_path / "fixtures"))
    assert done.returncode == 1, done.stderr[-3000:]
    rows = json.loads((out / "cpu-tiny.json").read_text())["rows"]
    assert {row["part"] for row in rows} == {"machine", "constants", "parity"}
    failed = [row for row in rows if row["status"] == "failed"]
    assert failed
    assert all(row["case"].startswith(("everest_", "videomae_")) for row in failed)
    assert "PARITY_DIR: no fixture" in (out / "cpu-tiny.md").read_text()
    assert f"failed: parity: {failed[0]['case']}" in done.stderr


def test_an_earlier_page_is_kept(tmp_path):
    (tmp_path / "cpu-tiny.md").write_text("from before\n")
    done = run(*TINY, "--parts", "machine", "--out", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    kept = [path for path in tmp_path.glob("cpu-tiny-*.md") if path.read_text() == "from before\n"]
    assert len(kept) == 1
    assert f"it is now {kept[0].name}" in done.stderr


def test_without_a_gpu_one_line_says_so(tmp_path):
    done = run("tools/gpu_check.py", "--out", tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0
    assert done.stderr.splitlines()[-1].startswith("gpu_check: no GPU here")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--device", "cpu"), "--device cpu: takes hours without --tiny"),
        (("--minutes", "0"), "--minutes: must be at least 0.5"),
        (("--parts", "memry"), "--parts: no part is called 'memry'; did you mean 'memory'?"),
        (("--out", "/proc/none"), "--out: /proc/none"),
    ],
)
def test_a_mistake_is_one_line(arguments, says):
    done = run("tools/gpu_check.py", *arguments)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"gpu_check: error: {says}")
