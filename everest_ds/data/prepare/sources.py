"""Which videos a command is about: those of a manifest, or those in a folder."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from everest_ds.config.errors import UserError
from everest_ds.data.manifest import Entry, is_video, read_manifest
from everest_ds.data.members import Member, is_url

_KEY = "SOURCE"


@dataclass(frozen=True, kw_only=True)
class Source:
    """The videos, with absolute paths or URLs, in the order that a manifest gives them or sorted.

    ``name`` is the manifest's or the folder's absolute path; ``base`` the folder that relative paths start from.
    """

    entries: list[Entry]
    name: str
    base: str

    @property
    def paths(self) -> list[str]:
        """Every path once."""
        return list(dict.fromkeys(entry.path for entry in self.entries))


def read_source(path: Path, root: str | None = None) -> Source:
    """Return the videos of a manifest, or of a folder and the folders in it.

    Args:
        path: the manifest or the folder.
        root: folder that a manifest's relative paths start from; None: the manifest's own.

    Raises:
        UserError: the manifest can't be read, or the folder holds no video.
    """
    path = Path(os.path.expanduser(path))  # noqa: PTH111 - pathlib's raises for a user who isn't there
    if os.path.isdir(path):  # noqa: PTH112 - pathlib's raises for a path that may not be looked at
        if root is not None:
            raise UserError(f"--root: {path} is a folder; a root is for manifests")
        entries = [Entry(video, None) for video in _find(os.path.abspath(path))]  # noqa: PTH100 - resolve() follows links
        if not entries:
            raise UserError(f"{_KEY}: {path} and its folders hold no file with the name of a video, such as a.mp4")
        base = path
    else:
        listed = read_manifest(path, root, key=_KEY)
        entries = [Entry(_absolute(entry.path), entry.label) for entry in listed]
        base = path.parent if root is None else Path(os.path.expanduser(root))  # noqa: PTH111
        if root is not None and is_url(root):
            return Source(entries=entries, name=str(path.absolute()), base=root)
    return Source(entries=entries, name=str(path.absolute()), base=os.path.abspath(base))  # noqa: PTH100


def _absolute(path: str) -> str:
    if is_url(path):
        return path
    member = Member.named(path)
    # A member's name stays as its shard has it.
    return os.path.abspath(path) if member is None else str(replace(member, shard=os.path.abspath(member.shard)))  # noqa: PTH100


def _find(folder: str) -> list[str]:
    """Return everything under a folder, links followed, that has the name of a video and isn't a folder; sorted."""

    def failed(error: OSError) -> NoReturn:
        # Not skipped: a part of the set would be missing without a word.
        raise UserError(f"{_KEY}: cannot list {error.filename}: {error.strerror}") from error

    found, seen = [], set()
    for here, folders, files in os.walk(folder, followlinks=True, onerror=failed):
        try:
            status = os.stat(here)  # noqa: PTH116
        except OSError as error:
            failed(error)
        # A link that leads back up would be followed for ever.
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        found += [f"{here}/{name}" for name in files if is_video(name)]
    return sorted(found)
