"""Whether a package imports, tried once, and what an exception says."""

from __future__ import annotations

import functools
import importlib


@functools.cache
def failure(package: str) -> str:
    """Return in one line why a package doesn't import; an empty string if it does."""
    try:
        importlib.import_module(package)
    except Exception as error:  # whatever a broken package raises
        return in_a_line(error)
    return ""


def in_a_line(error: Exception) -> str:
    """Return an exception's name and message in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
