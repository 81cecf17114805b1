"""Videos in tar files (WebDataset's shards): a path that names the shard, the place in it, and the member.

``shards/shard-000017.tar#1536+48213#archery/x.mp4`` is the 48213 bytes of ``archery/x.mp4`` that start at byte 1536.
So any video of a set is read by itself, in any order, like a file: with one seek, or with one request for a range of
bytes where the shard's path is a URL (``https://``, ``s3://``, ``gs://``: whatever fsspec knows).
"""

from __future__ import annotations

import errno
import importlib
import os
import re
import stat
import tarfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from everest_ds.config.errors import UserError, shown

# As many digits as a place in a file can have.
_PATH = re.compile(r"(.+)#([0-9]{1,18})\+([0-9]{1,18})#(.+)", re.DOTALL)
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_HEADER_BYTES = tarfile.BLOCKSIZE
# What a header has room for.
_NAME_BYTES = 100
# Seconds before a request is made again: a network that stumbles is no bad video.
_PAUSES_S = (1.0, 4.0, 15.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """A file in a tar file: ``size`` bytes from ``start`` on, called ``name``. As text, a path."""

    shard: str
    start: int
    size: int
    name: str

    @classmethod
    def named(cls, path: str) -> Member | None:
        """Return the member that a path names; None for the path of a file."""
        match = _PATH.fullmatch(path)
        if match is None:
            return None
        shard, start, size, name = match.groups()
        return cls(shard=shard, start=int(start), size=int(size), name=name)

    def __str__(self) -> str:
        return f"{self.shard}#{self.start}+{self.size}#{self.name}"

    def read(self) -> bytes:
        """Return its bytes.

        Raises:
            OSError: the shard can't be read.
            ValueError: it isn't there: the shard is another one than that whose places were written down.
            UserError: the library that knows the shard's URL is missing.
        """
        # With its header, which says whether this is the member that is meant.
        start, stop = max(0, self.start - _HEADER_BYTES), self.start + self.size
        data = _fetch(self.shard, start, stop) if is_url(self.shard) else _read(self.shard, start, stop)
        if len(data) > stop - start:
            raise ValueError("its server sends whole files where it is asked for a range of bytes")
        if len(data) != stop - start or not self._is_headed(data[:_HEADER_BYTES]):
            raise ValueError(f"its shard holds something else at {self.start}; index the shards again")
        return data[_HEADER_BYTES:]

    def _is_headed(self, header: bytes) -> bool:
        try:
            found = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            return False
        # A longer name is in a header of its own, before this one; one that isn't ASCII may be.
        elsewhere = not self.name.isascii() or len(self.name) > _NAME_BYTES
        return found.size == self.size and (elsewhere or found.name == self.name)


def is_url(path: str) -> bool:
    """Say whether a path is a URL, which fsspec reads."""
    return _URL.match(path) is not None


def find_repeated(paths: Iterable[str]) -> Member | None:
    """Return a member, among these paths, whose shard has its name at another place that is among them, too."""
    first: dict[tuple[str, str], str] = {}
    for path in paths:
        member = Member.named(path) if "#" in path else None
        if member is not None and first.setdefault((member.shard, member.name), path) != path:
            return member
    return None


def key_twice(shard: str, name: str) -> str:
    """Return what is to be said of a shard that has a member's key for another sample, too."""
    folder, slash, file = name.rpartition("/")
    key = folder + slash + file.partition(".")[0]
    return (
        f"{shard} holds the key {shown(key)} twice ({name}), and labels go by keys; write it anew with a key for each "
        "video, and index it again"
    )


def require_storage(paths: Iterable[str]) -> None:
    """Load the libraries that the URLs among these paths need.

    Raises:
        UserError: one is missing, or nothing knows such a URL.
    """
    for scheme in {path.partition("://")[0] for path in paths if is_url(path)}:
        filesystem(f"{scheme}://")


def filesystem(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, and the path in it.

    Raises:
        UserError: fsspec, or the library that it needs for such a URL, is missing, or it knows no such URL.
    """
    scheme = url.partition("://")[0]
    try:
        found: tuple[Any, str] = importlib.import_module("fsspec.core").url_to_fs(url)
    except Exception as error:  # each of fsspec's storages has exceptions of its own
        raise UserError(f"{scheme}:// in a manifest: {error}; or mount the storage") from error
    return found


def _read(path: str, start: int, stop: int) -> bytes:
    status = os.stat(path)  # noqa: PTH116 - of text, for every sample
    if not stat.S_ISREG(status.st_mode):
        # A pipe would be waited for.
        raise ValueError("its shard is not a file")
    if stop > status.st_size:
        # Python reserves as much as it is asked for.
        return b""
    with open(path, "rb") as file:  # noqa: PTH123 - of text, for every sample
        file.seek(start)
        return file.read(stop - start)


def _fetch(url: str, start: int, stop: int) -> bytes:
    files, path = filesystem(url)
    for pause_s in (*_PAUSES_S, None):
        try:
            data: bytes = files.cat_file(path, start=start, end=stop)
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, "not found, or not reachable", url) from error
        except Exception as error:
            # Each storage has exceptions of its own.
            if pause_s is None:
                raise OSError(f"{type(error).__name__}: {error}") from error
            time.sleep(pause_s)
        else:
            return data
    raise AssertionError
