from __future__ import annotations

import http.server
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import webdataset

from everest_ds.config.errors import UserError
from everest_ds.config.schema import DataConfig
from everest_ds.data import members as members_module
from everest_ds.data.dataset import ClipDataset
from everest_ds.data.decode import DecodeError, decode
from everest_ds.data.loader import Batch, StepSampler, build_loader
from everest_ds.data.manifest import Entry, format_manifest, read_manifest
from everest_ds.data.members import Member
from everest_ds.data.prepare import scan as scan_module
from everest_ds.data.prepare.examine import examine
from everest_ds.data.prepare.rewrite import Encoding, rewrite
from everest_ds.data.prepare.scan import Limits, scan
from everest_ds.data.prepare.shards import index, write_shards
from everest_ds.data.prepare.sources import Source, read_source

ROOT = Path(__file__).parents[3]
MIB = 2**20


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/prepare_videos.py", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory, videos: list[Entry]) -> Source:
    listed = tmp_path_factory.mktemp("listed") / "list.csv"
    listed.write_text(format_manifest(videos))
    return read_source(listed, str(Path(videos[0].path).parent))


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory, source: Source) -> Path:
    """The folder of the twelve videos' shards, some videos in each."""
    out = tmp_path_factory.mktemp("packed") / "shards"
    assert write_shards(source, out, shard_bytes=60_000) == {"videos": 12, "shards": 4}
    return out


@pytest.fixture(scope="module")
def remote(packed: Path) -> Iterator[tuple[str, list[int]]]:
    """The URL of an HTTP server of the shards, which answers requests for a range of bytes, and the sizes it sent."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(packed))

        def send_head(self) -> io.BytesIO | None:
            path = Path(self.translate_path(self.path))
            if not path.is_file():
                self.send_error(404)
                return None
            data = path.read_bytes()
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            part = data[int(asked[1]) : int(asked[2]) + 1] if asked else data
            self.send_response(206 if asked else 200)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(part)))
            if asked:
                self.send_header("Content-Range", f"bytes {asked[1]}-{asked[2]}/{len(data)}")
            self.end_headers()
            sent.append(len(part))
            return io.BytesIO(part)

        def log_message(self, *_: Any) -> None:
            pass

    sent: list[int] = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", sent
        server.shutdown()
        thread.join()


def truth_of(entries: list[Entry]) -> list[np.ndarray]:
    return [decode(entry.path, range) for entry in entries]


class TestOurs:
    def test_the_library_reads_them(self, packed: Path, videos: list[Entry]) -> None:
        names = [str(path) for path in sorted(packed.glob("*.tar"))]
        samples = list(webdataset.WebDataset(names, shardshuffle=False).decode("rgb"))
        assert [sample["__key__"] for sample in samples] == [str(i) for i in range(12)]
        assert [sample["cls"] for sample in samples] == list(range(12))
        raw = list(webdataset.WebDataset(names, shardshuffle=False))
        assert [sample["mp4"] for sample in raw] == [Path(entry.path).read_bytes() for entry in videos]

    def test_the_manifest_keeps_order_and_labels_and_moves_with_the_shards(self, packed: Path, tmp_path: Path) -> None:
        shutil.copytree(packed, tmp_path / "moved")
        entries = read_manifest(tmp_path / "moved" / "manifest.csv")
        assert [entry.label for entry in entries] == list(range(12))
        members = [Member.named(entry.path) for entry in entries]
        assert [member.name for member in members if member] == [f"{i}.mp4" for i in range(12)]
        assert {Path(member.shard).parent for member in members if member} == {tmp_path / "moved"}

    def test_frames_are_those_of_the_files(self, packed: Path, videos: list[Entry]) -> None:
        found = truth_of(read_manifest(packed / "manifest.csv"))
        assert all(np.array_equal(a, b) for a, b in zip(found, truth_of(videos), strict=True))

    def test_the_same_videos_make_the_same_bytes(self, packed: Path, source: Source, tmp_path: Path) -> None:
        write_shards(source, tmp_path / "again", shard_bytes=60_000)
        for path in packed.glob("*.tar"):
            assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()

    def test_only_missing_shards_are_written(self, source: Source, tmp_path: Path) -> None:
        def write() -> dict[str, int]:
            write_shards(source, tmp_path, shard_bytes=60_000)
            return {path.name: path.stat().st_ino for path in tmp_path.glob("*.tar")}

        first = write()
        manifest = (tmp_path / "manifest.csv").read_text()
        assert write() == first
        (tmp_path / "shard-000002.tar").unlink()
        (tmp_path / "manifest.csv").unlink()
        # As if it had been killed while it wrote the next one.
        (tmp_path / "shard-000003.tar.unfinished").write_bytes(b"half")
        records = (tmp_path / "files.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "files.jsonl").write_text("".join(records[:2]))
        again = write()
        assert again.keys() == first.keys()
        assert [name for name in sorted(first) if again[name] == first[name]][:2] == [
            "shard-000000.tar",
            "shard-000001.tar",
        ]
        assert (tmp_path / "manifest.csv").read_text() == manifest
        assert not list(tmp_path.glob("*.unfinished"))

    def test_shards_that_were_moved_are_not_overwritten_by_others(self, videos: list[Entry], tmp_path: Path) -> None:
        folder = tmp_path / "set"
        folder.mkdir()
        shutil.copy(videos[0].path, folder / "a.mp4")
        write_shards(read_source(folder), tmp_path / "out", shard_bytes=1)
        # Copied without times, and the source's file is another by now.
        os.utime(tmp_path / "out" / "shard-000000.tar", (1, 1))
        assert write_shards(read_source(folder), tmp_path / "out", shard_bytes=1)["videos"] == 1
        os.utime(tmp_path / "out" / "shard-000000.tar", (1, 1))
        kept = (tmp_path / "out" / "shard-000000.tar").read_bytes()
        shutil.copy(videos[1].path, folder / "a.mp4")
        with pytest.raises(UserError, match="holds other videos"):
            write_shards(read_source(folder), tmp_path / "out", shard_bytes=1)
        assert (tmp_path / "out" / "shard-000000.tar").read_bytes() == kept

    def test_shards_of_what_has_changed_are_refused(self, videos: list[Entry], tmp_path: Path) -> None:
        shutil.copy(videos[0].path, tmp_path / "a.mp4")
        write_shards(read_source(tmp_path), tmp_path / "out", shard_bytes=1)
        before = (tmp_path / "out" / "shard-000000.tar").read_bytes()
        shutil.copy(videos[1].path, tmp_path / "a.mp4")
        with pytest.raises(UserError, match="holds other videos than those of this source now"):
            write_shards(read_source(tmp_path), tmp_path / "out", shard_bytes=1)
        assert (tmp_path / "out" / "shard-000000.tar").read_bytes() == before

    def test_keys_are_the_librarys_and_none_twice(self, videos: list[Entry], tmp_path: Path) -> None:
        (tmp_path / "a.b").mkdir()
        long = "\u00fc" + "x" * 120
        for name in ("v.1.mp4", "v_1.MP4", "a.b/v.mp4", f"a.b/{long}.mov"):
            shutil.copy(videos[0].path, tmp_path / name)
        write_shards(read_source(tmp_path), tmp_path / "out", shard_bytes=10**9)
        (shard,) = (tmp_path / "out").glob("*.tar")
        keys = [sample["__key__"] for sample in webdataset.WebDataset(str(shard), shardshuffle=False)]
        assert keys == ["a.b/v", f"a.b/{long}", "v_1", "v_1-2"]
        entries = read_manifest(tmp_path / "out" / "manifest.csv")
        assert [entry.label for entry in entries] == [None] * 4
        assert all(frames.shape == (34, 48, 64, 3) for frames in truth_of(entries))

    def test_as_a_command(self, videos: list[Entry], tmp_path: Path) -> None:
        (tmp_path / "list.csv").write_text(format_manifest(videos[:3]))
        done = run("shards", tmp_path / "list.csv", "--out", tmp_path / "out")
        assert (done.returncode, done.stdout) == (0, f"3 videos in 1 shards: {tmp_path}/out/manifest.csv\n"), (
            done.stderr
        )
        shard = tmp_path / "out" / "shard-000000.tar"
        done = run("index", shard, "--out", tmp_path / "index.csv")
        assert (done.returncode, done.stdout) == (0, f"3 videos in 1 shards: {tmp_path}/index.csv\n"), done.stderr
        assert read_manifest(tmp_path / "index.csv") == read_manifest(tmp_path / "out" / "manifest.csv")
        done = run("index", shard, "--out", tmp_path / "index.csv")
        assert done.returncode == 2
        assert (
            done.stderr == f"prepare_videos: error: --out: {tmp_path}/index.csv is there already; name another file\n"
        )


class TestAnybodys:
    def test_what_the_library_writes(self, videos: list[Entry], tmp_path: Path) -> None:
        pattern = str(tmp_path / "x-%03d.tar")
        with webdataset.ShardWriter(pattern, maxcount=2, verbose=0) as writer:
            for i, entry in enumerate(videos[:3]):
                sample = {"__key__": f"k{i}", "mp4": Path(entry.path).read_bytes(), "cls": 10 + i, "json": {"n": i}}
                writer.write(sample)
        shards = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
        entries = index(shards, below=tmp_path / "lists")
        assert [entry.label for entry in entries] == [10, 11, 12]
        assert all(np.array_equal(a, b) for a, b in zip(truth_of(entries), truth_of(videos[:3]), strict=True))

    @pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
    def test_any_tar(self, videos: list[Entry], tmp_path: Path, kind: int) -> None:
        names = ["./a/1.mp4", "d" * 60 + "/" + "n" * 60 + ".avi", "\u00fc.MP4"]
        with tarfile.open(tmp_path / "x.tar", "w", format=kind) as tar:
            tar.add(tmp_path, "a", recursive=False)
            for name, entry in zip(names, videos, strict=False):
                tar.add(entry.path, name)
            tar.add(__file__, "a/2.txt")
        entries = index([str(tmp_path / "x.tar")], below=tmp_path)
        assert [Member.named(entry.path).name for entry in entries] == names  # type: ignore[union-attr]
        (tmp_path / "x.csv").write_text(format_manifest(entries))
        found = truth_of(read_manifest(tmp_path / "x.csv"))
        assert all(np.array_equal(a, b) for a, b in zip(found, truth_of(videos[:3]), strict=True))

    @pytest.mark.parametrize("twice", ["clip.mp4", "clip.cls", "clip.MP4"])
    def test_a_key_twice(self, videos: list[Entry], tmp_path: Path, twice: str) -> None:
        """Labels go by keys: the first video would get the last one's."""
        video = Path(videos[0].path).read_bytes()
        members = [("clip.mp4", video), ("clip.cls", b"0"), ("other.mp4", video), ("other.cls", b"1"), (twice, b"2")]
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        told = rf"^{tmp_path}/x\.tar holds the key 'clip' twice \({twice}\), and labels go by keys; write it anew with "
        with pytest.raises(UserError, match=told):
            index([str(tmp_path / "x.tar")], below=tmp_path)
        done = run("index", tmp_path / "x.tar", "--out", tmp_path / "x.csv")
        assert done.returncode == 2
        assert not (tmp_path / "x.csv").exists()

    def test_mistakes(self, videos: list[Entry], tmp_path: Path) -> None:
        def tar(mode: str, **members: bytes) -> list[str]:
            path = tmp_path / f"{len(list(tmp_path.iterdir()))}.tar"
            with tarfile.open(path, mode) as file:
                for name, content in members.items():
                    info = tarfile.TarInfo(name.replace("_", "."))
                    info.size = len(content)
                    file.addfile(info, io.BytesIO(content))
            return [str(path)]

        def joined(one: list[str], other: list[str]) -> list[str]:
            Path(one[0]).write_bytes(Path(one[0]).read_bytes() + Path(other[0]).read_bytes())
            return one

        def damaged(shards: list[str]) -> list[str]:
            content = bytearray(Path(shards[0]).read_bytes())
            header = content.index(b"b.mp4")
            content[header : header + 512] = b"\1" * 512
            Path(shards[0]).write_bytes(content)
            return shards

        video = Path(videos[0].path).read_bytes()
        for shards, told in (
            ([str(tmp_path / "none.tar")], "none.tar: No such file or directory"),
            (["http://127.0.0.1:9/x.tar"], "http://127.0.0.1:9/x.tar: "),
            (tar("w:gz", a_mp4=video), "shards are plain tar files"),
            (tar("w", a_txt=b"1"), "holds no file with the name of a video"),
            (tar("w", a_mp4=video, a_cls=b"cat"), "a.cls holds no whole number: b'cat'"),
            (tar("w", a_mp4=video, a_cls=b"-1"), "a.cls holds -1, which is not in 0"),
            (tar("w", a_mp4=video, a_cls=b"1", b_mp4=video), r"1 of 2 videos have no .cls, such as .*b.mp4"),
            (tar("w", **{"two\nlines_mp4": video}), r"two.nlines.mp4': a manifest can't hold its name"),
            (joined(tar("w", a_mp4=video), tar("w", b_mp4=video)), r"damaged, or another tar file, at byte \d+"),
            (damaged(tar("w", a_mp4=video, b_mp4=video)), r"damaged, or another tar file, at byte \d+"),
        ):
            with pytest.raises(UserError, match=told):
                index(shards, below=tmp_path / "lists")


class TestReading:
    def test_a_shard_that_was_replaced_is_told(self, packed: Path, videos: list[Entry], tmp_path: Path) -> None:
        shutil.copytree(packed, tmp_path / "shards")
        entries = read_manifest(tmp_path / "shards" / "manifest.csv")
        shutil.copy(packed / "shard-000001.tar", tmp_path / "shards" / "shard-000000.tar")
        with pytest.raises(DecodeError, match=r"its shard holds something else at \d+; index the shards again"):
            decode(entries[1].path, range)
        (tmp_path / "shards" / "shard-000000.tar").write_bytes(b"cut")
        with pytest.raises(DecodeError, match="its shard holds something else"):
            decode(entries[0].path, range)
        (tmp_path / "shards" / "shard-000000.tar").unlink()
        with pytest.raises(DecodeError, match="no such file or directory"):
            decode(entries[0].path, range)

    def test_a_member_that_is_no_video(self, tmp_path: Path) -> None:
        (tmp_path / "a.mp4").write_text("no video\n" * 100)
        write_shards(read_source(tmp_path), tmp_path / "out", shard_bytes=1)
        (entry,) = read_manifest(tmp_path / "out" / "manifest.csv")
        with pytest.raises(DecodeError) as caught:
            decode(entry.path, range)
        assert (caught.value.reason, caught.value.path) == ("not a video, or cut off", entry.path)
        assert examine(entry.path).reason == "not a video, or cut off"

    def test_names_stay_as_their_shard_has_them(self, videos: list[Entry], tmp_path: Path) -> None:
        """Dots and doubled slashes; and what isn't ASCII, of which some writers leave nothing in the plain header."""
        content = Path(videos[0].path).read_bytes()
        names = ["./a/../d.mp4", "a//b.mp4", "f\u00fcnf.mp4"]
        with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
            for name in names:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        shard = (tmp_path / "x.tar").read_bytes()
        plain = tarfile.TarInfo("fnf.mp4")
        plain.size = len(content)
        header = tarfile.TarInfo("f?nf.mp4")
        header.size = len(content)
        assert shard.count(header.tobuf(tarfile.USTAR_FORMAT)) == 1
        (tmp_path / "x.tar").write_bytes(
            shard.replace(header.tobuf(tarfile.USTAR_FORMAT), plain.tobuf(tarfile.USTAR_FORMAT))
        )
        (tmp_path / "x.csv").write_text(format_manifest(index([str(tmp_path / "x.tar")], below=tmp_path)))
        source = read_source(tmp_path / "x.csv")
        assert [Member.named(path).name for path in source.paths] == names  # type: ignore[union-attr]
        assert scan(source, tmp_path / "scan", Limits(workers=1, limit_s=60))["good"] == 3

    def test_memory_does_not_grow_with_what_is_read(self, videos: list[Entry], tmp_path: Path) -> None:
        """decord leaves a member's bytes to the garbage collector, which counts objects, not megabytes."""
        (tmp_path / "a.mp4").write_bytes(Path(videos[0].path).read_bytes() + bytes(8 * MIB))
        write_shards(read_source(tmp_path), tmp_path / "out", shard_bytes=1)
        (entry,) = read_manifest(tmp_path / "out" / "manifest.csv")
        decode(entry.path, lambda _: [0])
        before = psutil.Process().memory_info().rss
        for _ in range(30):
            decode(entry.path, lambda _: [0])
            assert psutil.Process().memory_info().rss - before < 50 * MIB

    def test_a_network_that_fails_is_asked_again(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        source = Source(entries=[Entry("http://127.0.0.1:9/a.tar#512+5#a.mp4", None)], name="x", base="y")
        limits = Limits(workers=1, limit_s=60)
        looked = []

        def work(task: Any, items: Any, **_: Any) -> Any:
            looked.append(len(items))
            return [(item, task(item)) for item in items]

        monkeypatch.setattr(scan_module.jobs, "run", work)
        monkeypatch.setattr(members_module, "_PAUSES_S", ())
        for _ in range(2):
            assert scan(source, tmp_path / "scan", limits)["bad"] == 1
        assert looked == [1, 1]

    def test_scan_and_rewrite_read_shards(self, packed: Path, tmp_path: Path) -> None:
        lines = (packed / "manifest.csv").read_text().splitlines(keepends=True)[:3]
        (tmp_path / "two.csv").write_text("".join(lines))
        source = read_source(tmp_path / "two.csv", str(packed))
        limits = Limits(workers=1, limit_s=60)
        assert scan(source, tmp_path / "scan", limits)["good"] == 2
        assert read_manifest(tmp_path / "scan" / "good.csv") == source.entries
        rewrite(source, tmp_path / "copies", limits, Encoding(short_side=32))
        assert read_manifest(tmp_path / "copies" / "manifest.csv") == [
            Entry(f"{tmp_path}/copies/shard-000000/{i}.mp4", i) for i in range(2)
        ]

    def test_a_network_that_stumbles_is_no_bad_video(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls, pauses = [], []

        class Storage:
            def cat_file(self, path: str, start: int, end: int) -> bytes:
                calls.append((path, start, end))
                if len(calls) < 3:
                    raise RuntimeError("reset")
                return b"1234"

        monkeypatch.setattr(members_module, "filesystem", lambda url: (Storage(), "x"))
        monkeypatch.setattr(members_module.time, "sleep", pauses.append)
        monkeypatch.setattr(members_module, "_PAUSES_S", (0.5,))
        with pytest.raises(OSError, match="RuntimeError: reset"):
            members_module._fetch("s3://x", 1, 5)
        assert (calls, pauses) == ([("x", 1, 5)] * 2, [0.5])
        assert members_module._fetch("s3://x", 1, 5) == b"1234"

    def test_an_unknown_url_is_the_users_mistake(self) -> None:
        with pytest.raises(UserError, match=r"^nowhere:// in a manifest: "):
            decode("nowhere://x/a.tar#512+5#a.mp4", range)
        # Before a worker meets it.
        with pytest.raises(UserError, match=r"^nowhere:// in a manifest: "):
            ClipDataset(
                [Entry("nowhere://x/a.tar#512+5#a.mp4", 0)], DataConfig(), frames=8, image_size=32, tokens=4, seed=0
            )


def batches(entries: list[Entry], *, workers: int, ranks: int = 1, first_step: int = 0) -> list[Batch]:
    """Return five steps' batches, those of all ranks side by side."""
    by_rank = []
    for rank in range(ranks):
        data = DataConfig(workers=workers, stride=2, prefetch=2)
        dataset = ClipDataset(entries, data, frames=8, image_size=32, tokens=4, seed=3)
        sampler = StepSampler(
            12, seed=3, micro_batch=4 // ranks, ranks=ranks, rank=rank, first_step=first_step, last_step=5
        )
        by_rank.append(list(build_loader(dataset, sampler)))
    return [batch for step in zip(*by_rank, strict=True) for batch in step]


def joined(found: list[Batch]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.cat([getattr(batch, name) for batch in found]) for name in ("clips", "noise", "labels", "index"))


def same(a: list[Batch], b: list[Batch]) -> bool:
    assert not any(batch.bad for batch in (*a, *b))
    return all(torch.equal(x, y) for x, y in zip(joined(a), joined(b), strict=True))


class TestGuarantees:
    """What holds for files holds for shards: order, ranks, workers, resuming."""

    @pytest.fixture(scope="class")
    def files(self, videos: list[Entry]) -> list[Batch]:
        return batches(videos, workers=0)

    def test_local_shards(self, packed: Path, files: list[Batch]) -> None:
        entries = read_manifest(packed / "manifest.csv")
        assert same(batches(entries, workers=2), files)
        assert same(batches(entries, workers=0, ranks=2), files)
        assert same(batches(entries, workers=1, first_step=3), files[3:])

    def test_remote_shards(
        self, packed: Path, remote: tuple[str, list[int]], files: list[Batch], tmp_path: Path
    ) -> None:
        url, sent = remote
        entries = read_manifest(packed / "manifest.csv", url)
        # Also after this process has used the storage itself: the workers are forked.
        assert decode(entries[0].path, range).shape == (34, 48, 64, 3)
        assert same(batches(entries, workers=2), files)
        # Videos, never whole shards.
        assert len(sent) >= 21
        assert max(sent) < 21_000
        shards = [f"{url}/{path.name}" for path in sorted(packed.glob("*.tar"))]
        assert index(shards, below=tmp_path) == entries
        with pytest.raises(DecodeError, match=r"none\.tar"):
            decode(f"{url}/none.tar#512+5#a.mp4", range)
