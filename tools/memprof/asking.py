"""What fit, compare and paper share: lists in flags, the shipped DeepSpeed files, progress, wide tables."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from everest_ds.config.ds_config import SHIPPED, load_ds_config
from everest_ds.config.errors import UserError, nearest

_WIDTH_OF_A_FILE = 160  # characters; a table that goes into a file or a pipe isn't folded to a terminal's 80


def words(text: str) -> tuple[str, ...]:
    """Split a comma-separated flag, without repetitions."""
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def numbers(flag: str, text: str) -> tuple[int, ...]:
    """Read a comma-separated list of whole numbers.

    Raises:
        UserError: something else, or nothing.
    """
    try:
        found = tuple(int(word) for word in words(text))
    except ValueError:
        raise UserError(f"{flag}: expected whole numbers such as 128,256, got '{text}'") from None
    if not found:
        raise UserError(f"{flag}: needs at least one number")
    return found


def ds_configs(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Load DeepSpeed files: a path, or the name of a shipped one ("2", "zero2", "zero3_offload").

    Raises:
        UserError: no such file, or not a DeepSpeed JSON.
    """
    shipped = {path.stem: path for path in sorted(SHIPPED.glob("*.json"))}
    loaded = {}
    for name in names:
        stem = f"zero{name}" if name.isdecimal() else name
        if stem not in shipped and not name.endswith(".json"):
            raise UserError(
                f"ds_config '{name}': neither a JSON file nor one of {', '.join(shipped)}{nearest(stem, shipped)}"
            )
        path = shipped.get(stem, Path(name))
        loaded[path.stem if path.stem not in loaded else str(path)] = load_ds_config(path)
    return loaded


@contextlib.contextmanager
def progress(verb: str) -> Iterator[Callable[[str], None]]:
    """Yield a function that shows on a terminal's stderr what is being done; silent where stderr is no terminal."""
    with Console(stderr=True).status(verb) as status:
        yield lambda what: status.update(f"{verb}: {what}")


def check_page(path: Path, title: str) -> None:
    """Look whether a page can be written, before the work that it is about: it replaces one of its title alone.

    Raises:
        UserError: something else is there, or nothing can be.
    """
    shown = title.lstrip("# ")
    try:
        there = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
        if there == path.absolute():
            with path.open("rb") as file:
                known = path.stat().st_size == 0 or file.readline().rstrip(b"\n") == title.encode()
        else:
            known = there.is_dir()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give another path for the page '{shown}'") from error
    if not known:
        raise UserError(f"{path}: something else than the page '{shown}' is there; give another path")
    if not os.access(there, os.W_OK):
        raise UserError(f"{path}: {there} can't be written to; give another path")


def write_page(path: Path, page: str) -> None:
    """Write a page, and say where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    print(f"report: {path}", file=sys.stderr)


def show(*parts: Table | str) -> None:
    """Write tables and lines to stdout."""
    console = Console(file=sys.stdout)
    if not console.is_terminal:
        console = Console(file=sys.stdout, width=_WIDTH_OF_A_FILE)
    for part in parts:
        console.print(part, highlight=False, markup=False) if isinstance(part, str) else console.print(part)
