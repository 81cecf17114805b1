"""Checkpoints as folders of files that are whole or not there: written aside, checked, named, and thinned out.

``checkpoints/step-00000100/`` holds tensors (``part-*.safetensors``, one per rank that wrote), ``state.json`` with all
the rest, and ``manifest.json`` with the size and SHA-256 of each. Nothing in it is code. ``checkpoints/latest`` names
the newest.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from everest_ds.config.files import read_bounded
from everest_ds.config.json_text import parse_json
from everest_ds.training import files

LATEST = "latest"
STATE = "state.json"
_MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8,})")
_READ_BYTES = 1 << 22
# Of a manifest or a state: of 10,000 ranks they have a few.
_LARGEST_TEXT_BYTES = 16 << 20

Facts = dict[str, Any]
"""Of a file: ``bytes`` and ``sha256``."""


def name_of(step: int) -> str:
    """Return the folder's name of the checkpoint after a step."""
    return f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """Return the step of a checkpoint's folder, -1 if it isn't one."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else -1


def part_name(rank: int, ranks: int) -> str:
    """Return the name of the file that a rank writes."""
    return f"part-{rank:05d}-of-{ranks:05d}.safetensors"


def unfinished(checkpoints: Path, step: int) -> Path:
    """Return where a checkpoint is written before it is whole."""
    return checkpoints / f".unfinished-{name_of(step)}"


def describe(file: Path) -> Facts:
    """Return a file's facts, once it is on the disk; raises OSError."""
    files.sync(file)
    return {"bytes": file.stat().st_size, "sha256": _digest(file)}


def seal(checkpoints: Path, step: int, state: dict[str, Any], parts: dict[str, Facts]) -> Path:
    """Make a written checkpoint the latest one; returns its folder. Raises OSError, and then the old one still is.

    Another folder of that step is moved aside, unless it holds the very same.
    """
    folder, final = unfinished(checkpoints, step), checkpoints / name_of(step)
    (folder / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    manifest = json.dumps({"files": {**parts, STATE: describe(folder / STATE)}}, indent=2) + "\n"
    (folder / _MANIFEST).write_text(manifest, encoding="utf-8")
    files.sync(folder / _MANIFEST)
    if (final / _MANIFEST).is_file() and (final / _MANIFEST).read_text(encoding="utf-8") == manifest:
        shutil.rmtree(folder) if not damage(final) else _swap(folder, final)
    elif final.exists():
        _swap(folder, final)
    else:
        files.replace(folder, final)
    files.write(checkpoints / LATEST, final.name)
    return final


def damage(folder: Path, only: Iterable[str] | None = None) -> str:
    """Say what is wrong with a checkpoint; an empty string if it is whole.

    Args:
        folder: of the checkpoint.
        only: the files to look at; None: all.
    """
    try:
        listed = _listed(folder)
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"{_MANIFEST}: {_one_line(error)}"
    for name in listed if only is None else only:
        reason = _file_damage(folder / name, listed[name])
        if reason:
            return f"{name}: {reason}"
    return ""


def names(folder: Path) -> list[str]:
    """Return the files that a checkpoint's manifest lists, an empty list where there is none."""
    try:
        return sorted(_listed(folder))
    except (OSError, ValueError, TypeError, KeyError):
        return []


def digest(folder: Path) -> str:
    """Return the checksum of what a checkpoint says beside its tensors, an empty string where there is none."""
    try:
        return str(_listed(folder)[STATE]["sha256"])
    except (OSError, ValueError, TypeError, KeyError):
        return ""


def read_state(folder: Path) -> dict[str, Any]:
    """Return what a checkpoint says beside its tensors; raises OSError, or ValueError where it isn't JSON."""
    state = _read_json(folder / STATE)
    if not isinstance(state, dict):
        raise ValueError(f"{folder / STATE}: not an object")
    return state


def parts(folder: Path) -> list[Path]:
    """Return the files of tensors."""
    return [folder / name for name in names(folder) if name != STATE]


def newest_first(checkpoints: Path) -> list[Path]:
    """Return the folders of checkpoints from the one that ``latest`` names backwards; from the newest if it doesn't."""
    try:
        latest = step_of(checkpoints / (checkpoints / LATEST).read_text(encoding="utf-8").strip())
    except (OSError, ValueError):
        latest = -1
    found = sorted((p for p in checkpoints.glob("step-*") if step_of(p) >= 0), key=step_of, reverse=True)
    older = [folder for folder in found if step_of(folder) <= latest]
    return older or found


def set_later_aside(checkpoints: Path, step: int) -> None:
    """Keep the checkpoints beyond a step under other names: the run that continues there will make its own."""
    for folder in checkpoints.glob("step-*"):
        if step_of(folder) > step:
            _set_aside(folder)


def thin_out(checkpoints: Path, *, keep_last: int, keep_every: int) -> list[Path]:
    """Delete what needn't be kept, oldest first, and what unfinished saving left; returns what was deleted.

    What lies beyond the latest, as after going back by hand, is left alone.

    Args:
        checkpoints: of a run whose newest checkpoint has just been written.
        keep_last: newest ones to keep; 0: all.
        keep_every: keep those of every such step, too; 0: none.
    """
    old = newest_first(checkpoints)[keep_last:][::-1] if keep_last else []
    doomed = [folder for folder in old if not keep_every or step_of(folder) % keep_every]
    doomed += checkpoints.glob(".unfinished-*")
    for folder in doomed:
        # First it stops being a checkpoint: a kill half-way leaves nothing that looks like one.
        gone = folder.with_name(f".unfinished-deleted-{folder.name.lstrip('.')}")
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
    return doomed


def _swap(folder: Path, final: Path) -> None:
    """Put a folder in the place of another."""
    _set_aside(final)
    files.replace(folder, final)


def _set_aside(folder: Path) -> None:
    """Keep a folder under a name that nothing has and that is no checkpoint's."""
    names = (folder.with_name(f"{folder.name}.replaced-{i}") for i in itertools.count(1))
    folder.rename(next(path for path in names if not path.exists()))


def _read_json(file: Path) -> Any:
    return parse_json(read_bounded(file, _LARGEST_TEXT_BYTES).decode())


def _listed(folder: Path) -> dict[str, Facts]:
    manifest = _read_json(folder / _MANIFEST)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise ValueError("no list of files")
    found = {str(name): {"bytes": int(f["bytes"]), "sha256": str(f["sha256"])} for name, f in manifest["files"].items()}
    if STATE not in found or any(Path(name).name != name for name in found):
        raise ValueError("lists other files than a checkpoint's")
    return found


def _file_damage(file: Path, facts: Facts) -> str:
    try:
        size = file.stat().st_size
        if size != facts["bytes"]:
            return f"{size} bytes in place of {facts['bytes']}"
        return "" if _digest(file) == facts["sha256"] else "other content than was written (SHA-256)"
    except OSError as error:
        return _one_line(error)


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _one_line(error: Exception) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
