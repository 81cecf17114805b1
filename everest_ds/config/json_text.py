"""JSON that may be anything: what is flat, of finite numbers, and says nothing twice."""

from __future__ import annotations

import json
import math
from typing import Any

from everest_ds.config.errors import shown

# DeepSpeed's settings have five levels.
_DEEPEST = 20
# Of 64-bit integers.
_MOST_DIGITS = 19


def parse_json(text: str) -> Any:
    """Return the values that a JSON text holds.

    Python would read NaN and Infinity, numbers without end, and of a key that is there twice the second alone.

    Raises:
        ValueError: it is not JSON, or none that we take; says why in one line.
    """
    try:
        tree = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_refuse,
            parse_float=_finite,
            parse_int=_whole,
        )
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    _check_depth(tree, 1)
    return tree


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shown(key)} is there twice")
        found[key] = value
    return found


def _refuse(text: str) -> Any:
    raise ValueError(f"{text} is no number that a setting can have")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse(shown(text))


def _whole(text: str) -> int:
    return int(text) if len(text.lstrip("-")) <= _MOST_DIGITS else _refuse(shown(text))


def _check_depth(tree: Any, depth: int) -> None:
    if depth > _DEEPEST:
        raise ValueError("nested too deep")
    if isinstance(tree, dict | list):
        for inner in tree.values() if isinstance(tree, dict) else tree:
            _check_depth(inner, depth + 1)
