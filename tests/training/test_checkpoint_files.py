"""Folders of checkpoints: whole or not there, recognised when damaged, thinned out without losing the good ones."""

import json
from pathlib import Path

import pytest

from everest_ds.training import checkpoint_files as files
from everest_ds.training.files import Lines, write
from everest_ds.training.run_dir import RunDir


def write_checkpoint(checkpoints: Path, step: int, content: bytes = b"numbers") -> Path:
    folder = files.unfinished(checkpoints, step)
    folder.mkdir(parents=True)
    name = files.part_name(0, 1)
    (folder / name).write_bytes(content)
    return files.seal(checkpoints, step, {"step": step}, {name: files.describe(folder / name)})


def latest(checkpoints: Path) -> str:
    return (checkpoints / "latest").read_text()


def test_a_sealed_checkpoint_is_whole_and_the_latest(tmp_path):
    folder = write_checkpoint(tmp_path, 7)
    assert folder == tmp_path / "step-00000007"
    assert latest(tmp_path) == folder.name
    assert files.damage(folder) == ""
    assert files.read_state(folder) == {"step": 7}
    assert [part.name for part in files.parts(folder)] == ["part-00000-of-00001.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", folder.name]


DAMAGES = {
    "cut off": (lambda part: part.write_bytes(b"num"), "part-00000-of-00001.safetensors: 3 bytes in place of 7"),
    "one bit": (lambda part: part.write_bytes(b"numberr"), "other content than was written (SHA-256)"),
    "missing": (lambda part: part.unlink(), "No such file or directory"),
    "state": (lambda part: part.with_name("state.json").write_text('{"step": 8}'), "state.json: "),
    "no manifest": (lambda part: part.with_name("manifest.json").unlink(), "manifest.json: No such file"),
    "torn manifest": (lambda part: part.with_name("manifest.json").write_text('{"files": {'), "manifest.json: "),
    "null manifest": (lambda part: part.with_name("manifest.json").write_text("null"), "manifest.json: "),
    "list in the manifest": (
        lambda part: part.with_name("manifest.json").write_text('{"files": []}'),
        "manifest.json: no list of files",
    ),
    "endless file": (
        lambda part: part.with_name("manifest.json").write_text(
            '{"files": {"state.json": {"bytes": Infinity, "sha256": ""}}}'
        ),
        "manifest.json: ",
    ),
    "deep manifest": (lambda part: part.with_name("manifest.json").write_text("[" * 100_000), "manifest.json: "),
    "strange manifest": (
        lambda part: part.with_name("manifest.json").write_text(
            json.dumps({"files": {"state.json": {"bytes": 1, "sha256": ""}, "../../x": {"bytes": 1, "sha256": ""}}})
        ),
        "lists other files than a checkpoint's",
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_seen_and_named(kind, tmp_path):
    folder = write_checkpoint(tmp_path, 7)
    do, told = DAMAGES[kind]
    do(files.parts(folder)[0])
    assert told in files.damage(folder)


def test_the_order_begins_with_what_latest_names(tmp_path):
    for step in (3, 6, 9):
        write_checkpoint(tmp_path, step)
    (tmp_path / "step-tmp").mkdir()
    (tmp_path / ".unfinished-step-00000012").mkdir()
    steps = lambda: [files.step_of(folder) for folder in files.newest_first(tmp_path)]  # noqa: E731
    assert steps() == [9, 6, 3]
    (tmp_path / "latest").write_text("step-00000006")  # as a user may who wants to go back
    assert steps() == [6, 3]
    (tmp_path / "latest").write_bytes(b"\xff\xfe rubbish")
    assert steps() == [9, 6, 3]
    (tmp_path / "latest").unlink()
    assert steps() == [9, 6, 3]
    assert RunDir(tmp_path / "nothing").has_checkpoint() is False


def test_the_same_state_again_is_one_checkpoint_and_another_replaces_it_visibly(tmp_path):
    first = write_checkpoint(tmp_path, 7)
    inode = first.stat().st_ino
    assert write_checkpoint(tmp_path, 7).stat().st_ino == inode
    write_checkpoint(tmp_path, 7, b"others!")
    assert files.parts(first)[0].read_bytes() == b"others!"
    kept = tmp_path / "step-00000007.replaced-1"
    assert (kept / files.part_name(0, 1)).read_bytes() == b"numbers"
    (first / files.part_name(0, 1)).write_bytes(b"damaged")  # the manifest says what it said
    write_checkpoint(tmp_path, 7, b"others!")
    assert files.damage(first) == ""
    assert (tmp_path / "step-00000007.replaced-2").is_dir()


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [(0, 0, [2, 4, 6, 8, 10]), (2, 0, [8, 10]), (1, 4, [4, 8, 10]), (9, 0, [2, 4, 6, 8, 10]), (1, 0, [10])],
)
def test_thinning_out(keep_last, keep_every, kept, tmp_path):
    for step in (2, 4, 6, 8, 10):
        write_checkpoint(tmp_path, step)
    (tmp_path / ".unfinished-step-00000003").mkdir()
    files.thin_out(tmp_path, keep_last=keep_last, keep_every=keep_every)
    assert sorted(map(files.step_of, tmp_path.glob("step-*"))) == kept
    assert not list(tmp_path.glob(".unfinished*"))
    assert all(files.damage(folder) == "" for folder in tmp_path.glob("step-*"))


def test_going_back_by_hand_loses_nothing(tmp_path):
    for step in (3, 6, 9):
        write_checkpoint(tmp_path, step)
    (tmp_path / "latest").write_text("step-00000003")
    write_checkpoint(tmp_path, 4)
    files.thin_out(tmp_path, keep_last=1, keep_every=0)
    assert sorted(map(files.step_of, tmp_path.glob("step-*"))) == [4, 6, 9]
    assert latest(tmp_path) == "step-00000004"


def test_what_lies_beyond_is_set_aside_when_a_run_continues_before_it(tmp_path):
    for step in (3, 6, 9):
        write_checkpoint(tmp_path, step)
    (tmp_path / "latest").write_text("step-00000003")
    files.set_later_aside(tmp_path, 3)
    write_checkpoint(tmp_path, 12)
    assert [files.step_of(folder) for folder in files.newest_first(tmp_path)] == [12, 3]
    assert (tmp_path / "step-00000009.replaced-1").is_dir()


def test_a_text_file_is_replaced_whole(tmp_path):
    file = tmp_path / "latest"
    write(file, "old")
    write(file, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]
    assert file.read_text() == "new"


def test_lines_that_could_not_be_written_follow_later(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    lines = Lines(path)
    lines.append({"step": 1, "loss": float("nan")})
    path.rename(tmp_path / "kept")
    path.mkdir()  # nothing can be written to it, as to a full disk
    lines.append({"step": 2})
    lines.append({"step": 3})
    assert [record.getMessage().partition(": cannot be written")[1] for record in caplog.records] == [
        ": cannot be written"
    ]
    path.rmdir()
    (tmp_path / "kept").rename(path)
    lines.append({"step": 4})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": None},
        *({"step": step} for step in (2, 3, 4)),
    ]


def test_a_torn_line_of_the_quarantine_is_left_out(tmp_path):
    run_dir = RunDir(tmp_path)
    assert run_dir.set_aside() == {}
    run_dir.quarantine.write_text('{"video": "a.mp4", "reason": "hung"}\nnull\n{"video": "b.m')
    assert run_dir.set_aside() == {"a.mp4": "hung"}
