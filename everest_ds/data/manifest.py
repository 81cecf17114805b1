"""Manifests: text files that name one video per line, with or without an integer label.

Accepted lines, all in one style per file::

    path label          the last whitespace-separated field is the label; the path may contain spaces (VideoMAE)
    path,label          the same with a comma; a path in double quotes follows the rules of CSV
    path                no label; the path may contain spaces

A path may also be a URL, or name a member of a tar file (:mod:`everest_ds.data.members`).
Blank lines, lines that start with ``#``, a byte-order mark and a header such as ``path,label`` are skipped.
Whether a file has labels is decided by the whole file. ``holiday 2`` reads both ways: it is a path where some other
line has no label, a path and a label otherwise (folders of frames are listed so). ``holiday.mp4 2`` always has a label.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from everest_ds.config.errors import UserError, shown
from everest_ds.config.files import read_bounded
from everest_ds.data.members import find_repeated, is_url, key_twice

LARGEST_LABEL = 2**31 - 1
_MOST_DIGITS = 12
# Ten million videos with long paths.
LARGEST_MANIFEST_BYTES = 2**30
# Paths have at most 4096 bytes; a signed URL, or a member's name after its shard's, may make them longer.
_LONGEST_LINE = 16384
UNLISTABLE = "a manifest can't hold its name (not UTF-8, a line break, or a blank at an end)"

_SUFFIX = r"\.(?:mp4|m4v|mov|avi|mkv|webm|mpe?g|mts|ts|wmv|flv|ogv|3gp)"
_VIDEO = re.compile(rf"{_SUFFIX}$", re.IGNORECASE)
_VIDEO_AND_MORE = re.compile(rf".*{_SUFFIX}(?:\s*,\s*|\s+)(.*)$", re.IGNORECASE)
_INTEGER = re.compile(r"[+-]?\d+", re.ASCII)
_NEEDS_QUOTES = re.compile(r"^#|[^\w./+=@%:#-]")
_BREAKS_LINE = re.compile(r"[\r\n\0]")
_HEADER_PATHS = {"path", "video", "video_path", "file", "filename"}
_HEADER_LABELS = {"label", "class", "target"}


@dataclass(frozen=True, slots=True)
class Entry:
    """One video: its path (absolute, or joined to the root) and its class, if the manifest has classes."""

    path: str
    label: int | None


class _Line(NamedTuple):
    """A line and its two readings: as a whole (``text``), and as ``path`` and ``label`` (None: only as a whole).

    ``certain`` means that one reading is out of the question.
    """

    number: int
    text: str
    path: str
    label: int | None
    certain: bool


class _LineError(Exception):
    """What is wrong with a line."""


def read_manifest(path: str | Path, root: str | Path | None = None, *, key: str = "manifest") -> list[Entry]:
    """Return the videos that a manifest lists, in order. The videos themselves are not looked at.

    Args:
        path: the manifest.
        root: folder that relative paths start from; None: the manifest's own folder.
        key: the setting that named the manifest, for messages.

    Raises:
        UserError: the manifest can't be read, lists nothing, or a line makes no sense (names file and line); or a
            shard of its has one key for two videos.
    """
    manifest = Path(os.path.expanduser(path))  # noqa: PTH111 - pathlib's raises for a user who isn't there
    base = str(manifest.parent if root is None else root if is_url(str(root)) else os.path.expanduser(root))  # noqa: PTH111
    lines = _parse(_read_text(manifest, key), f"{key}: {manifest}")
    if not lines:
        raise UserError(f"{key}: {manifest} lists no video; write one per line: path, 'path label' or 'path,label'")
    labelled = _has_labels(lines, f"{key}: {manifest}")
    names = ((line.path, line.label) if labelled else (line.text, None) for line in lines)
    # Text, not pathlib: a manifest may have millions of lines.
    prefix = "" if base == "." else base.rstrip("/") + "/"
    entries = [Entry(name if name.startswith("/") or is_url(name) else prefix + name, label) for name, label in names]
    repeated = find_repeated(entry.path for entry in entries)
    if repeated is not None:
        raise UserError(f"{key}: {manifest}: {key_twice(repeated.shard, repeated.name)}")
    return entries


def format_manifest(entries: Sequence[Entry]) -> str:
    """Return the text of a manifest that reads as these videos: all with a label, or none."""
    labelled = [f"{_quoted(entry.path)},{entry.label}\n" for entry in entries if entry.label is not None]
    if labelled:
        return "path,label\n" + "".join(labelled)
    return "path\n" + "".join(f"{_quoted(entry.path)}\n" for entry in entries)


def _quoted(path: str) -> str:
    return '"' + path.replace('"', '""') + '"' if _NEEDS_QUOTES.search(path) else path


def can_list(path: str) -> bool:
    """Say whether a manifest can name a path: text of one line, without blanks at its ends."""
    encodable = path.encode("utf-8", "ignore").decode("utf-8") == path
    return encodable and path == path.strip() and not _BREAKS_LINE.search(path)


def is_video(name: str) -> bool:
    """Say whether a file has the name of a video."""
    return _VIDEO.search(name) is not None


def count_classes(entries: Iterable[Entry]) -> int:
    """Return the largest label plus one: labels count from 0. Without any label, 0."""
    return 1 + max((entry.label for entry in entries if entry.label is not None), default=-1)


def check_labels(entries: Sequence[Entry], classes: int, *, key: str) -> None:
    """Check that every video has a label that a classifier of so many classes knows.

    Args:
        entries: the videos.
        classes: labels are 0 ... classes - 1.
        key: the setting that named the manifest, for messages.

    Raises:
        UserError: a label is missing or out of range; names the first such video.
    """
    known = f"0 ... {classes - 1}" if classes else "0, 1, ..."
    for path, label in ((entry.path, entry.label) for entry in entries):
        if label is None:
            raise UserError(
                f"{key}: {path} has no label; a classifier needs one of {known} for every video: "
                "write lines 'path,label' in the manifest"
            )
        if not 0 <= label < classes:
            hint = f"or train a head of more classes (model.classes={label + 1}, train.new_head=true)"
            if label == classes and all(entry.label for entry in entries):
                hint = "whose labels seem to count from 1: they must count from 0"
            raise UserError(
                f"{key}: {path} has label {label}, but the classifier knows classes {known}; "
                f"correct the manifest, {hint}"
            )


def _read_text(manifest: Path, key: str) -> str:
    try:
        text = read_bounded(manifest, LARGEST_MANIFEST_BYTES).decode("utf-8-sig")
    except IsADirectoryError:
        raise UserError(f"{key}: {manifest} is a folder; give a text file that lists one video per line") from None
    except OSError as error:
        raise UserError(f"{key}: cannot read {manifest}: {error.strerror}; give a text file of videos") from error
    except UnicodeDecodeError:
        raise UserError(f"{key}: {manifest} is not text in UTF-8; give a file that lists one video per line") from None
    if "\0" in text:
        raise UserError(f"{key}: {manifest} is not a text file; give a file that lists one video per line")
    return text


def _parse(text: str, where: str) -> list[_Line]:
    lines: list[_Line] = []
    first = True
    # Not splitlines(): it also cuts at form feeds and at separators that a path may contain.
    for number, raw in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), start=1):
        stripped = raw.strip()
        if not stripped or stripped.startswith("#"):
            continue
        if not (first and _is_header(stripped)):
            try:
                lines.append(_parse_line(number, stripped))
            except _LineError as mistake:
                raise UserError(f"{where} line {number}: {mistake}") from None
        first = False
    return lines


def _is_header(text: str) -> bool:
    path, *label = [field.strip().strip('"').lower() for field in text.replace(",", " ").split()]
    return path in _HEADER_PATHS and (not label or (len(label) == 1 and label[0] in _HEADER_LABELS))


def _parse_line(number: int, text: str) -> _Line:
    if len(text) > _LONGEST_LINE:
        raise _LineError(f"{len(text)} characters, more than a path can have; is this a list of videos?")
    quoted = text.startswith('"')
    path, last = _split_quoted(text) if quoted else _split(text)
    if last is None:
        if not _VIDEO.search(path) and (more := _VIDEO_AND_MORE.match(path)):
            last = more[1]
        else:
            return _Line(number, path, path, None, certain=True)
    if not _INTEGER.fullmatch(last):
        raise _LineError(f"the label {shown(last)} is not a whole number" if last else "the label is missing")
    if not path:
        raise _LineError("the path is empty")
    # The length first: Python refuses to read thousands of digits.
    if len(last) > _MOST_DIGITS or not 0 <= int(last) <= LARGEST_LABEL:
        raise _LineError(f"the label {last[:_MOST_DIGITS]} is not in 0 ... {LARGEST_LABEL}")
    return _Line(number, text, path, int(last), certain=quoted or bool(_VIDEO.search(path)))


def _split(text: str) -> tuple[str, str | None]:
    """Return the path and the integer after its last comma or space; None in its place where there is none."""
    path, comma, last = (part.strip() for part in text.rpartition(","))
    if comma and _INTEGER.fullmatch(last):
        return path, last
    fields = text.rsplit(maxsplit=1)
    return (fields[0], fields[1]) if len(fields) == 2 and _INTEGER.fullmatch(fields[1]) else (text, None)


def _split_quoted(text: str) -> tuple[str, str | None]:
    try:
        fields = [field.strip() for field in next(csv.reader([text], strict=True, skipinitialspace=True))]
    except csv.Error:
        raise _LineError("a quoted path must end in a quote, followed by nothing or by a comma and the label") from None
    if len(fields) > 2:
        raise _LineError(f"expected path and label, found {len(fields)} fields")
    if not fields[0]:
        raise _LineError("the path is empty")
    return fields[0], fields[1] if len(fields) == 2 else None


def _has_labels(lines: list[_Line], where: str) -> bool:
    """Say whether the file has labels. Lines that read both ways follow the others; alone, they have labels."""
    with_label = next((line for line in lines if line.certain and line.label is not None), None)
    without = next((line for line in lines if line.label is None), None)
    if with_label is not None and without is not None:
        raise UserError(
            f"{where}: line {without.number} ({shown(without.text)}) has no whole number as label, but line "
            f"{with_label.number} ({shown(with_label.path)}) has; give every line a label or none"
        )
    return without is None
