"""Read a recipe (YAML) and dotted overrides into a :class:`Recipe`, and write one back.

Every mistake is a :class:`UserError` that names the key, what was found and what was expected.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from everest_ds.config.errors import UserError, nearest, shown
from everest_ds.config.files import LARGEST_SETTINGS_BYTES, read_bounded
from everest_ds.config.schema import Recipe
from everest_ds.config.yaml_text import YamlTextError, parse_yaml

# Beyond it a float holds no whole number exactly, and 64-bit arithmetic on steps and frames overflows.
LARGEST_WHOLE_NUMBER = 2**53
# PATH_MAX: the longest text among the settings is a path.
LONGEST_TEXT = 4096
LONGEST_LIST = 100
_KINDS: dict[type, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


def load_recipe(path: str | Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """Return the pre-training recipe at ``path``; see :func:`load_as`."""
    return load_as(Recipe, path, overrides)


def load_as(kind: type[AnyRecipe], path: str | Path | None, overrides: Sequence[str] = ()) -> AnyRecipe:
    """Return the recipe at ``path`` (defaults alone when None) with ``key=value`` overrides applied.

    Args:
        kind: of recipe: pre-training's, or fine-tuning's with its own defaults.
        path: a YAML file.
        overrides: such as ``model.size=vit_base``.

    Raises:
        UserError: the file is missing or not YAML, a key is unknown, a value has the wrong type or fails a check.
    """
    return build(kind, read_tree(path, overrides))


def read_tree(
    path: str | Path | None, overrides: Sequence[str] = (), texts: Mapping[str, str | None] | None = None
) -> dict[str, Any]:
    """Return what a recipe and its overrides say, as nested dictionaries, neither checked nor filled with defaults.

    Args:
        path: a YAML file.
        overrides: ``key=value``, the value in YAML.
        texts: values of further keys, taken as they are (a folder called 2024_01_01 is no number); None: not given.

    Raises:
        UserError: the file is missing or not YAML, or an override isn't ``key=value``.
    """
    tree = _read_yaml(Path(path)) if path is not None else {}
    for override in overrides:
        _apply_override(tree, override)
    for key, text in (texts or {}).items():
        if text is not None:
            _set(tree, key, text, f"{key}={text}")
    return tree


def build(kind: type, tree: Mapping[str, Any], prefix: str = "") -> Any:
    """Return a ``kind`` (a settings dataclass) from nested mappings, checking names and types."""
    hints = typing.get_type_hints(kind)
    for key in tree:
        if key not in hints:
            raise UserError(_unknown_key(prefix, key, hints))
    values = {}
    for key, value in tree.items():
        if dataclasses.is_dataclass(hints[key]):
            values[key] = build(typing.cast(type, hints[key]), group(tree, key, prefix), f"{prefix}{key}.")
        else:
            values[key] = _coerce(value, hints[key], prefix + key)
    return kind(**values)


def _unknown_key(prefix: str, key: Any, hints: Mapping[str, Any]) -> str:
    if not isinstance(key, str):
        return f"unknown key {shown(key)}; keys are text" + (f", as in {prefix}" if prefix else "")
    name = prefix + key
    return f"unknown key {shown(name)}{nearest(name, [prefix + known for known in hints])}"


def group(tree: Mapping[str, Any], key: str, prefix: str = "") -> Mapping[str, Any]:
    """Return a group of settings from a tree, an empty one where there is none.

    Raises:
        UserError: it is a value.
    """
    value = tree.get(key)
    # A group whose lines are all comments reads as null.
    if not isinstance(value, Mapping | None):
        raise UserError(f"{prefix}{key}: expected a group of settings, got {shown(value)}")
    return value or {}


def dump(config: Any) -> str:
    """Return the resolved configuration as YAML that :func:`load_recipe` reads back unchanged."""
    return yaml.safe_dump(to_tree(config), sort_keys=False)


def to_tree(config: Any) -> dict[str, Any]:
    """Return a settings dataclass as nested plain dicts and lists."""
    return {key: list(v) if isinstance(v, tuple) else v for key, v in _items(config)}


def describe_keys(kind: type = Recipe, prefix: str = "") -> Iterator[str]:
    """Yield one line per key: its name, default, documentation and the default's source."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from describe_keys(typing.cast(type, hints[field.name]), f"{prefix}{field.name}.")
        else:
            default = "null" if field.default is None else field.default
            meta = field.metadata
            yield f"{prefix}{field.name} = {default}: {meta['doc']} [{meta['source']}]"


def _items(config: Any) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        yield field.name, to_tree(value) if dataclasses.is_dataclass(value) else value


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = parse_yaml(read_bounded(path, LARGEST_SETTINGS_BYTES).decode())
    except OSError as error:
        raise UserError(f"recipe {path}: {error.strerror}; shipped ones are in run/recipes/") from error
    except (YamlTextError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path}: not a YAML file ({error})") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"recipe {path}: expected groups of settings, got {type(tree).__name__}")
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {shown(override)}: expected key=value, such as model.size=vit_base")
    try:
        value = parse_yaml(text)
    except YamlTextError as error:
        raise UserError(f"override {shown(override)}: the value is not YAML ({error})") from error
    _set(tree, key, value, override)


def _set(tree: dict[str, Any], key: str, value: Any, override: str) -> None:
    *groups, last = key.split(".")
    for group in groups:
        inner = tree[group] = {} if tree.get(group) is None else tree[group]
        if not isinstance(inner, dict):
            raise UserError(f"override {shown(override)}: {shown(group)} is a value, not a group of settings")
        tree = inner
    tree[last] = value


def _coerce(value: Any, hint: Any, key: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _coerce_alternative(value, args, key)
    if origin is typing.Literal:
        # YAML reads off, no and on as booleans; none of ours is meant as one.
        if isinstance(value, str) and value in args:
            return value
        close = nearest(value, args) if isinstance(value, str) else ""
        raise UserError(f"{key}: expected one of {', '.join(args)}, got {shown(value)}{close}")
    if origin is tuple:
        return tuple(_coerce(item, args[0], key) for item in _items_of(value, args, key))
    return _scalar(value, hint, key)


def _coerce_alternative(value: Any, hints: tuple[Any, ...], key: str) -> Any:
    """Read what may be of one type, null, or one of some words."""
    words = [word for hint in hints for word in typing.get_args(hint)]
    (kind,) = (hint for hint in hints if hint is not type(None) and not typing.get_args(hint))
    if words and isinstance(value, str):
        if value in words:
            return value
        wanted = f"{_KINDS[kind]} or {', '.join(words)}"
        raise UserError(f"{key}: expected {wanted}, got {shown(value)}{nearest(value, words)}")
    return _coerce(value, kind, key)


def _items_of(value: Any, args: tuple[Any, ...], key: str) -> Sequence[Any]:
    any_number = args[-1] is ...
    if not isinstance(value, list | tuple) or (len(value) > LONGEST_LIST if any_number else len(value) != len(args)):
        wanted = f"a list of at most {LONGEST_LIST}" if any_number else f"a list of {len(args)}"
        raise UserError(f"{key}: expected {wanted} numbers, got {shown(value)}")
    return value


def _scalar(value: Any, kind: type, key: str) -> Any:
    if isinstance(value, int) and abs(value) > LARGEST_WHOLE_NUMBER:
        raise UserError(f"{key}: expected a number of at most {LARGEST_WHOLE_NUMBER}, got {shown(value)}")
    if kind is float and isinstance(value, str):
        # YAML 1.1 takes 1e-3 for a string: it wants 1.0e-3.
        with contextlib.suppress(ValueError):
            value = float(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is str and value is False:
        value = "off"
    if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key}: expected a finite number, got {value!r}")
    if isinstance(value, float) and abs(value) > LARGEST_WHOLE_NUMBER:
        raise UserError(f"{key}: expected a number of at most {LARGEST_WHOLE_NUMBER}, got {value!r}")
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{key}: expected {_KINDS[kind]}, got {shown(value)}")
    if isinstance(value, str):
        _check_text(value, key)
    return value


def _check_text(text: str, key: str) -> None:
    """Refuse what no file can be called; the rest is for whoever opens it to judge."""
    if len(text) > LONGEST_TEXT:
        raise UserError(f"{key}: expected text of at most {LONGEST_TEXT} characters, got {shown(text)}")
    try:
        encoded = os.fsencode(text)
    except UnicodeEncodeError:
        encoded = b"\0"
    if b"\0" in encoded:
        raise UserError(f"{key}: expected text of whole characters without null bytes, got {shown(text)}")
