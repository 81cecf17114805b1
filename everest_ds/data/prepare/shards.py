"""WebDataset shards, tar files with a video and its label under one key (``key.mp4``, ``key.cls``); their manifests.

A set of a million small files is slow to list, to copy and to open on most shared storage; a thousand tar files are
not. The manifest names each video's place in its shard (:mod:`everest_ds.data.members`), so training reads any video
by itself and nothing that holds for files changes: the order of samples, resuming, any number of ranks and workers.
"""

from __future__ import annotations

import filecmp
import hashlib
import importlib
import itertools
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from everest_ds.config.errors import UserError
from everest_ds.config.progress import CountLine
from everest_ds.data.decode import one_line
from everest_ds.data.manifest import LARGEST_LABEL, UNLISTABLE, Entry, can_list, format_manifest, is_video
from everest_ds.data.members import Member, filesystem, is_url, key_twice
from everest_ds.data.prepare.folder import Record, WorkFolder, status_of
from everest_ds.data.prepare.sources import Source

MANIFEST = "manifest.csv"
# Raise it whenever the same videos would make other shards.
_VERSION = 1
_SHARD = "shard-{:06d}.tar"
_LABEL = "cls"


class Packed(NamedTuple):
    """A video as it goes into a shard: its key there, its size in bytes and its time, which tell whether it changed."""

    path: str
    label: int | None
    key: str
    size: int
    time: int


def write_shards(source: Source, out: Path, *, shard_bytes: int) -> dict[str, int]:
    """Pack the videos, in their order, into OUT/shard-000000.tar and so on, and write OUT/manifest.csv.

    The same videos make the same bytes. A second call writes the shards that are missing.

    Args:
        source: plain files.
        out: new, or that of an earlier call for the same source.
        shard_bytes: size of a shard, beyond which no video is added.

    Returns:
        Counts: ``videos`` and ``shards``.

    Raises:
        UserError: a video is missing or empty, ``out`` holds something else or can't be written, or webdataset is
            missing.
    """
    writer, out = _webdataset("writer").TarWriter, out.absolute()
    plan = list(_split(_packed(source), shard_bytes))
    settings: dict[str, Any] = {"command": "shards", "version": _VERSION, "source": source.name, "base": source.base}
    settings |= {"shard_bytes": shard_bytes}
    with WorkFolder(out, settings) as folder, CountLine("shards", speaks=True) as progress:
        records = []
        for number, videos in enumerate(plan):
            records.append(_shard(folder, out / _SHARD.format(number), videos, writer))
            progress(number + 1, len(plan))
        folder.finish(records)
        folder.write(MANIFEST, format_manifest(index([record["path"] for record in records], below=out)))
    return {"videos": len(source.entries), "shards": len(plan)}


def _packed(source: Source) -> Iterator[Packed]:
    """Yield the videos, each with a key of its own: its path below the base, without what WebDataset cuts off."""
    keys: set[str] = set()
    for entry in source.entries:
        status = None if is_url(entry.path) or Member.named(entry.path) else status_of(entry.path)
        named = is_video(entry.path) and os.path.splitext(entry.path)[1]  # noqa: PTH122 - of text; ".mp4" has none
        if not status or not status[0] or not named or not can_list(entry.path):
            raise UserError(
                f"SOURCE: {entry.path} is no file with a video in it; scan the set and pack what is in good.csv"
            )
        below = entry.path.removeprefix(f"{source.base}/").lstrip("/")
        folder, name = os.path.split(os.path.splitext(below)[0])  # noqa: PTH122 - of text
        # A key ends at the first dot of a name.
        plain = os.path.join(folder, name.replace(".", "_"))  # noqa: PTH118
        numbered = (f"{plain}-{number}" for number in itertools.count(2))
        key = next(key for key in itertools.chain([plain], numbered) if key not in keys)
        keys.add(key)
        yield Packed(entry.path, entry.label, key, *status)


def _split(videos: Iterator[Packed], shard_bytes: int) -> Iterator[list[Packed]]:
    """Yield the videos of each shard."""
    shard: list[Packed] = []
    size = 0
    for video in videos:
        if shard and size + video.size > shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(video)
        size += video.size
    if shard:
        yield shard


def _shard(folder: WorkFolder, path: Path, videos: list[Packed], writer: Any) -> Record:
    """Write a shard, unless it is there, and return its record."""
    digest = hashlib.sha256(json.dumps(videos).encode()).hexdigest()
    known = folder.unchanged(str(path), status_of(str(path)))
    if known is not None and path.exists():
        if known["digest"] == digest:
            return known
        raise UserError(f"--out: {path} holds other videos than those of this source now; name another folder")
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        # Nothing of who, when and where: the same videos, the same bytes.
        with unfinished.open("wb") as file, writer(file, encoder=False, mtime=0, user="", group="") as tar:
            for video in videos:
                label = {} if video.label is None else {_LABEL: str(video.label).encode()}
                extension = os.path.splitext(video.path)[1][1:].lower()  # noqa: PTH122
                tar.write({"__key__": video.key, extension: Path(video.path).read_bytes(), **label})
        # The folder may have been moved, so that nothing is known of it.
        if path.exists() and known is None and not filecmp.cmp(unfinished, path, shallow=False):
            raise UserError(f"--out: {path} holds other videos than those of this source now; name another folder")
        unfinished.replace(path)
    except OSError as error:
        where = error.filename or path
        raise UserError(f"{where}: {error.strerror}; the same command goes on from here") from error
    finally:
        unfinished.unlink(missing_ok=True)
    return folder.add(str(path), status_of(str(path)), settled=True, digest=digest, videos=len(videos))


def index(shards: Sequence[str], *, below: Path) -> list[Entry]:
    """Return the videos in shards, anybody's, in their order, with the labels that ``.cls`` members give.

    Args:
        shards: paths or URLs of plain tar files.
        below: absolute path of a folder; the paths of shards in it are made relative to it.

    Raises:
        UserError: a shard can't be read or isn't a plain tar file, it holds no video, a key is in it twice, a label
            is no number, or some videos have labels and others don't.
    """
    entries = [entry for shard in shards for entry in _index_one(shard, below)]
    labelled = sum(entry.label is not None for entry in entries)
    if 0 < labelled < len(entries):
        without = next(entry.path for entry in entries if entry.label is None)
        raise UserError(f"{len(entries) - labelled} of {len(entries)} videos have no .{_LABEL}, such as {without}")
    return entries


def _index_one(shard: str, below: Path) -> list[Entry]:
    name = shard if is_url(shard) else str(Path(shard).absolute())
    name = name.removeprefix(f"{below}/")
    members: list[tuple[str, Member]] = []
    labels: dict[str, int] = {}
    seen: set[tuple[str, str]] = set()
    try:
        with _opened(shard) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            split = _webdataset("tariterators").base_plus_ext
            for info in tar:
                key, extension = split(info.name)
                if key is None or not info.isreg():
                    continue
                is_label = extension.lower() == _LABEL
                if not is_label and not is_video(info.name):
                    continue
                if (key, extension.lower()) in seen:
                    raise UserError(key_twice(shard, info.name))
                seen.add((key, extension.lower()))
                if is_label:
                    labels[key] = _label(tar, info, shard)
                else:
                    members.append((key, Member(shard=name, start=info.offset_data, size=info.size, name=info.name)))
            _check_end(file, tar, shard)
    except tarfile.TarError as error:
        raise UserError(
            f"{shard}: {error}; shards are plain tar files (in compressed ones no place is known)"
        ) from error
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{shard}: {error.strerror or one_line(error)}") from error
    except Exception as error:
        # Each storage has exceptions of its own.
        raise UserError(f"{shard}: {type(error).__name__}: {one_line(error)}") from error
    if not members:
        raise UserError(f"{shard} holds no file with the name of a video, such as key.mp4")
    unlistable = next((member.name for _, member in members if not can_list(str(member))), None)
    if unlistable is not None:
        raise UserError(f"{shard}: {unlistable!a}: {UNLISTABLE}")
    return [Entry(str(member), labels.get(key)) for key, member in members]


def _opened(shard: str) -> Any:
    if not is_url(shard):
        return open(shard, "rb")  # noqa: PTH123 - the caller closes it
    files, path = filesystem(shard)
    return files.open(path, "rb", block_size=2**16)


def _label(tar: tarfile.TarFile, info: tarfile.TarInfo, shard: str) -> int:
    file = tar.extractfile(info)
    text = b"" if file is None else file.read()
    try:
        label = int(text)
    except ValueError:
        raise UserError(f"{shard}: {info.name} holds no whole number: {text[:20]!r}") from None
    if not 0 <= label <= LARGEST_LABEL:
        raise UserError(f"{shard}: {info.name} holds {label}, which is not in 0 ... {LARGEST_LABEL}")
    return label


def _check_end(file: Any, tar: tarfile.TarFile, shard: str) -> None:
    """Raise unless the tar file ends where its members end: tarfile stops without a word at a damaged header."""
    file.seek(tar.offset)
    # Zeros to the end of a record of 10 KiB; more would be another tar file's.
    if file.read(2 * tarfile.RECORDSIZE).strip(b"\0"):
        raise UserError(f"{shard}: damaged, or another tar file, at byte {tar.offset}; write it anew")


def _webdataset(module: str) -> Any:
    try:
        return importlib.import_module(f"webdataset.{module}")
    except ModuleNotFoundError as error:
        raise UserError("webdataset is not installed; pip install 'everest_ds[shards]'") from error
