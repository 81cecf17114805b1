from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from av.video.frame import PictureType
from video_files import OPEN_GOP, moving_frames, read_all, write_video

from everest_ds.config.errors import UserError
from everest_ds.data.decode import decode
from everest_ds.data.manifest import Entry, read_manifest
from everest_ds.data.prepare import rewrite as module
from everest_ds.data.prepare.examine import examine
from everest_ds.data.prepare.rewrite import Encoding, Job, rewrite, rewrite_video, shrunk
from everest_ds.data.prepare.scan import Limits
from everest_ds.data.prepare.sources import Source, read_source

ROOT = Path(__file__).parents[3]
LIMITS = Limits(workers=2, limit_s=60)
SMALL = Encoding(short_side=32)


def copy_of(path: Path, encoding: Encoding = SMALL) -> Path:
    target = path.parent / "copies" / "copy.mp4"
    result = rewrite_video(Job(str(path), str(target)), encoding)
    assert result.reason is None
    return target


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestACopy:
    def test_random_access_gives_the_frames_of_a_sequential_decode(self, tmp_path: Path) -> None:
        original = write_video(tmp_path / "open.mp4", moving_frames(50, 96, 128), **OPEN_GOP)
        assert examine(str(original)).reason is not None
        copy = copy_of(original)
        truth = read_all(copy)
        assert truth.shape == (50, 32, 42, 3)
        for i in range(50):
            assert np.array_equal(decode(str(copy), lambda length, i=i: [i])[0], truth[i])
        ids = [3, 9, 15, 40, 46]
        assert np.array_equal(decode(str(copy), lambda length: ids), truth[ids])
        found = examine(str(copy))
        assert (found.frames, found.reason) == (50, None)

    def test_its_frames_are_the_originals_in_order(self, tmp_path: Path) -> None:
        original = write_video(tmp_path / "a.mp4", moving_frames(30, 64, 96), **OPEN_GOP)
        copy = read_all(copy_of(original, Encoding(short_side=64))).astype(int)
        distance = np.abs(copy[:, None] - read_all(original)[None]).mean(axis=(2, 3, 4))
        assert distance.argmin(axis=1).tolist() == list(range(30))
        # The next frame is 40 away.
        assert distance.min(axis=1).max() < 8

    def test_groups_are_short_and_without_b_frames(self, tmp_path: Path) -> None:
        # One of each of the original's types, which the encoder of the copy must not follow.
        original = write_video(tmp_path / "a.mp4", moving_frames(60), g="250", bf="3")
        kinds, keys = [], []
        with av.open(str(copy_of(original, Encoding(gop=7)))) as container:
            for frame in container.decode(video=0):
                kinds.append(PictureType(frame.pict_type))
                keys.append(frame.key_frame)
        assert set(kinds) == {PictureType.I, PictureType.P}
        assert keys[::7] == [True] * 9
        assert np.diff(np.flatnonzero(keys)).max() <= 7

    def test_its_index_comes_first(self, tmp_path: Path) -> None:
        data = copy_of(write_video(tmp_path / "a.mp4", moving_frames(20))).read_bytes()
        assert 0 < data.index(b"moov") < data.index(b"mdat")

    def test_time_is_kept_and_sound_is_not(self, tmp_path: Path) -> None:
        path = tmp_path / "a.mkv"
        with av.open(str(path), "w") as container:
            video = container.add_stream("libx264", rate=Fraction(30000, 1001))
            video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
            sound = container.add_stream("aac", rate=16000)
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            silence.sample_rate, silence.pts = 16000, 0
            container.mux(sound.encode(silence))
            for frame in moving_frames(30):
                container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            for stream in (video, sound):
                container.mux(stream.encode(None))
        with av.open(str(copy_of(path))) as container:
            assert [stream.type for stream in container.streams] == ["video"]
            assert container.streams.video[0].average_rate == Fraction(30000, 1001)
            assert container.streams.video[0].frames == 30

    @pytest.mark.parametrize(
        ("pixels", "tags"),
        [
            ("yuv420p", {}),
            ("yuv420p", {"colorspace": "bt709"}),
            ("yuvj420p", {"color_range": "pc"}),
            ("yuv420p10le", {"color_range": "pc", "colorspace": "bt709"}),
            ("yuv444p", {"colorspace": "bt2020nc"}),
        ],
    )
    def test_colours_are_kept(self, tmp_path: Path, pixels: str, tags: dict[str, str]) -> None:
        colour = np.array([200, 40, 90], dtype=np.uint8)
        path = tmp_path / "red.mkv"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=25, options={"crf": "5", **tags})
            stream.width, stream.height, stream.pix_fmt = 64, 48, pixels
            for _ in range(3):
                frame = av.VideoFrame.from_ndarray(np.broadcast_to(colour, (48, 64, 3)).copy(), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        shown = read_all(path).astype(int).mean(axis=(0, 1, 2))
        copy = copy_of(path)
        assert np.abs(read_all(copy).astype(int).mean(axis=(0, 1, 2)) - shown).max() < 4
        # And as training reads it.
        assert np.abs(decode(str(copy), range).astype(int).mean(axis=(0, 1, 2)) - shown).max() < 4


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1920, 1080), (454, 256)),
        ((1080, 1920), (256, 454)),
        ((340, 256), (340, 256)),
        ((341, 255), (340, 254)),
        ((64, 48), (64, 48)),
        ((1, 1), (2, 2)),
        ((5000, 300), (4266, 256)),
    ],
)
def test_sizes(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert shrunk(*size, 256) == expected


@pytest.fixture
def folder(tmp_path: Path, videos: list[Entry], bad_files: dict[str, Path]) -> Path:
    folder = tmp_path / "videos"
    (folder / "deep er").mkdir(parents=True)
    shutil.copy(videos[0].path, folder / "b.mp4")
    shutil.copy(videos[1].path, folder / "deep er" / "one, two.MOV")
    shutil.copy(bad_files["damaged"], folder / "damaged.mp4")
    os.mkfifo(folder / "pipe.mp4")
    (tmp_path / "list.csv").write_text(
        'videos/damaged.mp4,4\n"videos/deep er/one, two.MOV",0\nvideos/b.mp4,3\nvideos/pipe.mp4,3\n'
    )
    return folder


def test_a_manifest_as_a_user_rewrites_it(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    before = files(folder)
    words = ["tools/prepare_videos.py", "rewrite", tmp_path / "list.csv", "--out", out, "--short-side", "32"]
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("4 files: 2 copies, 2 bad\n")
    assert read_manifest(out / "manifest.csv") == [
        Entry(f"{out}/videos/deep er/one, two.mp4", 0),
        Entry(f"{out}/videos/b.mp4", 3),
    ]
    assert set(files(out)) == {
        *("manifest.csv", "bad.csv", "settings.json", "files.jsonl"),
        *("videos/b.mp4", "videos/deep er/one, two.mp4"),
    }
    bad = (out / "bad.csv").read_text().splitlines()
    assert [line.partition(",")[0] for line in bad[1:]] == [f"{folder}/damaged.mp4", f"{folder}/pipe.mp4"]
    assert "damaged after frame" in bad[1]
    assert examine(f"{out}/videos/b.mp4").height == 32
    assert files(folder) == before


class TestAgain:
    def rewrite(self, folder: Path, limits: Limits = LIMITS) -> list[str]:
        """Rewrite, and return the copies that were written, by their inodes."""
        out = folder.parent / "small"
        before = {path: path.stat().st_ino for path in out.rglob("*.mp4")}
        rewrite(read_source(folder), out, limits, SMALL)
        after = {path: path.stat().st_ino for path in out.rglob("*.mp4")}
        assert not list(out.rglob("*.unfinished"))
        return sorted(path.name for path, node in after.items() if before.get(path) != node)

    def test_only_what_is_missing_or_changed_is_written(self, folder: Path, videos: list[Entry]) -> None:
        assert self.rewrite(folder) == ["b.mp4", "one, two.mp4"]
        whole = files(folder.parent / "small")
        assert self.rewrite(folder) == []
        assert files(folder.parent / "small") == whole
        (folder.parent / "small" / "b.mp4").unlink()
        assert self.rewrite(folder) == ["b.mp4"]
        assert files(folder.parent / "small") == whole
        shutil.copy(videos[5].path, folder / "deep er" / "one, two.MOV")
        assert self.rewrite(folder) == ["one, two.mp4"]

    def test_an_interrupted_run_goes_on(self, folder: Path) -> None:
        self.rewrite(folder)
        out = folder.parent / "small"
        records = (out / "files.jsonl").read_text().splitlines(keepends=True)
        # As if it had been killed between a copy and its record, and before the manifest.
        (out / "files.jsonl").write_text("".join(line for line in records if "one, two" not in line))
        (out / "manifest.csv").unlink()
        assert self.rewrite(folder) == ["one, two.mp4"]
        assert (out / "files.jsonl").read_text() == "".join(records)
        assert len(read_manifest(out / "manifest.csv")) == 2

    def test_what_took_too_long_leaves_nothing_and_is_tried_again(self, folder: Path) -> None:
        assert self.rewrite(folder, Limits(workers=1, limit_s=1e-6)) == []
        assert self.rewrite(folder) == ["b.mp4", "one, two.mp4"]


def test_a_storage_that_fails_is_no_bad_video(
    tmp_path: Path, videos: list[Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(*_: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(module, "_encode", stale)
    found = rewrite_video(Job(videos[0].path, str(tmp_path / "copy.mp4")), SMALL)
    assert (found.passing, found.reason) == (True, "OSError: [Errno 116] Stale file handle")


def test_rates(tmp_path: Path) -> None:
    for rate, expected in (
        (Fraction(1, 3600), Fraction(1, 3600)),
        (Fraction(90000), 25),
        (None, 25),
        (Fraction(24), 24),
    ):
        assert module._rate(SimpleNamespace(stream=SimpleNamespace(average_rate=rate))) == expected


def test_two_videos_of_one_name(tmp_path: Path, videos: list[Entry]) -> None:
    for name in ("a.mp4", "a.avi", "b.mov", "b.mkv", "c.mkv"):
        shutil.copy(videos[0].path, tmp_path / name)
    jobs = module._jobs(read_source(tmp_path), Path("/out"))
    assert {Path(path).name: job.target for path, job in jobs.items()} == {
        "a.mp4": "/out/a.mp4",
        "a.avi": "/out/a.avi.mp4",
        "b.mov": "/out/b.mov.mp4",
        "b.mkv": "/out/b.mkv.mp4",
        "c.mkv": "/out/c.mp4",
    }
    shutil.copy(videos[0].path, tmp_path / "a.avi.mp4")
    with pytest.raises(UserError, match=r"two videos would both become /out/a.avi.mp4; rename"):
        module._jobs(read_source(tmp_path), Path("/out"))


def test_paths_elsewhere_start_from_what_they_have_in_common() -> None:
    entries = [Entry("/data/x/1/a.mp4", 0), Entry("/data/x/2/a.mp4", 1)]
    jobs = module._jobs(Source(entries=entries, name="/lists/train.csv", base="/lists"), Path("/out"))
    assert [job.target for job in jobs.values()] == ["/out/1/a.mp4", "/out/2/a.mp4"]


@pytest.mark.parametrize("out", ["videos", "videos/small", "videos/deep er/small", ".", "link/small"])
@pytest.mark.parametrize("source", ["videos", "list.csv"])
def test_copies_never_go_among_the_originals(folder: Path, tmp_path: Path, source: str, out: str) -> None:
    (tmp_path / "link").symlink_to(folder)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"^--out: .* lie in one another; name another folder$"):
        rewrite(read_source(tmp_path / source), tmp_path / out, LIMITS, SMALL)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_ends_it_in_one_line(tmp_path: Path, videos: list[Entry], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "_encode", full)
    with pytest.raises(UserError, match=r"no room left for .*copy\.mp4; the same command goes on"):
        rewrite_video(Job(videos[0].path, str(tmp_path / "copy.mp4")), SMALL)


@pytest.mark.parametrize("wrong", [{"short_side": 255}, {"short_side": 0}, {"gop": 0}, {"crf": 52}])
def test_encodings_are_checked(wrong: dict[str, int]) -> None:
    (name,) = wrong
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')}: must be"):
        Encoding(**wrong)


def test_another_encodings_folder_is_refused(tmp_path: Path, videos: list[Entry]) -> None:
    source = Source(entries=[], name="x", base=str(tmp_path))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "settings.json").write_text(
        json.dumps(
            {"command": "rewrite", "version": module._VERSION, "source": "x", "base": str(tmp_path)} | vars(SMALL)
        )
    )
    with pytest.raises(UserError, match=r"other settings \(gop 12 not 24\)"):
        rewrite(source, tmp_path / "out", LIMITS, Encoding(short_side=32, gop=24))
