"""What the project asks for: pyproject.toml of the checkout that is running, installed or not, or the metadata."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from importlib.metadata import metadata, requires
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from packaging.requirements import Requirement

_NAME = "everest_ds"
_PROJECT = Path(__file__).parents[3] / "pyproject.toml"
# In Python's library from 3.11 on.
_TOML = "tomllib" if sys.version_info >= (3, 11) else "tomli"


@dataclass(frozen=True, kw_only=True)
class Declared:
    """The packages that are required, by name, as written, and the versions of Python."""

    requirements: list[str]
    python: str

    def here(self) -> dict[str, Requirement]:
        """Return those of this platform and Python, by name."""
        from packaging.requirements import Requirement  # noqa: PLC0415 - may be missing, which is a finding

        parsed = map(Requirement, self.requirements)
        return {one.name: one for one in parsed if one.marker is None or one.marker.evaluate({"extra": ""})}


def declared(project: Path = _PROJECT) -> Declared:
    """Read it, from the checkout first: what was installed may be another version.

    Raises:
        PackageNotFoundError: the package is neither installed nor in a checkout that this Python can read.
    """
    if (table := _table(project)) is not None:
        return Declared(requirements=table["dependencies"], python=table["requires-python"])
    return Declared(requirements=requires(_NAME) or [], python=metadata(_NAME)["Requires-Python"])


def _table(project: Path) -> dict[str, Any] | None:
    if not project.is_file():
        return None
    try:
        parser = importlib.import_module(_TOML)
    except ModuleNotFoundError:
        return None
    table: dict[str, Any] = parser.loads(project.read_text(encoding="utf-8")).get("project", {})
    # Beside installed packages there may lie that of another, which its wheel brought.
    return table if table.get("name") == _NAME else None
