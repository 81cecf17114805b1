"""Read a recipe (YAML) and dotted overrides into a :class:`Recipe`, and write one back.

Every mistake is a :class:`UserError` that names the key, what was found and what was expected.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from everest_ds.config.errors import UserError, nearest
from everest_ds.config.schema import Recipe

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
            known = [prefix + name for name in hints]
            raise UserError(f"unknown key '{prefix}{key}'{nearest(f'{prefix}{key}', known)}")
    values = {}
    for key, value in tree.items():
        if dataclasses.is_dataclass(hints[key]):
            values[key] = build(typing.cast(type, hints[key]), group(tree, key, prefix), f"{prefix}{key}.")
        else:
            values[key] = _coerce(value, hints[key], prefix + key)
    return kind(**values)


def group(tree: Mapping[str, Any], key: str, prefix: str = "") -> Mapping[str, Any]:
    """Return a group of settings from a tree, an empty one where there is none.

    Raises:
        UserError: it is a value.
    """
    value = tree.get(key)
    # A group whose lines are all comments reads as null.
    if not isinstance(value, Mapping | None):
        raise UserError(f"{prefix}{key}: expected a group of settings, got {value!r}")
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
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"recipe {path}: {error.strerror}; shipped ones are in run/recipes/") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise UserError(f"recipe {path}: not a YAML file ({str(error).splitlines()[0]})") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"recipe {path}: expected groups of settings, got {type(tree).__name__}")
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override '{override}': expected key=value, such as model.size=vit_base")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"override '{override}': the value is not YAML") from error
    _set(tree, key, value, override)


def _set(tree: dict[str, Any], key: str, value: Any, override: str) -> None:
    *groups, last = key.split(".")
    for group in groups:
        inner = tree[group] = {} if tree.get(group) is None else tree[group]
        if not isinstance(inner, dict):
            raise UserError(f"override '{override}': '{group}' is a value, not a group of settings")
        tree = inner
    tree[last] = value


def _coerce(value: Any, hint: Any, key: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        (hint,) = (arg for arg in args if arg is not type(None))
        return _coerce(value, hint, key)
    if origin is typing.Literal:
        # YAML reads off, no and on as booleans; none of ours is meant as one.
        if value in args:
            return value
        raise UserError(f"{key}: expected one of {', '.join(args)}, got {value!r}{nearest(str(value), args)}")
    if origin is tuple:
        if not isinstance(value, list | tuple) or (args[-1] is not ... and len(value) != len(args)):
            wanted = "a list" if args[-1] is ... else f"a list of {len(args)}"
            raise UserError(f"{key}: expected {wanted} numbers, got {value!r}")
        return tuple(_coerce(item, args[0], key) for item in value)
    return _scalar(value, hint, key)


def _scalar(value: Any, kind: type, key: str) -> Any:
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
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        raise UserError(f"{key}: expected {names[kind]}, got {value!r}")
    return value
