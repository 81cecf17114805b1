from __future__ import annotations

import csv
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from video_files import OPEN_GOP, moving_frames, write_video

from everest_ds.config.errors import UserError
from everest_ds.data.manifest import Entry, read_manifest
from everest_ds.data.prepare import scan as module
from everest_ds.data.prepare.examine import WRONG_FRAMES
from everest_ds.data.prepare.folder import WorkFolder
from everest_ds.data.prepare.scan import Limits, scan
from everest_ds.data.prepare.sources import Source, read_source

ROOT = Path(__file__).parents[3]
LIMITS = Limits(workers=2, limit_s=60)


@pytest.fixture
def folder(tmp_path: Path, videos: list[Entry], bad_files: dict[str, Path]) -> Path:
    """Three good videos and three bad ones, with a manifest of some of them."""
    folder = tmp_path / "videos"
    (folder / "deep er").mkdir(parents=True)
    shutil.copy(videos[0].path, folder / "b.mp4")
    shutil.copy(videos[1].path, folder / "deep er" / "one, two.mp4")
    shutil.copy(videos[2].path, folder / "deep er" / "2.MP4")
    shutil.copy(bad_files["text"], folder / "text.mp4")
    write_video(folder / "open.mp4", moving_frames(40), **OPEN_GOP)
    os.mkfifo(folder / "pipe.mp4")
    (folder / "notes.txt").write_text("no video\n")
    (tmp_path / "list.csv").write_text(
        'videos/open.mp4,4\nvideos/b.mp4,3\n"videos/deep er/one, two.mp4",0\nvideos/gone.mp4,1\nvideos/b.mp4,5\n'
    )
    return folder


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, *map(str, command)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def bad(out: Path) -> dict[str, str]:
    with (out / "bad.csv").open(newline="") as file:
        return {Path(row["path"]).name: row["reason"] for row in csv.DictReader(file)}


def test_a_folder_as_a_user_scans_it(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "scan"
    command = ("tools/prepare_videos.py", "scan", folder, "--out", out, "--workers", "2")
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert [entry.path for entry in read_manifest(out / "good.csv")] == [
        f"{folder}/b.mp4",
        f"{folder}/deep er/2.MP4",
        f"{folder}/deep er/one, two.mp4",
    ]
    reasons = bad(out)
    assert list(reasons) == ["open.mp4", "pipe.mp4", "text.mp4"]
    assert reasons["open.mp4"].startswith(WRONG_FRAMES)
    assert (reasons["pipe.mp4"], reasons["text.mp4"]) == ("not a file", "not a video, or cut off")
    records = lines(out / "files.jsonl")
    assert [record["path"] for record in records] == sorted(record["path"] for record in records)
    assert len(records) == 6
    summary = json.loads((out / "summary.json").read_text())
    counts = {"files": 6, "good": 3, "bad": 3, "rewrite_helps": 1, "codecs": {"h264": 3}, "sizes": {"64x48": 3}}
    assert {key: summary[key] for key in counts} == counts
    assert summary["frames"] == 34 + 35 + 36
    assert done.stdout.startswith("6 files: 3 good, 3 bad\n")
    assert "\nbad:  1 whole, of which rewrite makes copies that training can read\n" in done.stdout
    assert "files looked at: 6 of 6" in done.stderr
    assert all(line.startswith("files looked at: ") for line in done.stderr.splitlines())


def test_labels_and_order_are_kept(folder: Path, tmp_path: Path) -> None:
    scan(read_source(tmp_path / "list.csv"), tmp_path / "scan", LIMITS)
    assert read_manifest(tmp_path / "scan" / "good.csv") == [
        Entry(f"{folder}/b.mp4", 3),
        Entry(f"{folder}/deep er/one, two.mp4", 0),
        Entry(f"{folder}/b.mp4", 5),
    ]
    assert list(bad(tmp_path / "scan")) == ["open.mp4", "gone.mp4"]
    assert [Path(r["path"]).name for r in lines(tmp_path / "scan" / "files.jsonl")] == [
        "open.mp4",
        "b.mp4",
        "one, two.mp4",
        "gone.mp4",
    ]


class TestAgain:
    @pytest.fixture
    def source(self, tmp_path: Path, videos: list[Entry]) -> Source:
        for entry, name in zip(videos, "abc", strict=False):
            shutil.copy(entry.path, tmp_path / f"{name}.mp4")
        return Source(
            entries=[Entry(str(tmp_path / f"{name}.mp4"), None) for name in "abc"], name="x", base=str(tmp_path)
        )

    def scan(self, source: Source, monkeypatch: pytest.MonkeyPatch, limits: Limits = LIMITS) -> list[str]:
        """Scan, and return the names of the files that were read."""
        read: list[str] = []
        real = module.jobs.run

        def recording(task, items, **options):
            read.extend(Path(item).name for item in items)
            return real(task, items, **options)

        with monkeypatch.context() as patch:
            patch.setattr(module.jobs, "run", recording)
            scan(source, Path(source.base) / "scan", limits)
        return read

    def test_only_what_is_new_or_changed_is_read(self, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
        out = Path(source.base) / "scan"
        assert self.scan(source, monkeypatch) == ["a.mp4", "b.mp4", "c.mp4"]
        before = (out / "files.jsonl").read_bytes()
        assert self.scan(source, monkeypatch) == []
        assert (out / "files.jsonl").read_bytes() == before
        assert not (out / "good.1.csv").exists()
        os.utime(source.entries[1].path, ns=(1, 1))
        assert self.scan(source, monkeypatch) == ["b.mp4"]

    def test_an_interrupted_scan_goes_on(self, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
        out = Path(source.base) / "scan"
        self.scan(source, monkeypatch)
        whole = (out / "files.jsonl").read_text()
        first, second, _ = whole.splitlines()
        # As if it had been killed while it wrote the second line.
        (out / "files.jsonl").write_text(f"{first}\n{second[:50]}")
        assert self.scan(source, monkeypatch) == ["b.mp4", "c.mp4"]
        assert (out / "files.jsonl").read_text() == whole

    def test_a_list_that_changes_is_kept(self, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
        out = Path(source.base) / "scan"
        self.scan(source, monkeypatch)
        first = (out / "good.csv").read_text()
        for entry in source.entries[:2]:
            before = (out / "good.csv").read_text()
            Path(entry.path).write_text("no video")
            self.scan(source, monkeypatch)
        assert (out / "good.1.csv").read_text() == first
        assert (out / "good.2.csv").read_text() == before
        assert len(read_manifest(out / "good.csv")) == 1
        assert list(bad(out)) == ["a.mp4", "b.mp4"]

    def test_what_took_too_long_is_tried_again(self, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
        assert len(self.scan(source, monkeypatch, Limits(workers=1, limit_s=1e-6))) == 3
        assert set(bad(Path(source.base) / "scan").values()) == {"took longer than 1e-06 s"}
        assert len(self.scan(source, monkeypatch)) == 3
        assert bad(Path(source.base) / "scan") == {}

    def test_another_sets_folder_is_refused(self, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
        out = Path(source.base) / "scan"
        self.scan(source, monkeypatch)
        other = Source(entries=source.entries, name="y", base=source.base)
        with pytest.raises(UserError, match=r"is of other settings \(source x not y\); name another folder"):
            scan(other, out, LIMITS)

    def test_two_at_once_are_refused(self, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
        out = Path(source.base) / "scan"
        self.scan(source, monkeypatch)
        code = (
            "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX)\n"
            "print('locked', flush=True); input()"
        )
        holder = [sys.executable, "-c", code, out / "settings.json"]
        with subprocess.Popen(holder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == "locked\n"
            with pytest.raises(UserError, match="another process is writing"):
                scan(source, out, LIMITS)
            other.communicate("\n")
        scan(source, out, LIMITS)


def test_a_folder_that_can_not_be_listed_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refused(path: str) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "a.mp4").touch()
    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(UserError, match=r"^SOURCE: cannot list .*: Permission denied$"):
        read_source(tmp_path)


def test_a_full_disk_ends_it_in_one_line(tmp_path: Path, videos: list[Entry]) -> None:
    (tmp_path / "videos").mkdir()
    shutil.copy(videos[0].path, tmp_path / "videos" / "a.mp4")
    words = [*map(str, ("tools/prepare_videos.py", "scan", tmp_path / "videos", "--out", tmp_path / "out"))]
    code = (
        f"import resource, runpy, signal, sys; sys.argv = {words}; sys.path.insert(0, 'tools')\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60, 60))\n"  # bytes that a file may have
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    done = run("-c", code)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"prepare_videos: error: --out: cannot write to {tmp_path}/out")
    assert "Traceback" not in done.stderr
    assert run(*words).returncode == 0


def test_a_record_that_can_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with WorkFolder(tmp_path / "out", {}) as folder:
        monkeypatch.setattr(folder, "_log", SimpleNamespace(write=full, close=lambda: None))
        with pytest.raises(UserError, match=r"^--out: cannot write to .*: No space left on device; the same command"):
            folder.add("a.mp4", None, settled=True)


def test_names_that_a_manifest_can_not_hold(tmp_path: Path, videos: list[Entry]) -> None:
    names = [b"two\nlines.mp4", b"\xff.mp4", b" blank.mp4"]
    for name in names:
        shutil.copy(videos[0].path, os.fsencode(tmp_path) + b"/" + name)
    scan(read_source(tmp_path), tmp_path / "scan", LIMITS)
    assert read_manifest(tmp_path / "scan" / "good.csv") == [Entry(f"{tmp_path}/ blank.mp4", None)]
    assert set(bad(tmp_path / "scan").values()) == {module.UNLISTABLE}
    assert len(lines(tmp_path / "scan" / "files.jsonl")) == 3


def test_links_are_followed_but_not_in_circles(tmp_path: Path, videos: list[Entry]) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(videos[0].path, tmp_path / "elsewhere" / "a.mp4")
    (tmp_path / "set" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path / "set")
    assert read_source(tmp_path / "set").paths == [f"{tmp_path}/set/link/a.mp4"]


class TestMistakes:
    def command(self, *arguments: str | Path) -> str:
        done = run("tools/prepare_videos.py", *arguments)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr

    def test_of_the_command_line(self, tmp_path: Path) -> None:
        (tmp_path / "mine.txt").write_text("mine")
        (tmp_path / "list.csv").write_text("a.mp4 1\n")
        told = self.command("scan", tmp_path / "list.csv", "--out", tmp_path)
        assert told == f"prepare_videos: error: --out: {tmp_path} is there already and holds something else; " + (
            "name another folder\n"
        )
        assert (tmp_path / "mine.txt").read_text() == "mine"
        told = self.command("scan", tmp_path / "none.csv", "--out", tmp_path / "out")
        assert "SOURCE: cannot read" in told
        assert not (tmp_path / "out").exists()

    def test_of_arguments(self, tmp_path: Path) -> None:
        (tmp_path / "set").mkdir()
        with pytest.raises(UserError, match="its folders hold no file with the name of a video"):
            read_source(tmp_path / "set")
        with pytest.raises(UserError, match="a root is for manifests"):
            read_source(tmp_path / "set", root=str(tmp_path))
        source = Source(entries=[Entry("/x/a.mp4", 1)], name="x", base="/x")
        with pytest.raises(UserError, match="unknown decoder"):
            scan(source, tmp_path / "out", LIMITS, decoder="pyav")
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match="holds something else"):
            scan(source, tmp_path / "file", LIMITS)
